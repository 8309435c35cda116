"""SupervisedModule: classification and regression with a head on embeddings."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from glai_lightning.checks import UserValueError, expect_choice, expect_integer
from glai_lightning.heads.patterns import layout_of
from glai_lightning.modules.head_module import OptimizerFactory, SchedulerFactory
from glai_lightning.modules.scored import ScoredModule


class SupervisedModule(ScoredModule):
    """Trains a head for classification (cross-entropy) or regression (mean squared error).

    Batches are ``(inputs, targets)``; class targets (batch,) int64, regression targets (batch,) or (batch, C) floating
    point. Once an epoch it logs ``train/loss``, ``val/loss``, and ``val/accuracy`` (micro) and ``val/f1`` (macro), or
    for regression ``val/mse`` and ``val/r2``; the same under ``test/``.

    Args:
        head: any module from embeddings (batch, D) to logits or predictions (batch, C).
        backbone: any module from a batch of inputs to embeddings, see ``HeadModule``.
        freeze_backbone: see ``HeadModule``.
        optimizer: see ``HeadModule``.
        lr_scheduler: see ``HeadModule``.
        num_classes: number of classes, at least 2; by default the number of outputs of the head.
        task: 'classification' or 'regression'.

    Raises:
        ValueError: if ``task`` is neither, or ``num_classes`` is below 2 or neither given nor readable from the head.

    Example:
        >>> import torch
        >>> from glai_lightning import SupervisedModule, mlp_head
        >>> module = SupervisedModule(mlp_head(4, 8, 3))
        >>> module(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        head: nn.Module,
        backbone: nn.Module | None = None,
        *,
        freeze_backbone: bool = True,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        num_classes: int | None = None,
        task: Literal["classification", "regression"] = "classification",
    ) -> None:
        super().__init__(
            head, backbone, freeze_backbone=freeze_backbone, optimizer=optimizer, lr_scheduler=lr_scheduler
        )
        expect_choice("task", task, ("classification", "regression"))
        self.task = task
        outputs = _count_outputs(head) if num_classes is None else num_classes
        expect_integer("num_classes", outputs)
        self.num_classes = outputs
        if task == "classification" and outputs < 2:
            raise UserValueError(f"Expected `num_classes` to be at least 2, but got {outputs}.")
        self._set_metrics(self._make_metrics)

    def _make_metrics(self, stage: str) -> dict[str, Metric]:
        if stage == "train":
            return {}
        if self.task == "regression":
            return {"mse": MeanSquaredError(), "r2": R2Score()}
        return {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "f1": MulticlassF1Score(self.num_classes, average="macro"),
        }

    def setup(self, stage: str) -> None:
        """Check that the head has an output for every class, where the data module says how many there are."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        if self.task == "classification" and isinstance(classes, int) and classes > self.num_classes:
            raise UserValueError(
                f"Expected the head to have an output for each of the {classes} classes of the data, "
                f"but got {self.num_classes} outputs."
            )

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss: predictions (batch, C) and targets -> 0-d."""
        if self.task == "regression":
            return F.mse_loss(predictions, targets.to(predictions.dtype).reshape(predictions.shape))
        return F.cross_entropy(predictions, targets)

    def measure(self, batch: Any) -> dict[str, tuple[Any, ...]]:
        """Return what a batch ``(inputs, targets)`` tells the metrics."""
        inputs, targets = batch
        predictions = self(inputs)
        measured = {"loss": (self.loss(predictions, targets), len(targets))}
        if self.task == "regression":
            return measured | dict.fromkeys(("mse", "r2"), (predictions.reshape(targets.shape), targets))
        return measured | dict.fromkeys(("accuracy", "f1"), (predictions, targets))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits or predictions (batch, C) of a batch, with or without targets."""
        return self.forward(batch[0] if isinstance(batch, tuple | list) else batch)


def _count_outputs(head: nn.Module) -> int:
    try:
        return layout_of(head).output.out_features
    except ValueError as error:
        raise UserValueError(
            f"Expected `num_classes` to be given for a head whose outputs cannot be read, but got None. {error}"
        ) from error
