"""Features and labels in memory, for heads on cached features and for plain tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice
from glai_lightning.datamodules.arrays import (
    Rows,
    Shards,
    Standardisation,
    as_tensor,
    check_finite,
    require_keys,
    selectable,
)
from glai_lightning.datamodules.base import SampleDataModule, Splits, array_reader, expect_one
from glai_lightning.datamodules.feature_cache import fill_cache
from glai_lightning.datamodules.splits import SPLITS, split_samples
from glai_lightning.datamodules.targets import Targets, Task

_REQUIRED_KEYS = ("x_train", "y_train", "x_test", "y_test")
_OPTIONAL_KEYS = ("x_val", "y_val")
#: Bytes up to which rows that are stored otherwise are copied to float32, so that a batch need not be converted.
_CONVERTED_AT_ONCE = 2**27

_Inputs = tuple[Rows, Standardisation | None]


class FeaturesDataModule(SampleDataModule):
    """Labelled features from a file, a folder or arrays, standardised, in batches ``(inputs, targets)``.

    The keys are ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, where the data has validation rows of its own,
    ``x_val``, ``y_val``; others are left alone. Inputs of any shape are flattened, standardised by the mean and
    deviation of the training rows, and converted to float32: at once where that takes at most 128 MiB, otherwise a
    batch at a time, so that arrays take the memory that they have in the file.

    Strings, integers and bools in ``y_...`` are classes. So are floats that number classes: whole numbers from 0 or 1
    on, without a gap. Other floats are values to predict (float32), of shape (N,) or (N, C). ``task`` decides where you
    know better, and so does the ``task`` of the module that is being fitted. Class labels are int64; named classes, and
    those numbered from 1 on, are numbered from 0, and ``classes`` lists them.

    A batch is cut out of the data at once, in the process itself: worker processes would only add copies, whatever
    Lightning's warning about their number says. The order of the training rows follows from (seed, epoch). A
    checkpoint holds the position, so that a fit resumed in the middle of an epoch gets the batches that it would have
    had. Under distributed strategies one process reads each row of an epoch.

    Args:
        path: an ``.npz`` file, which is held in memory; or a folder that holds ``x_train.npy``, or its shards
            ``x_train-00000.npy``, ``x_train-00001.npy``, ..., and likewise the other keys: they are memory-mapped.
            Nothing is unpickled.
        arrays: tensors or numpy arrays by key, instead of ``path``. They are not changed.
        batch_size: rows in a batch, in each process.
        val_fraction: part of ``x_train`` to validate on, in (0, 1), rounded to whole rows; without effect where
            the data has ``x_val``.
        seed: of the validation rows and of the order of the training rows, at least 0.
        task: 'classification' if all targets are classes, 'regression' if all are values; ``None`` to tell by them.
        standardise: whether inputs are standardised.

    Raises:
        TypeError: If an argument is of the wrong type; from :meth:`setup`, if a value in ``arrays`` is.
        ValueError: If both or none of ``path`` and ``arrays`` are given, an argument is out of its range, there
            is no such file, or ``arrays`` lacks keys; from :meth:`setup`, if the file cannot be read or lacks
            keys, shapes do not fit each other, numbers are not finite, labels are out of range, or a split
            would be empty.

    Example:
        >>> import torch
        >>> inputs, labels = torch.rand(50, 4, 4), torch.arange(50) % 5
        >>> arrays = {"x_train": inputs[:40], "y_train": labels[:40]}
        >>> arrays |= {"x_test": inputs[40:], "y_test": labels[40:]}
        >>> data = FeaturesDataModule(arrays=arrays, batch_size=16)
        >>> data.num_features, data.num_classes
        (16, 5)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, inputs.dtype, targets.shape, targets.dtype
        (torch.Size([16, 16]), torch.float32, torch.Size([16]), torch.int64)
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        arrays: Mapping[str, Any] | None = None,
        batch_size: int = 256,
        val_fraction: float = 0.2,
        seed: int = 0,
        task: Task | None = None,
        standardise: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed)
        expect_one(path=path, arrays=arrays)
        if task is not None:
            expect_choice("task", task, ("classification", "regression"))
        if not isinstance(standardise, bool):
            raise UserTypeError(f"Expected `standardise` to be True or False, but got {standardise!r}.")
        self.task = task
        self.standardise = standardise
        self._class_names: list[str] | None = None
        self._read_arrays = array_reader(path, arrays, required=_REQUIRED_KEYS, optional=_OPTIONAL_KEYS)
        self._in_memory = path is not None and Path(path).is_file()

    @classmethod
    def from_backbone(
        cls,
        datamodule: pl.LightningDataModule,
        backbone: nn.Module,
        *,
        cache_dir: str | PathLike[str],
        views: int = 1,
        batch_size: int | None = None,
        standardise: bool = False,
        progress_bar: bool = True,
    ) -> "FeaturesDataModule":
        """Embed the inputs of a data module once, and read the embeddings from disk in every epoch and every fit.

        Embeddings are found by what they were made of: the weights, buffers and settings of the backbone, dtype and
        precision, and the data, by split: the content of tensors, and path, size and time of files. Whatever changes,
        they are computed anew. They are written in shards; after a crash the next call computes those that are missing.
        Processes of a distributed fit share the shards, and several programs may fill one cache.

        Args:
            datamodule: batches ``(inputs, targets)``, of this package or of yours; yours with one loader a split, whose
                dataset has a length and whose sampler draws every sample once.
            backbone: a module from a batch of inputs to embeddings (batch, D), frozen and in eval mode.
            cache_dir: the folder of all caches. Each is a folder in it that ``FeaturesDataModule(path)`` reads, too.
            views: draws of training inputs that are augmented at random; epoch ``e`` reads draw ``e`` modulo ``views``.
            batch_size: rows in a batch, in each process; by default that of the data module.
            standardise: whether embeddings are standardised, by their first draw.
            progress_bar: whether the progress of the backbone is shown.

        Returns:
            A data module with the splits of the other, and of ours with its order.

        Raises:
            TypeError: If an argument is of the wrong type, or data or backbone hold what cannot be looked into.
            ValueError: If the backbone is trainable, in train mode or random, a sampler draws samples twice or leaves
                some out, inputs are augmented at random with one view, or the folder cannot be written to.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from glai_lightning.datamodules import DigitsDataModule
            >>> backbone = nn.Linear(64, 16).requires_grad_(False).eval()
            >>> with TemporaryDirectory() as folder:
            ...     data = FeaturesDataModule.from_backbone(
            ...         DigitsDataModule(), backbone, cache_dir=folder, progress_bar=False
            ...     )
            ...     data.num_features, data.num_classes, len(data.splits["train"])
            (16, 10, 1150)
        """
        folder = fill_cache(datamodule, backbone, cache_dir, views=views, progress_bar=progress_bar)
        size = getattr(datamodule, "batch_size", None) if batch_size is None else batch_size
        seed = getattr(datamodule, "seed", 0)
        data = cls.__new__(cls)
        FeaturesDataModule.__init__(
            data,
            folder,
            batch_size=size if isinstance(size, int) else 256,
            seed=seed if isinstance(seed, int) else 0,
            standardise=standardise,
        )
        keys = (*_OPTIONAL_KEYS, "x_test", "y_test", *(f"x_train_view{view}" for view in range(1, views)))
        data._read_arrays = array_reader(folder, None, required=("x_train", "y_train"), optional=keys)
        data._class_names = getattr(datamodule, "classes", None)
        return data

    @property
    def num_features(self) -> int:
        """Columns of the flattened inputs, D."""
        assert self.splits.num_features is not None
        return self.splits.num_features

    def _read(self) -> Splits:
        module = None if self.trainer is None else self.trainer.lightning_module
        splits = make_splits(
            dict(self._read_arrays()),
            val_fraction=self.val_fraction,
            seed=self.seed,
            task=getattr(module, "task", None) if self.task is None else self.task,
            standardise=self.standardise,
            in_place=self._in_memory,
        )
        return splits if self._class_names is None else replace(splits, classes=self._class_names)


