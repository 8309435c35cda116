"""SimCLRModule: self-supervised contrastive learning with a projection head."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from glai_lightning.checks import UserValueError, expect_integer, expect_number
from glai_lightning.fitting.embedded import Embedded
from glai_lightning.modules.contrastive import NTXentLoss
from glai_lightning.modules.head_module import OptimizerFactory, SchedulerFactory
from glai_lightning.modules.nearest_neighbours import NearestNeighbourAccuracy
from glai_lightning.modules.scored import ScoredModule


class SimCLRModule(ScoredModule):
    """Trains a backbone and its projection head, or the head alone, with the contrastive loss of SimCLR.

    Chen et al. (2020), arXiv 2002.05709: the projections of two views of a sample attract each other, those of other
    samples in the batch repel. The loss is NT-Xent, see :class:`~glai_lightning.modules.contrastive.NTXentLoss`, the
    mean over all pairs of views where there are more than two; under distributed strategies the negatives are gathered
    from all processes, which need batches of the same size. All views go through backbone and head in one call, so that
    BatchNorm sees them together.

    Batches are ``(views, labels)``: views (V, batch, ...) of V >= 2 views of each sample, or a sequence of V tensors
    (batch, ...) as lightly's transforms and PyTorch's collation make them; labels (batch,) or ``None``. Once an epoch
    it logs ``train/loss`` and ``val/loss``.

    ``knn_neighbors`` shows during the fit what the representation is worth: ``val/knn_embeddings`` and
    ``val/knn_projections`` are the leave-one-out accuracy of a k-nearest-neighbour classifier within the validation
    samples. It looks at the first view of each sample: at what the head is given, and at what it returns. It needs
    labels. A test logs the same under ``test/``.

    Args:
        head: the projection head, any module from embeddings (batch, D) to projections (batch, C), such as lightly's
            ``SimCLRProjectionHead`` or ``mlp_head``.
        backbone: any module from a batch of inputs to embeddings, see ``HeadModule``.
        freeze_backbone: see ``HeadModule``; a frozen backbone is for a head on features that are learnt already.
        optimizer: see ``HeadModule``.
        lr_scheduler: see ``HeadModule``.
        standardise_embeddings: see ``HeadModule``.
        temperature: what the cosine similarities are divided by, above 0.
        knn_neighbors: number k of neighbours, at least 1; ``None`` for no classifier.

    Raises:
        TypeError: if ``temperature`` is not a number, or ``knn_neighbors`` not an integer.
        ValueError: if an argument is out of range; in a step, if there are fewer than two views or two samples, views
            differ in shape, or labels are missing.

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
        standardise_embeddings: bool = True,
        temperature: float = 0.5,
        knn_neighbors: int | None = None,
    ) -> None:
        super().__init__(
            head,
            backbone,
            freeze_backbone=freeze_backbone,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            standardise_embeddings=standardise_embeddings,
        )
        expect_number("temperature", temperature, low=0.0, above=True)
        if knn_neighbors is not None:
            expect_integer("knn_neighbors", knn_neighbors, least=1)
        self.temperature = temperature
        self.knn_neighbors = knn_neighbors
        self.ntxent = NTXentLoss(temperature)
        self._set_metrics(self._make_metrics)

    def _make_metrics(self, stage: str) -> dict[str, Metric]:
        if stage == "train" or self.knn_neighbors is None:
            return {}
        names = ("knn_embeddings", "knn_projections")
        return {name: NearestNeighbourAccuracy(self.knn_neighbors) for name in names}

    def loss(self, projections: Tensor) -> Tensor:
        """Return the mean of the contrastive loss over all pairs of views: projections (V, batch, C) -> 0-d."""
        pairs = [self.ntxent(one, other) for one, other in combinations(projections, 2)]
        return torch.stack(pairs).mean()

    def measure(self, batch: Any) -> dict[str, tuple[Any, ...]]:
        """Return what a batch ``(views, labels)`` tells the metrics."""
        views, labels = self._read(batch)
        num_views, samples = views.shape[:2]
        embeddings = self._embed(views, batch)
        projections = self.head(embeddings)
        return {
            "loss": (self.loss(projections.reshape(num_views, samples, -1)), samples),
            "knn_embeddings": (embeddings[:samples], labels),
            "knn_projections": (projections[:samples], labels),
        }

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the embeddings (V, batch, D) of a batch, which are what is used once the head is thrown away."""
        views = _stack(batch[0])
        embeddings = self._embed(views, batch)
        return embeddings.reshape(*views.shape[:2], *embeddings.shape[1:])

    def _embed(self, views: Tensor, batch: Any) -> Tensor:
        flat = views.flatten(0, 1)
        return self.embeddings(Embedded(flat) if isinstance(batch[0], Embedded) else flat)

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
        if labels is None and self.knn_neighbors is not None:
            raise UserValueError(
                "Expected batches with labels for `knn_neighbors`, but got none: leave it at None without labels."
            )
        return views, labels


def _stack(views: Tensor | Embedded | Sequence[Tensor]) -> Tensor:
    views = views.values if isinstance(views, Embedded) else views
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
