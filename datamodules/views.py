"""Several views of each sample, for contrastive learning: cached features, or images augmented on the spot."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from glai_lightning.checks import UserValueError
from glai_lightning.datamodules.arrays import existing_file, read_archive, require_keys
from glai_lightning.datamodules.checks import as_tensor, check_finite, check_integer
from glai_lightning.datamodules.loader import EqualBatchSampler
from glai_lightning.datamodules.split_loading import SplitDataModule
from glai_lightning.datamodules.splits import split_samples
from glai_lightning.datamodules.standardisation import Standardisation
from glai_lightning.datamodules.view_batches import AugmentedViews, CachedViews
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.path_activations import cache_path_activations


class ViewsDataModule(SplitDataModule):
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
    epoch goes on with what it would have had. Validation and test samples are always seen through the same views.

    A contrastive loss compares the samples of a batch. So batches are of equal size, up to one sample: as many as it
    takes for none to be larger than ``batch_size``. Under distributed strategies a batch has the same size in all
    processes, and fewer samples than there are batches are left out of an epoch, others in every one.

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

    # A contrastive loss compares the samples of a batch.
    sampler_class = EqualBatchSampler
    smallest_batch = 2

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        arrays: Mapping[str, Any] | None = None,
        dataset: Dataset[Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        batch_size: int = 256,
        num_views: int = 2,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            num_workers=num_workers,
        )
        given = [n for n, v in (("path", path), ("arrays", arrays), ("dataset", dataset)) if v is not None]
        if len(given) != 1:
            got = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise UserValueError(f"Expected one of `path`, `arrays` and `dataset`, but got {got}.")
        if (dataset is None) != (transform is None):
            raise UserValueError(
                "Expected `transform` to come with a `dataset`, and a `dataset` with a `transform` that makes its "
                f"views, but got {'no' if transform is None else 'a'} transform with `{given[0]}`."
            )
        check_integer("num_views", num_views, at_least=2)
        if path is not None:
            read = partial(read_archive, existing_file(path), required=("views",), optional=("y",))
            self._read_arrays: Callable[[], Mapping[str, Any]] = read
        elif arrays is not None:
            require_keys(arrays, ("views",), "`arrays`")
            self._read_arrays = partial(dict, arrays)
        self.dataset = dataset
        self.transform = transform
        self.num_views = num_views
        self._splits: dict[str, AugmentedViews | CachedViews] | None = None
        self._num_features: int | None = None
        self._num_classes: int | None = None

    @property
    def splits(self) -> Mapping[str, AugmentedViews | CachedViews]:
        """The samples of ``train`` and ``val``, and of ``test`` where there are some, in the order of the data."""
        if self._splits is None:
            self._splits = self._make_cached() if self.dataset is None else self._make_live(self.dataset)
        return self._splits

    @property
    def num_features(self) -> int | None:
        """Columns of cached features; ``None`` for images, which may be of any size."""
        self.setup()
        return self._num_features

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label of cached views, or the ``classes`` of a dataset; ``None`` if not known."""
        self.setup()
        return self._num_classes

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
        twin = copy(self)
        twin.trainer = None
        twin._splits = {}
        for split, batches in self.splits.items():
            if not isinstance(batches, CachedViews) or batches.views.ndim != 3:
                raise UserValueError("Expected cached features to compute path activations of, but got images.")
            twin._splits[split] = batches.replace_views(cache_path_activations(head, batches.views))
        twin._num_features = head.layout.output.in_features
        return twin

    def _split(self, num_samples: int) -> dict[str, Tensor]:
        return split_samples(
            num_samples, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed, at_least=2
        )

    def _make_live(self, dataset: Dataset[Any]) -> dict[str, AugmentedViews | CachedViews]:
        assert self.transform is not None
        classes = getattr(dataset, "classes", None)
        num_samples = len(dataset)  # type: ignore[arg-type]
        self._num_classes = None if classes is None else len(classes)
        return {
            split: AugmentedViews(
                dataset,
                rows,
                self.transform,
                num_views=self.num_views,
                seed=self.seed,
                varied=split == "train",
                batch_size=self.batch_size,
            )
            for split, rows in self._split(num_samples).items()
        }

    def _make_cached(self) -> dict[str, AugmentedViews | CachedViews]:
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
        self._num_features = views.shape[2] if views.ndim == 3 else None
        self._num_classes = None if labels is None else int(labels.max()) + 1
        rows = self._split(views.shape[1])
        columns = views.flatten(2)
        standardise = Standardisation.fit(columns[:, rows["train"]].flatten(0, 1))
        return {
            split: CachedViews(
                standardise(columns[:, chosen].flatten(0, 1)).view(len(views), len(chosen), *views.shape[2:]),
                None if labels is None else labels[chosen],
                num_views=self.num_views,
                seed=self.seed,
                varied=split == "train",
                batch_size=self.batch_size,
            )
            for split, chosen in rows.items()
        }


def _check_labels(labels: Tensor, num_samples: int) -> Tensor:
    if labels.shape != (num_samples,) or labels.is_floating_point():
        raise UserValueError(
            f"Expected `y` to hold an integer for each of the {num_samples} samples in `views`, but got "
            f"{tuple(labels.shape)} of {labels.dtype}."
        )
    if labels.min() < 0:
        raise UserValueError(f"Expected `y` to hold class labels of at least 0, but got {int(labels.min())}.")
    return labels.to(torch.int64, copy=True)
