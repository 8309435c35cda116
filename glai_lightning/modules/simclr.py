"""SimCLRModule: self-supervised contrastive learning with a projection head."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from glai_lightning.checks import UserValueError
from glai_lightning.modules.head_module import HeadModule, OptimizerFactory, SchedulerFactory
from glai_lightning.modules.nearest_neighbours import NearestNeighbourAccuracy
from glai_lightning.modules.online_probe import OnlineProbe
from glai_lightning.optional import import_optional


class _Outputs(NamedTuple):
    embeddings: Tensor
    projections: Tensor


class SimCLRModule(HeadModule):
    """Trains a backbone and its projection head, or the head alone, with the contrastive loss of SimCLR.

    Chen et al. (2020), arXiv 2002.05709: the projections of two views of a sample attract each other, those of other
    samples in the batch repel. The loss is lightly's ``NTXentLoss``, the mean over all pairs of views where there are
    more than two; under distributed strategies the negatives are gathered from all processes, which need batches of the
    same size. All views go through backbone and head in one call, so that BatchNorm sees them together.

    Batches are ``(views, labels)``: views (V, batch, ...) of V >= 2 views of each sample, or a sequence of V tensors
    (batch, ...) as lightly's transforms and PyTorch's collation make them; labels (batch,) or ``None``. Once an epoch
    it logs ``train/loss`` and ``val/loss``.

    Two evaluations show during the fit what the representation is worth. Both need labels and are off by default. They
    look at the first view of each sample, on what the head is given (the backbone's embeddings) and on what it returns:

    - ``knn_neighbors``: ``val/knn_embeddings`` and ``val/knn_projections``, the leave-one-out accuracy of a
      k-nearest-neighbour classifier within the validation samples;
    - ``probe_classes``: ``val/probe_embeddings`` and ``val/probe_projections``, the accuracy on validation samples of
      linear classifiers that are trained beside the fit and send no gradient back.

    Everything that is logged under ``val/`` is logged under ``test/`` by a test.

    Args:
        head: the projection head, any module from embeddings (batch, D) to projections (batch, C), such as lightly's
            ``SimCLRProjectionHead`` or ``mlp_head``.
        backbone: any module from a batch of inputs to embeddings, see ``HeadModule``.
        freeze_backbone: see ``HeadModule``; a frozen backbone is for a head on features that are learnt already.
        optimizer: see ``HeadModule``.
        lr_scheduler: see ``HeadModule``.
        temperature: what the cosine similarities are divided by, above 0.
        knn_neighbors: number k of neighbours, at least 1; ``None`` for no classifier.
        probe_classes: number of classes, at least 2; ``None`` for no linear probes.

    Raises:
        ModuleNotFoundError: if lightly is not installed.
        ValueError: if an argument is out of range, or there is no Linear in the head to tell the width of the probes;
            in a step, if there are fewer than two views or two samples, views differ in shape, or labels are missing.

    Example:
        >>> import torch
        >>> from glai_lightning import SimCLRModule, mlp_head
        >>> module = SimCLRModule(mlp_head(4, 8, 3, batch_norm=True))
        >>> views = torch.randn(2, 5, 4)
        >>> module.loss(module(views.flatten(0, 1)).unflatten(0, (2, 5))).shape
        torch.Size([])
    """

    def __init__(
        self,
        head: nn.Module,
        backbone: nn.Module | None = None,
        *,
        freeze_backbone: bool = True,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        temperature: float = 0.5,
        knn_neighbors: int | None = None,
        probe_classes: int | None = None,
    ) -> None:
        super().__init__(
            head, backbone, freeze_backbone=freeze_backbone, optimizer=optimizer, lr_scheduler=lr_scheduler
        )
        if not temperature > 0:
            raise UserValueError(f"Expected `temperature` to be above 0, but got {temperature}.")
        if knn_neighbors is not None and knn_neighbors < 1:
            raise UserValueError(f"Expected `knn_neighbors` to be at least 1, but got {knn_neighbors}.")
        if probe_classes is not None and probe_classes < 2:
            raise UserValueError(f"Expected `probe_classes` to be at least 2, but got {probe_classes}.")
        self.temperature = temperature
        self.knn_neighbors = knn_neighbors
        self.probe_classes = probe_classes
        self.ntxent = _make_loss(temperature)
        self.train_loss = MeanMetric()
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_scores, self.test_scores = self._make_scores(), self._make_scores()
        self.probes = nn.ModuleDict()
        if probe_classes is not None:
            for name, width in zip(_Outputs._fields, _count_ends(head), strict=True):
                self.probes[name] = OnlineProbe(width, probe_classes)

    def _make_scores(self) -> nn.ModuleDict:
        scores: dict[str, Metric] = {}
        for name in _Outputs._fields:
            if self.knn_neighbors is not None:
                scores[f"knn_{name}"] = NearestNeighbourAccuracy(self.knn_neighbors)
            if self.probe_classes is not None:
                scores[f"probe_{name}"] = MulticlassAccuracy(self.probe_classes, average="micro")
        return nn.ModuleDict(scores)

    def setup(self, stage: str) -> None:
        """Check that the probes fit the data, where the data module says what it holds."""
        super().setup(stage)
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if self.probe_classes is not None and isinstance(classes, int) and classes > self.probe_classes:
            raise UserValueError(
                f"Expected `probe_classes` to be at least the {classes} classes of the data, "
                f"but got {self.probe_classes}."
            )

    def loss(self, projections: Tensor) -> Tensor:
        """Return the mean of the contrastive loss over all pairs of views: projections (V, batch, C) -> 0-d."""
        pairs = [self.ntxent(one, other) for one, other in combinations(projections, 2)]
        return torch.stack(pairs).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of a batch ``(views, labels)``, and let the probes learn from it."""
        views, labels = self._read(batch)
        first, loss = self._forward_views(views)
        # Not where the step is only run to see what the head is given.
        if self.training:
            for name, probe in self.probes.items():
                assert isinstance(probe, OnlineProbe)
                assert labels is not None
                probe.update(getattr(first, name), labels, self._average)
        self.train_loss.update(loss.detach(), views.shape[1])
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch ``(views, labels)``."""
        self._evaluate(batch, "val", self.val_loss, self.val_scores)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch ``(views, labels)``."""
        self._evaluate(batch, "test", self.test_loss, self.test_scores)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the embeddings (V, batch, D) of a batch, which are what is used once the head is thrown away."""
        views = _stack(batch[0])
        embeddings = self.embeddings(views.flatten(0, 1))
        return embeddings.reshape(*views.shape[:2], *embeddings.shape[1:])

    def _forward_views(self, views: Tensor) -> tuple[_Outputs, Tensor]:
        """Return embeddings and projections of the first views, and the loss of all."""
        num_views, samples = views.shape[:2]
        embeddings = self.embeddings(views.flatten(0, 1))
        projections = self.head(embeddings)
        loss = self.loss(projections.reshape(num_views, samples, -1))
        return _Outputs(embeddings[:samples].detach(), projections[:samples].detach()), loss

    def _evaluate(self, batch: Any, stage: str, mean_loss: MeanMetric, scores: nn.ModuleDict) -> None:
        views, labels = self._read(batch)
        first, loss = self._forward_views(views)
        mean_loss.update(loss, views.shape[1])
        self.log(f"{stage}/loss", mean_loss, on_step=False, on_epoch=True, prog_bar=True)
        for name, score in scores.items():
            assert isinstance(score, Metric)
            kind, _, which = name.partition("_")
            features = getattr(first, which)
            score.update(self.probes[which](features) if kind == "probe" else features, labels)
            self.log(f"{stage}/{name}", score, on_step=False, on_epoch=True, prog_bar=kind == "knn")

    def _read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(batch, tuple | list) or not batch:
            raise UserValueError(f"Expected a batch to be `(views, labels)`, but got `{type(batch).__name__}`.")
        views = _stack(batch[0])
        if len(views) < 2:
            raise UserValueError(f"Expected at least two views of each sample to contrast, but got {len(views)}.")
        if views.shape[1] < 2:
            raise UserValueError(
                "Expected at least two samples in a batch, since the others are what a sample is contrasted with, but "
                "got one: let the loader drop the last batch (`drop_last=True`), or change the batch size."
            )
        labels = batch[1] if len(batch) > 1 else None
        if labels is None and (self.knn_neighbors is not None or self.probe_classes is not None):
            raise UserValueError(
                "Expected batches with labels for `knn_neighbors` and `probe_classes`, but got none: leave both at "
                "None for data without labels."
            )
        return views, labels

    def _average(self, gradient: Tensor) -> Tensor:
        if self._trainer is None:
            return gradient
        averaged: Tensor = self.trainer.strategy.reduce(gradient, reduce_op="mean")
        return averaged


def _stack(views: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(views, Tensor):
        if views.ndim < 3:
            raise UserValueError(
                "Expected views to have the shape (views, samples, ...), or to be a sequence of tensors "
                f"(samples, ...), but got {tuple(views.shape)}."
            )
        return views
    shapes = [tuple(view.shape) for view in views]
    if len(set(shapes)) > 1:
        raise UserValueError(f"Expected all views of a batch to have the same shape, but got {shapes}.")
    return torch.stack(list(views))


def _make_loss(temperature: float) -> nn.Module:
    # `lightly` itself and its utilities import `pytorch_lightning`, a twin of `lightning.pytorch`; these parts do not.
    losses = import_optional("lightly.loss", needed_for="`SimCLRModule`", extra="ssl")
    # One process alone gathers nothing.
    loss: nn.Module = losses.NTXentLoss(temperature, gather_distributed=torch.distributed.is_available())
    return loss


def _count_ends(head: nn.Module) -> tuple[int, int]:
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UserValueError(
            f"Expected a head with a Linear, whose width a linear probe takes, but got `{type(head).__name__}`."
        )
    return linears[0].in_features, linears[-1].out_features