class FeatureRows(Dataset[tuple[Tensor, Tensor]]):
    """Batches ``(inputs, targets)`` of rows, picked a batch at a time instead of one by one and collated.

    Args:
        inputs: rows (N, D), and what makes float32 inputs of those of a batch; ``None`` where they need no change.
        targets: (M, ...), of the rows of ``index``.
        index: which of the inputs are read (M,), int64; ``None`` for all.
        draws: further draws of the inputs, one epoch each in turn.

    Example:
        >>> FeatureRows((Rows([torch.arange(5.0).reshape(5, 1)]), None), torch.arange(5))[torch.tensor([3, 0])]
        (tensor([[3.],
                [0.]]), tensor([3, 0]))
    """

    def __init__(
        self, inputs: _Inputs, targets: Tensor, index: Tensor | None = None, draws: Sequence[_Inputs] = ()
    ) -> None:
        self.targets, self.index, self.draws = targets, index, (inputs, *draws)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of an epoch."""
        self.inputs, self.convert = self.draws[epoch % len(self.draws)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(rows)
        inputs = self.inputs.select(rows if self.index is None else self.index.index_select(0, rows))
        return inputs if self.convert is None else self.convert(inputs), self.targets.index_select(0, rows)


def make_splits(
    arrays: dict[str, Any],
    *,
    val_fraction: float,
    seed: int,
    task: Task | None = None,
    standardise: bool = True,
    in_place: bool = False,
) -> Splits:
    """Check and split labelled arrays, and standardise them by the statistics of the training rows.

    Arguments, errors and the rows of the result are those of :class:`FeaturesDataModule`. ``in_place`` says that the
    arrays may be changed.

    Example:
        >>> arrays = {"x_train": torch.rand(10, 2, 3), "y_train": torch.arange(10) % 3}
        >>> arrays |= {"x_test": torch.rand(4, 2, 3), "y_test": torch.tensor([0, 1, 2, 0])}
        >>> splits = make_splits(arrays, val_fraction=0.2, seed=0)
        >>> splits.train[0].shape, splits.val[0].shape, splits.num_classes
        (torch.Size([8, 6]), torch.Size([2, 6]), 3)
    """
    names = [split for split in SPLITS if f"x_{split}" in arrays or f"y_{split}" in arrays]
    own_validation = "val" in names
    require_keys(arrays, [f"{letter}_{split}" for split in names for letter in "xy"], "`arrays`")
    inputs = {split: _checked_inputs(f"x_{split}", arrays[f"x_{split}"]) for split in names}
    targets = Targets({split: arrays[f"y_{split}"] for split in names}, task)
    for split in names:
        _check_shapes(split, inputs, targets)

    of_split = dict(targets.of_split)
    index: dict[str, Tensor | None] = dict.fromkeys(names)
    if not own_validation:
        chosen = split_samples(len(inputs["train"]), val_fraction=val_fraction, test_fraction=0, seed=seed)
        index |= chosen
        of_split |= {split: of_split["train"][rows] for split, rows in chosen.items()}
    targets.warn_of_rare_classes(of_split["train"], of_split["val"])

    num_features = inputs["train"].shape[1]
    training = None if index["train"] is None else index["train"].sort().values
    convert = Standardisation.fit(inputs["train"], training) if standardise else Standardisation.identity(num_features)
    draws = [_checked_inputs(key, array) for key, array in arrays.items() if key.startswith("x_train_view")]
    if any(draw.shape != inputs["train"].shape for draw in draws):
        raise UserValueError(f"Expected all draws of `x_train` to have the shape {inputs['train'].shape}.")
    prepared = {split: _prepare(inputs[split], convert, in_place=in_place) for split in names}
    prepared = {"val": prepared["train"]} | prepared
    sources = {
        split: FeatureRows(prepared[split], of_split[split], index[split]) for split in SPLITS if split in prepared
    }
    if draws:
        more = [_prepare(draw, convert, in_place=in_place) for draw in draws]
        sources["train"] = FeatureRows(prepared["train"], of_split["train"], index["train"], more)
    return Splits(sources, num_features, targets.num_classes, targets.classes, convert)


def _prepare(rows: Rows, convert: Standardisation, *, in_place: bool) -> _Inputs:
    """Return rows that are standardised and in float32; or as they are, and what a batch of them is to go through."""
    if in_place and rows.dtype == torch.float32:
        (values,) = rows.parts
        return Rows([convert(values, out=values)]), None
    if 4 * rows.shape[0] * rows.shape[1] <= _CONVERTED_AT_ONCE:
        return Rows([convert(rows)]), None
    return rows, None if rows.dtype == torch.float32 and convert.is_identity else convert


def _checked_inputs(key: str, array: Any) -> Rows:
    parts = [as_tensor(key, part) for part in (array if isinstance(array, Shards) else [array])]
    for part in parts:
        if part.ndim < 2 or 0 in part.shape[1:]:
            raise UserValueError(
                f"Expected `{key}` to have the shape (samples, features...), none of them 0, but got "
                f"{tuple(part.shape)}."
            )
        check_finite(key, part)
    filled = [selectable(part).flatten(1) for part in parts if len(part)]
    if not filled:
        raise UserValueError(
            f"Expected `{key}` to have the shape (samples, features...), none of them 0, but got "
            f"{tuple(parts[0].shape)}."
        )
    return Rows(filled)


def _check_shapes(split: str, inputs: Mapping[str, Rows], targets: Targets) -> None:
    (num_rows, num_features), num_targets = inputs[split].shape, len(targets.of_split[split])
    if num_rows != num_targets:
        raise UserValueError(
            f"Expected `x_{split}` and `y_{split}` to be of the same length, but got {num_rows} and {num_targets}."
        )
    if num_features != inputs["train"].shape[1]:
        raise UserValueError(
            f"Expected `x_{split}` to have the {inputs['train'].shape[1]} features of `x_train`,"
            f" but got {num_features}."
        )
