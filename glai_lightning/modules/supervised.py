"""SupervisedModule: classification and regression with a head on embeddings."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from glai_lightning.checks import UserValueError, expect_choice, expect_integer
from glai_lightning.heads.frozen import GLAIHead, freeze_in_place, unfreeze_in_place
from glai_lightning.heads.patterns import layout_of
from glai_lightning.modules.checkpoint_file import DESCRIPTION
from glai_lightning.modules.deployment import predicted_outputs
from glai_lightning.modules.description import describe
from glai_lightning.modules.head_module import OptimizerFactory, SchedulerFactory
from glai_lightning.modules.scored import ScoredModule
from glai_lightning.solvers.head_weights import set_last_layer
from glai_lightning.solvers.report import LinearSolution


class Predictions(NamedTuple):
    """What a classifier says of N inputs.

    Args:
        labels: for each input the name of the likeliest class, or its number where there are no names.
        probabilities: of the classes, (N, C), float32.
    """

    labels: list[str] | list[int]
    probabilities: Tensor


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
        standardise_embeddings: see ``HeadModule``.
        num_classes: number of classes, at least 2; by default the number of outputs of the head.
        task: 'classification' or 'regression'.

    Attributes:
        classes: names of the classes, where the data module of the fit has some; they travel in the checkpoint.

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
        standardise_embeddings: bool = True,
        num_classes: int | None = None,
        task: Literal["classification", "regression"] = "classification",
    ) -> None:
        super().__init__(
            head,
            backbone,
            freeze_backbone=freeze_backbone,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            standardise_embeddings=standardise_embeddings,
        )
        expect_choice("task", task, ("classification", "regression"))
        self.task = task
        outputs = _count_outputs(head) if num_classes is None else num_classes
        expect_integer("num_classes", outputs)
        self.num_classes = outputs
        if task == "classification" and outputs < 2:
            raise UserValueError(f"Expected `num_classes` to be at least 2, but got {outputs}.")
        self.classes: list[str] | None = None
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
        if stage == "fit" and self.task == "classification":
            names = getattr(data, "classes", None)
            self.classes = list(names) if _are_names(names, self.num_classes) else None

    def description(self) -> dict[str, Any]:
        """Return what ``load_from_checkpoint`` makes the module of, task and class names included."""
        return super().description() | {"classes": self.classes, "task": self.task}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take out of a checkpoint what is known of inputs and classes."""
        super().on_load_checkpoint(checkpoint)
        described = checkpoint.get(DESCRIPTION, {})
        task, names = described.get("task", self.task), described.get("classes")
        if task != self.task:
            raise UserValueError(f"Expected the checkpoint of a {self.task}, but got one of a {task}.")
        if names is not None and not _are_names(names, self.num_classes):
            raise UserValueError(
                f"Expected the checkpoint to hold at most {self.num_classes} class names, but got {names!r}."
            )
        self.classes = names

    def feature_map(self) -> nn.Sequential:
        """Return what makes features of inputs as they come, for ``PathStatistics``: preprocessing, backbone and head.

        The head is frozen in place, with output paths, where it is not yet.

        Raises:
            ValueError: if a data module standardised what the backbone is given, which this module does not know, or
                the head cannot be frozen.
        """
        if not isinstance(self.head, GLAIHead):
            freeze_in_place(self.head)
        parts = self.deployed()
        return nn.Sequential(*(part for part in parts.children() if part is not None))

    def set_solution(self, solution: LinearSolution, classes: Sequence[int | str] | None = None) -> None:
        """Put solved weights into the frozen head, which gets an output for each class of the solution.

        Args:
            solution: what ``PathStatistics.solve`` returned, for features of ``feature_map``.
            classes: labels of its outputs. They are kept as names of the classes, unless they are 0, 1, 2 and so on.

        Raises:
            TypeError: if the head is not frozen.
            ValueError: if it has other features. The module is then as it was.
        """
        set_last_layer(self.head, solution)  # type: ignore[arg-type]
        if classes is not None and list(classes) != list(range(len(classes))):
            self.classes = [str(label) for label in classes]
        outputs = layout_of(self.head).num_outputs
        if outputs != self.num_classes and outputs > 1:
            self.num_classes = outputs
            self._set_metrics(self._make_metrics)
            self._described_head = describe(unfreeze_in_place(copy.deepcopy(self.head)))

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

    def predict(self, inputs: Any, batch_size: int = 256) -> "Predictions | Tensor":
        """Predict from inputs as they come: rows that nothing standardised, images or texts.

        Args:
            inputs: rows (N, ...), a tensor, an array or nested lists of numbers; after a fit on a ``TableDataModule`` a
                ``pandas.DataFrame``; for an image backbone a tensor (N, 3, height, width) or a list of images; for a
                text backbone a list of strings.
            batch_size: inputs that are computed at once, at least 1.

        Returns:
            Of a classifier labels and probabilities, of a regression the values (N, C), on the CPU.

        Raises:
            TypeError: if ``inputs`` is not a sequence or a tensor, or ``batch_size`` not an integer.
            ValueError: if there are no inputs, rows have another width or hold no finite numbers.

        Example:
            >>> from glai_lightning import mlp_head
            >>> module = SupervisedModule(mlp_head(4, 8, 3))
            >>> module.predict([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]).probabilities.shape
            torch.Size([2, 3])
        """
        outputs = predicted_outputs(self, inputs, batch_size)
        if self.task == "regression":
            return outputs
        probabilities = outputs.softmax(1)
        numbers = probabilities.argmax(1)
        names = self.classes
        labels = numbers.tolist() if names is None else [names[number] for number in numbers]
        return Predictions(labels, probabilities)


def _are_names(names: object, most: int) -> TypeGuard[list[str]]:
    return isinstance(names, list) and len(names) <= most and all(isinstance(name, str) for name in names)


def _count_outputs(head: nn.Module) -> int:
    try:
        return layout_of(head).num_outputs
    except ValueError as error:
        raise UserValueError(
            f"Expected `num_classes` to be given for a head whose outputs cannot be read, but got None. {error}"
        ) from error
