"""Several views of each sample, for contrastive learning: cached features, or images augmented when they are read."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer
from glai_lightning.datamodules.arrays import Standardisation, as_tensor, check_finite, read_folder
from glai_lightning.datamodules.base import (
    Splits,
    array_reader,
    expect_callable,
    expect_dataset,
    expect_one,
)
from glai_lightning.datamodules.cached import CachingDataModule
from glai_lightning.datamodules.feature_cache import fill_cache
from glai_lightning.datamodules.loader import EqualBatchSampler
from glai_lightning.datamodules.tasksets import seed_generators
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.path_activations import cache_path_activations

_Batch = tuple[Tensor, Tensor | None]


class ViewsDataModule(CachingDataModule):
    """Batches ``(views, labels)``: views (num_views, batch, ...) of each sample, labels (batch,) or ``None``.

    Views come from one of two sources:

    - *cached*: an ``.npz`` file or arrays with ``views`` of shape (V, N, ...), V views of each of N samples, and
      optionally labels ``y`` (N,). They are standardised column by column with the statistics of the training samples
      and held in float32. Where there are more than ``num_views``, each sample is seen through some that are drawn anew
      in every epoch;
    - *live*: a dataset with a transform. Each sample is augmented when it is read, in ``num_workers`` processes.
      ``lightly.transforms.SimCLRTransform`` is a transform for images; its views are taken as they come.

    Training, validation and test samples are split by the seed. Order, draw and augmentation of the training samples
    follow from the seed and the epoch, and a checkpoint holds the position, so that a fit resumed in the middle of an
    epoch gets what it would have had. Validation and test samples are always seen through the same views.

    A contrastive loss compares the samples of a batch. So the sizes of batches differ by one sample at most, and none
    is larger than ``batch_size``. Under distributed strategies a batch has the same size in all processes, and an epoch
    leaves out fewer samples than it has batches, others in every epoch.

    Args:
        path: the ``.npz`` file; nothing in it is unpickled.
        arrays: tensors or numpy arrays by key, instead of ``path``. They are not changed.
        dataset: anything with ``len`` and ``[]``, of samples or of (sample, label), instead of ``path``.
        transform: for a dataset: from a sample to its views, a sequence of tensors, or to one view, a tensor, and then
            it is applied ``num_views`` times.
        batch_size: most samples in a batch, in each process, at least 2.
        num_views: views of a sample in a batch, at least 2.
        val_fraction: part of the samples to validate on, in (0, 1), rounded to whole samples.
        test_fraction: part of the samples to test on, in [0, 1).
        seed: of the splits, of the order, and of draw and augmentation, at least 0.
        num_workers: processes that augment samples of a dataset ahead; 0 for none.
        cache: for a dataset and a module with a frozen backbone: folder for the embeddings of ``cached_views`` views of
            each training sample, which are then all that it is seen through, and of the ``num_views`` of each other.
            The backbone sees each of them once, whatever the number of epochs and fits, see ``docs/one_pass.md``. They
            are held in memory. ``None`` to augment and embed anew in every epoch.
        cached_views: a multiple of ``num_views``, at least twice as many.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If not exactly one of ``path``, ``arrays`` and ``dataset`` is given, a dataset comes without a
            transform or the reverse, or an argument is out of its range; from :meth:`setup`, if the file cannot be read
            or lacks ``views``, shapes do not fit each other, there are fewer than ``num_views`` views, numbers are not
            finite, or a split has fewer than two samples.

    Example:
        >>> data = ViewsDataModule(arrays={"views": torch.rand(4, 50, 6), "y": torch.arange(50) % 5}, batch_size=16)
        >>> data.num_features, data.num_classes
        (6, 5)
        >>> views, labels = next(iter(data.train_dataloader()))
        >>> views.shape, labels.shape
        (torch.Size([2, 14, 6]), torch.Size([14]))
    """

    sampler_class = EqualBatchSampler
    smallest_batch = 2

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        arrays: Mapping[str, Any] | None = None,
        # Without its parameter, because jsonargparse takes no subclass of a generic alias.
        dataset: Dataset | None = None,  # type: ignore[type-arg]
        transform: Callable[[Any], Any] | None = None,
        batch_size: int = 256,
        num_views: int = 2,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        cache: str | PathLike[str] | None = None,
        cached_views: int = 8,
    ) -> None:
        super().__init__(
            cache=cache,
            batch_size=batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            num_workers=num_workers,
        )
        source = expect_one(path=path, arrays=arrays, dataset=dataset)
        if (dataset is None) != (transform is None):
            raise UserValueError(
                "Expected `transform` to come with a `dataset`, and a `dataset` with a `transform` that makes its "
                f"views, but got {'no' if transform is None else 'a'} transform with `{source}`."
            )
        expect_dataset(dataset)
        expect_callable("transform", transform)
        expect_integer("num_views", num_views, least=2)
        if cache is not None and dataset is None:
            raise UserValueError("Expected `cache` to come with a `dataset`, but got views that are cached already.")
        if cache is not None and (cached_views < 2 * num_views or cached_views % num_views):
            raise UserValueError(
                f"Expected `cached_views` to be a multiple of `num_views` ({num_views}), at least {2 * num_views}, but "
                f"got {cached_views}."
            )
        if dataset is None:
            self._read_arrays = array_reader(path, arrays, required=("views",), optional=("y",))
        self.dataset = dataset
        self.transform = transform
        self.num_views = num_views
        self.cached_views = cached_views

    def fill(self, backbone: nn.Module) -> Path:
        """Compute the embeddings of views that the cache does not hold yet, and return the folder of this one.

        Args:
            backbone: a module from a batch of inputs to embeddings (batch, D), frozen and in eval mode.

        Raises:
            ValueError: if there is no ``cache``, the backbone is not frozen, or the folder cannot be written to.
        """
        if self.cache is None:
            raise UserValueError("Expected `cache` of the data module to be a folder, but got None.")
        twin = copy(self)
        twin.trainer = None
        sources = {split: _SamplesFirst(views) for split, views in self.splits.items()}
        twin._splits = replace(self.splits, sources=sources)
        each_view = _EachView(backbone).train(backbone.training)
        return fill_cache(twin, each_view, self.cache, views=self.cached_views // self.num_views)

    def _embed(self, backbone: nn.Module) -> Mapping[str, Any]:
        draws = {"train": [f"x_train_view{draw}" for draw in range(1, self.cached_views // self.num_views)]}
        keys = {split: [f"x_{split}", *draws.get(split, [])] for split, _ in self.splits.items()}
        needed = (*(key for names in keys.values() for key in names), *(f"y_{split}" for split in keys))
        arrays = {
            key: np.concatenate(parts) for key, parts in read_folder(self.fill(backbone), required=needed).items()
        }
        rows = {}
        for split, names in keys.items():
            views = [torch.unflatten(torch.from_numpy(arrays[name]).float(), 1, (self.num_views, -1)) for name in names]
            labels = torch.from_numpy(arrays[f"y_{split}"])
            rows[split] = CachedViews(
                torch.cat(views, 1).transpose(0, 1).contiguous(),
                None if bool((labels < 0).any()) else labels,
                **self._draw(split),
            )
        return rows

    def path_activations(self, head: GLAIHead) -> "ViewsDataModule":
        """Return the same samples as a frozen head sees them: each cached view through its inner layers, once for all.

        Training ``output_layers(head)`` on the result trains the head, and a step costs the last layer only::

            layers = SimCLRModule(output_layers(module.head))
            Trainer(max_epochs=20).fit(layers, data.path_activations(module.head))

        Args:
            head: a head frozen with output paths, on these views.

        Returns:
            A data module with the same splits, order and draw of views, and views (V, N, H) in memory.

        Raises:
            ValueError: if the views are not cached features.
        """
        if self.num_features is None:
            raise UserValueError("Expected cached features to compute path activations of, but got images.")
        sources = {
            split: views.replace_views(cache_path_activations(head, views.views))
            for split, views in self.splits.items()
        }
        twin = copy(self)
        twin.trainer = None
        twin._splits = replace(self.splits, sources=sources, num_features=head.layout.output.in_features)
        return twin

    def _read(self) -> Splits:
        return self._read_cached() if self.dataset is None else self._read_live(self.dataset)

    def _read_live(self, dataset: Any) -> Splits:
        assert self.transform is not None
        classes = getattr(dataset, "classes", None)
        sources = {
            split: AugmentedViews(dataset, rows, self.transform, **self._draw(split))
            for split, rows in self._split(len(dataset)).items()
        }
        return Splits(sources, num_classes=None if classes is None else len(classes))

    def _read_cached(self) -> Splits:
        arrays = self._read_arrays()
        views = as_tensor("views", arrays["views"])
        if views.ndim < 3 or views.numel() == 0:
            raise UserValueError(
                f"Expected `views` to have the shape (views, samples, features...), none of them 0, but got "
                f"{tuple(views.shape)}."
            )
        if len(views) < self.num_views:
            raise UserValueError(f"Expected `views` to hold at least {self.num_views} views, but got {len(views)}.")
        check_finite("views", views)
        labels = _check_labels(as_tensor("y", arrays["y"]), views.shape[1]) if "y" in arrays else None
        rows = self._split(views.shape[1])
        columns = views.flatten(2)
        standardise = Standardisation.fit(columns[:, rows["train"]].flatten(0, 1))
        sources = {
            split: CachedViews(
                standardise(columns[:, chosen].flatten(0, 1)).view(len(views), len(chosen), *views.shape[2:]),
                None if labels is None else labels[chosen],
                **self._draw(split),
            )
            for split, chosen in rows.items()
        }
        num_features = views.shape[2] if views.ndim == 3 else None
        num_classes = None if labels is None else int(labels.max()) + 1
        return Splits(sources, num_features, num_classes, standardisation=standardise)

    def _draw(self, split: str) -> dict[str, Any]:
        return {"num_views": self.num_views, "seed": self.seed, "varied": split == "train"}


class _Views(Dataset[_Batch]):
    """Batches whose views may vary from epoch to epoch."""

    def __init__(self, num_rows: int, *, num_views: int, seed: int, varied: bool) -> None:
        self.num_rows = num_rows
        self.num_views = num_views
        self.seed = seed
        self.varied = varied
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of an epoch, if they vary; a row has the same ones in whatever batch or process."""
        self.epoch = epoch if self.varied else 0


