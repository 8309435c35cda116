"""Batches of several views of each sample: drawn from views that were computed before, or augmented on the spot."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

from glai_lightning.checks import UserTypeError, UserValueError

ViewBatch = tuple[Tensor, Tensor | None]


class _ViewBatches:
    """What both kinds have in common: their rows, and the epoch that the draws depend on."""

    def __init__(self, num_rows: int, num_views: int, seed: int, *, varied: bool, batch_size: int) -> None:
        self.num_rows = num_rows
        self.num_views = num_views
        self.seed = seed
        self.varied = varied
        self.batch_size = batch_size
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of an epoch, if they vary; the same for a row in whichever batch or process it is read."""
        self.epoch = epoch if self.varied else 0

    def in_batches(self, sampler: Sampler[int]) -> Iterable[Any]:
        """Cut the single rows that a sampler names into batches."""
        return BatchSampler(sampler, self.batch_size, drop_last=False)


class CachedViews(_ViewBatches):
    """Batches ``(views, labels)`` out of views in memory: for each row, some of its views.

    Args:
        views: all views, (V, N, ...).
        labels: classes (N,), or ``None``.
        num_views: views in a batch, at most V.
        seed: of the draw of views.
        varied: whether they are drawn for each row anew in every epoch; the first views otherwise.
        batch_size: rows in a batch, for samplers that name single rows.

    Example:
        >>> batches = CachedViews(
        ...     torch.arange(8.0).reshape(2, 4, 1), torch.arange(4), num_views=2, seed=0, varied=False, batch_size=2
        ... )
        >>> views, labels = batches[torch.tensor([3, 0])]
        >>> views.squeeze(-1), labels
        (tensor([[3., 0.],
                [7., 4.]]), tensor([3, 0]))
    """

    def __init__(
        self, views: Tensor, labels: Tensor | None, *, num_views: int, seed: int, varied: bool, batch_size: int
    ) -> None:
        self.views = views
        self.labels = labels
        super().__init__(views.shape[1], num_views, seed, varied=varied, batch_size=batch_size)

    def replace_views(self, views: Tensor) -> "CachedViews":
        """Return batches of other views (V, N, ...) of the same samples, drawn alike."""
        return CachedViews(
            views,
            self.labels,
            num_views=self.num_views,
            seed=self.seed,
            varied=self.varied,
            batch_size=self.batch_size,
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of an epoch, if they vary."""
        super().set_epoch(epoch)
        available = len(self.views)
        self._drawn: Tensor | None = None
        if self.varied and self.num_views < available:
            seeds = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, 1))
            keys = np.random.default_rng(seeds).random((self.num_rows, available))
            self._drawn = torch.from_numpy(keys.argsort(1)[:, : self.num_views].T.copy())

    def __getitem__(self, rows: Tensor | list[int]) -> ViewBatch:
        """Return views (num_views, batch, ...) and labels (batch,), or ``None``, of some rows."""
        index = torch.as_tensor(rows)
        labels = None if self.labels is None else self.labels.index_select(0, index)
        if self._drawn is None:
            return self.views[: self.num_views].index_select(1, index), labels
        flat = self._drawn.index_select(1, index) * self.num_rows + index
        views = self.views.flatten(0, 1).index_select(0, flat.flatten())
        return views.view(*flat.shape, *views.shape[1:]), labels


class AugmentedViews(_ViewBatches):
    """Batches ``(views, labels)`` of samples that are augmented when they are read.

    The random numbers of an augmentation, whether it takes them from PyTorch, numpy or Python, follow from the seed,
    the epoch and the sample alone. So views do not depend on the number of processes and workers, and a resumed fit
    sees what the uninterrupted one does. Generators outside are left as they were.

    Args:
        dataset: a dataset with an index, of samples or of (sample, label, ...).
        rows: which of its samples these are.
        transform: makes the views of a sample: a sequence of tensors of one shape, as lightly's transforms return, or a
            single tensor, and then it is applied ``num_views`` times.
        num_views: views in a batch.
        seed: of the augmentation.
        varied: whether the views are others in every epoch.
        batch_size: rows in a batch, for samplers that name single rows.

    Raises:
        ValueError: from ``[]``, if the transform returns another number of views, or views of different sizes, or ones
            that are not finite.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        rows: Tensor,
        transform: Callable[[Any], Any],
        *,
        num_views: int,
        seed: int,
        varied: bool,
        batch_size: int,
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.transform = transform
        super().__init__(len(rows), num_views, seed, varied=varied, batch_size=batch_size)

    def __getitem__(self, rows: Tensor | list[int]) -> ViewBatch:
        """Return views (num_views, batch, ...) and labels (batch,), or ``None``, of some rows."""
        with isolate_rng(include_cuda=False):
            samples = [self._read(int(self.rows[row])) for row in torch.as_tensor(rows)]
        shapes = {tuple(view.shape) for views, _ in samples for view in views}
        if len(shapes) > 1:
            raise UserValueError(
                f"Expected all that `transform` returns to have the same shape, but got {sorted(shapes)}."
            )
        views = torch.stack([torch.stack(list(views)) for views, _ in samples], dim=1)
        if samples[0][1] is None:
            return views, None
        return views, torch.tensor([int(label) for _, label in samples])

    def _read(self, index: int) -> tuple[Sequence[Tensor], Any]:
        item = self.dataset[index]
        sample, label = (item[0], item[1]) if isinstance(item, tuple | list) and len(item) > 1 else (item, None)
        if isinstance(item, tuple | list) and len(item) == 1:
            sample = item[0]
        _seed(self.seed, self.epoch, index)
        views = self.transform(sample)
        if isinstance(views, Tensor):
            views = [views, *(self.transform(sample) for _ in range(self.num_views - 1))]
        if len(views) != self.num_views:
            raise UserValueError(
                f"Expected `transform` to return `num_views` ({self.num_views}) views of a sample, or one tensor, "
                f"but got {len(views)}."
            )
        for view in views:
            if not isinstance(view, Tensor):
                raise UserTypeError(f"Expected `transform` to return tensors, but got `{type(view).__name__}`.")
            if not view.isfinite().all():
                raise UserValueError(
                    f"Expected finite views, but got NaN or infinite numbers in one of sample {index}."
                )
        return views, label


def _seed(seed: int, epoch: int, index: int) -> None:
    """Seed the generators that augmentations draw from, but not those of accelerators."""
    words = np.random.SeedSequence(seed, spawn_key=(epoch, index)).generate_state(3)
    torch.default_generator.manual_seed(int(words[0]))
    np.random.seed(words[1])
    random.seed(int(words[2]))
