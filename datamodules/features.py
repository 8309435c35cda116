"""Features and labels in memory, for heads on cached features and for plain tables."""

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_number
from glai_lightning.datamodules.arrays import existing_file, read_archive
from glai_lightning.datamodules.checks import check_integer
from glai_lightning.datamodules.loader import BatchLoader, SeededBatchSampler, TensorRows, fit_progress
from glai_lightning.datamodules.splits import (
    OPTIONAL_KEYS,
    REQUIRED_KEYS,
    Splits,
    make_splits,
    require_split_keys,
)


class FeaturesDataModule(pl.LightningDataModule):
    """Labelled features from an ``.npz`` file or from arrays, standardised, in batches ``(inputs, targets)``.

    The keys are ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, where the data has validation rows of its
    own, ``x_val``, ``y_val``; others are left alone. Inputs of any shape are flattened, standardised by the mean
    and deviation of the training rows, and held in float32. Integer (or bool) targets are class labels (int64),
    floating-point ones are values to regress (float32), of shape (N,) or (N, C).

    All data is held in memory, and a batch is cut out of it at once, in the process itself: worker processes
    would only add copies, whatever Lightning's warning about their number says. The order of the training rows
    follows from (seed, epoch). A checkpoint holds the position, so that a fit resumed in the middle of an epoch
    goes on with the batches that it would have had. Under distributed strategies every row is read by one
    process an epoch.

    Args:
        path: the ``.npz`` file; nothing in it is unpickled.
        arrays: tensors or numpy arrays by key, instead of ``path``. They are not changed.
        batch_size: rows in a batch, in each process.
        val_fraction: part of ``x_train`` to validate on, in (0, 1), rounded to whole rows; without effect where
            the data has ``x_val``.
        seed: of the validation rows and of the order of the training rows, at least 0.

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
    ) -> None:
        super().__init__()
        if (path is None) == (arrays is None):
            got = "neither" if path is None else "both"
            raise UserValueError(f"Expected one of `path` and `arrays`, but got {got}.")
        if path is not None:
            read = partial(read_archive, existing_file(path), required=REQUIRED_KEYS, optional=OPTIONAL_KEYS)
            self._read_arrays: Callable[[], Mapping[str, Any]] = read
        else:
            if not isinstance(arrays, Mapping):
                raise UserTypeError(
                    f"Expected `arrays` to be a mapping of arrays by key, but got {type(arrays).__name__}."
                )
            require_split_keys(arrays)
            self._read_arrays = partial(dict, arrays)
        check_integer("batch_size", batch_size, at_least=1)
        check_integer("seed", seed, at_least=0)
        expect_number("val_fraction", val_fraction)
        if not 0 < val_fraction < 1:
            raise UserValueError(f"Expected `val_fraction` to be in (0, 1), but got {val_fraction}.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self._splits: Splits | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and standardise the data; only the first call does.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; all of them need the training rows,
                whose statistics standardise the others.
        """
        _ = self.splits

    @property
    def splits(self) -> Splits:
        """All rows of the three splits as whole tensors, for solvers and other users of more than a batch."""
        if self._splits is None:
            self._splits = make_splits(self._read_arrays(), val_fraction=self.val_fraction, seed=self.seed)
        return self._splits

    @property
    def num_features(self) -> int:
        """Columns of the flattened inputs, D."""
        inputs, _ = self.splits.train
        return inputs.shape[1]

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label in ``y_train``; ``None`` for regression."""
        return self.splits.num_classes

    def train_dataloader(self) -> BatchLoader:
        """Return the training rows, in another order in every epoch."""
        trainer = self.trainer
        progress = partial(fit_progress, trainer) if trainer is not None and trainer.training else None
        return self._loader(
            self.splits.train,
            shuffle_seed=self.seed,
            progress=progress,
        )

    def val_dataloader(self) -> BatchLoader:
        """Return the validation rows, always in the same order."""
        return self._loader(self.splits.val)

    def test_dataloader(self) -> BatchLoader:
        """Return the test rows, in the order of the data."""
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> BatchLoader:
        """Return the test rows, in the order of the data, with their targets."""
        return self._loader(self.splits.test)

    def _loader(
        self,
        rows: tuple[Tensor, Tensor],
        shuffle_seed: int | None = None,
        progress: Callable[[], tuple[int, int]] | None = None,
    ) -> BatchLoader:
        # What Lightning is about to shard the sampler with; None unless the strategy is a distributed one.
        sharding = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        dataset = TensorRows(*rows, batch_size=self.batch_size)
        sampler = SeededBatchSampler(
            len(dataset),
            self.batch_size,
            shuffle_seed=shuffle_seed,
            num_shards=1 if sharding is None else sharding["num_replicas"],
        )
        return BatchLoader(dataset, sampler=sampler, progress=progress)