class CachedViews(_Views):
    """Batches ``(views, labels)`` of views (V, N, ...) in memory: for each row, ``num_views`` of its views.

    They are drawn for each row anew in every epoch if they are ``varied``, and are the first ones otherwise.

    Example:
        >>> views = torch.arange(8.0).reshape(2, 4, 1)
        >>> batches = CachedViews(views, torch.arange(4), num_views=2, seed=0, varied=False)
        >>> views, labels = batches[torch.tensor([3, 0])]
        >>> views.squeeze(-1), labels
        (tensor([[3., 0.],
                [7., 4.]]), tensor([3, 0]))
    """

    def __init__(self, views: Tensor, labels: Tensor | None, *, num_views: int, seed: int, varied: bool) -> None:
        self.views = views
        self.labels = labels
        super().__init__(views.shape[1], num_views=num_views, seed=seed, varied=varied)

    def replace_views(self, views: Tensor) -> "CachedViews":
        """Return batches of other views (V, N, ...) of the same samples, drawn alike."""
        return CachedViews(views, self.labels, num_views=self.num_views, seed=self.seed, varied=self.varied)

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of an epoch, if they vary."""
        super().set_epoch(epoch)
        available = len(self.views)
        self._drawn: Tensor | None = None
        if self.varied and self.num_views < available:
            seeds = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, 1))
            keys = np.random.default_rng(seeds).random((self.num_rows, available))
            self._drawn = torch.from_numpy(keys.argsort(1)[:, : self.num_views].T.copy())

    def __getitem__(self, rows: Tensor | list[int]) -> _Batch:
        """Return views (num_views, batch, ...) and labels (batch,), or ``None``, of some rows."""
        index = torch.as_tensor(rows)
        labels = None if self.labels is None else self.labels.index_select(0, index)
        if self._drawn is None:
            return self.views[: self.num_views].index_select(1, index), labels
        flat = self._drawn.index_select(1, index) * self.num_rows + index
        views = self.views.flatten(0, 1).index_select(0, flat.flatten())
        return views.view(*flat.shape, *views.shape[1:]), labels


class AugmentedViews(_Views):
    """Batches ``(views, labels)`` of samples that are augmented when they are read.

    The random numbers of an augmentation, whether it takes them from PyTorch, numpy or Python, follow from the seed,
    the epoch and the sample alone. So views do not depend on the number of processes and workers, and a resumed fit
    sees what the uninterrupted one does. Generators outside are left as they were.

    ``dataset`` holds samples, or (sample, label, ...); ``rows`` says which of them to read. ``transform`` makes the
    views of a sample: a sequence of tensors of one shape, as lightly's transforms return, or a single tensor, and then
    it is applied ``num_views`` times. Views that do not fit, or are not finite, raise ``ValueError``.
    """

    def __init__(
        self,
        dataset: Any,
        rows: Tensor,
        transform: Callable[[Any], Any],
        *,
        num_views: int,
        seed: int,
        varied: bool,
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.transform = transform
        super().__init__(len(rows), num_views=num_views, seed=seed, varied=varied)

    def __getitem__(self, rows: Tensor | list[int]) -> _Batch:
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
        seed_generators(self.seed, (self.epoch, index))
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


class _SamplesFirst(Dataset[tuple[Tensor, Tensor]]):
    """Batches of views (batch, num_views, ...), and of labels, -1 where there are none."""

    def __init__(self, views: AugmentedViews) -> None:
        self.views = views

    def set_epoch(self, epoch: int) -> None:
        self.views.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, rows: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        views, labels = self.views[rows]
        return views.transpose(0, 1), torch.full((views.shape[1],), -1) if labels is None else labels


class _EachView(nn.Module):
    """A backbone on views (batch, num_views, ...), its embeddings of a sample side by side: (batch, num_views * D)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, views: Tensor) -> Tensor:
        return self.backbone(views.flatten(0, 1)).reshape(len(views), -1)  # type: ignore[no-any-return]


def _check_labels(labels: Tensor, num_samples: int) -> Tensor:
    if labels.shape != (num_samples,) or labels.is_floating_point():
        raise UserValueError(
            f"Expected `y` to hold an integer for each of the {num_samples} samples in `views`, but got "
            f"{tuple(labels.shape)} of {labels.dtype}."
        )
    if labels.min() < 0:
        raise UserValueError(f"Expected `y` to hold class labels of at least 0, but got {int(labels.min())}.")
    return labels.to(torch.int64, copy=True)
