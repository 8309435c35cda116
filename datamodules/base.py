"""What all data modules share: the data is read once, and loaders can be resumed in the middle of an epoch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer
from glai_lightning.datamodules.arrays import Standardisation, check_arrays, existing_file, read_archive, read_folder
from glai_lightning.datamodules.loader import BatchLoader, SeededBatchSampler, fit_progress
from glai_lightning.datamodules.splits import check_fractions, split_samples
from glai_lightning.fitting.messages import hide_warnings, unhide_warnings


@dataclass(frozen=True)
class Splits(Mapping[str, Any]):
    """Data that is ready to train on: ``splits["train"][rows]`` is a batch of training samples.

    Args:
        sources: what makes the batches of 'train' and 'val', and of 'test' where there are test samples.
        num_features: columns of an input (D,); ``None`` for inputs of another shape.
        num_classes: outputs that a classifier needs; ``None`` for regression, and where it is not known.
        classes: names of the classes in the order of their labels, where they have names.
        standardisation: what was done to the inputs, to do the same to new ones.
    """

    sources: Mapping[str, Any]
    num_features: int | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    standardisation: Standardisation | None = None

    def __getitem__(self, split: str) -> Any:
        return self.sources[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def train(self) -> Any:
        """All training samples as one batch."""
        return self._whole("train")

    @property
    def val(self) -> Any:
        """All validation samples as one batch."""
        return self._whole("val")

    @property
    def test(self) -> Any:
        """All test samples as one batch."""
        return self._whole("test")

    def _whole(self, split: str) -> Any:
        return self[split][torch.arange(len(self[split]))]


#: Lightning's warning of loaders without workers, which slicing arrays has no use for.
_FEW_WORKERS = r"The '\w+' does not have many workers"


class QuietDataModule(pl.LightningDataModule):
    """A data module whose loaders need no workers: Lightning does not warn that there are none."""

    def setup(self, stage: str | None = None) -> None:
        """Hide the warning."""
        hide_warnings(_FEW_WORKERS)

    def teardown(self, stage: str | None = None) -> None:
        """Show such warnings again."""
        unhide_warnings(_FEW_WORKERS)


class BaseDataModule(QuietDataModule):
    """Resumable loaders over the splits that a subclass reads.

    The order of the training samples follows from (seed, epoch). A checkpoint holds the position in it, so that a fit
    resumed in the middle of an epoch gets the batches that it would have had. Under distributed strategies one process
    reads each sample of an epoch.

    Args:
        seed: of whatever is drawn, at least 0.
    """

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        expect_integer("seed", seed, least=0)
        self.seed = seed
        self._splits: Splits | None = None

    def _read(self) -> Splits:
        """Read, check and split the data."""
        raise NotImplementedError

    def _loader_options(self, split: str, sharding: Mapping[str, int]) -> dict[str, Any]:
        """Return the sampler of a split, and other arguments of its loader; ``sharding`` says among how many."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the data; only the first call does.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; all of them need the training samples,
                whose statistics standardise the others.
        """
        super().setup(stage)
        _ = self.splits

    @property
    def splits(self) -> Splits:
        """The samples of 'train' and 'val', and of 'test' where there are some; read when first asked for."""
        if self._splits is None:
            self._splits = self._read()
        return self._splits

    @property
    def num_features(self) -> int | None:
        """Columns of an input (D,); ``None`` for inputs of another shape, such as images."""
        return self.splits.num_features

    def train_dataloader(self) -> BatchLoader:
        """Return the training samples, in another order in every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> BatchLoader:
        """Return the validation samples, always in the same order."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Return the test samples, always in the same order, or no loader where there are none."""
        return self._loader("test") if "test" in self.splits else []

    def predict_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Return the test samples with their targets, or no loader where there are none."""
        return self.test_dataloader()

    def _rows_of(self, split: str) -> Any:
        """Return what makes the batches of the loader of a split."""
        return self.splits[split]

    def _loader(self, split: str) -> BatchLoader:
        trainer: Any = self.trainer
        # What Lightning is about to shard the sampler with; None unless the strategy is a distributed one.
        sharding = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {}
        fitting = split == "train" and trainer is not None and trainer.training
        progress = partial(fit_progress, trainer) if fitting else None
        return BatchLoader(self._rows_of(split), progress=progress, **self._loader_options(split, sharding))


class SampleDataModule(BaseDataModule):
    """Batches of samples, of which parts are for validation and for testing.

    Args:
        batch_size: samples in a batch, in each process.
        val_fraction: part of the samples to validate on, in (0, 1), rounded to whole samples.
        test_fraction: part of the samples to test on, in [0, 1 - ``val_fraction``), 0 for no test.
        seed: of the splits and of the order, at least 0.
        num_workers: processes that make batches ahead; 0 for none.

    Attributes:
        sampler_class: what cuts the samples of a split into batches.
        smallest_batch: samples that a batch has at least.
    """

    sampler_class: type[SeededBatchSampler] = SeededBatchSampler
    smallest_batch: int = 1

    def __init__(
        self, *, batch_size: int, val_fraction: float, test_fraction: float = 0.0, seed: int, num_workers: int = 0
    ) -> None:
        super().__init__(seed=seed)
        expect_integer("batch_size", batch_size, least=self.smallest_batch)
        expect_integer("num_workers", num_workers, least=0)
        check_fractions(val_fraction, test_fraction)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.num_workers = num_workers

    @property
    def num_classes(self) -> int | None:
        """Outputs that a classifier needs; ``None`` for regression, and where it is not known."""
        return self.splits.num_classes

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of their labels, where they have names."""
        return self.splits.classes

    def _split(self, num_samples: int, **fractions: float) -> dict[str, Tensor]:
        """Return the numbers of the samples of each split, ascending."""
        parts = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction} | fractions
        rows = split_samples(num_samples, seed=self.seed, at_least=self.smallest_batch, **parts)
        return {split: chosen.sort().values for split, chosen in rows.items()}

    def _loader_options(self, split: str, sharding: Mapping[str, int]) -> dict[str, Any]:
        sampler = self.sampler_class(
            len(self.splits[split]),
            self.batch_size,
            shuffle_seed=self.seed if split == "train" else None,
            num_shards=sharding.get("num_replicas", 1),
        )
        return {"sampler": sampler, "rows_per_batch": self.batch_size, "num_workers": self.num_workers}


def expect_callable(name: str, value: object) -> None:
    """Raise ``TypeError`` unless an argument can be called, or is ``None``."""
    if value is not None and not callable(value):
        raise UserTypeError(f"Expected `{name}` to be a function or another callable, but got {value!r}.")


def expect_dataset(value: Any) -> None:
    """Raise ``TypeError`` unless `dataset` is a map-style dataset, or ``None``."""
    indexed = hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, Mapping | type)
    if value is not None and not indexed:
        raise UserTypeError(
            f"Expected `dataset` to be a map-style dataset, with a length and numbered samples, but got {value!r}."
        )


def expect_one(**sources: object) -> str:
    """Return the name of the one argument that is not ``None``, raising ``ValueError`` unless it is one."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        *others, last = (f"`{name}`" for name in sources)
        raise UserValueError(
            f"Expected one of {', '.join(others)} and {last}, "
            f"but got {' and '.join(f'`{name}`' for name in given) or 'none'}."
        )
    return given[0]


def array_reader(
    path: str | PathLike[str] | None, arrays: Any, *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> Callable[[], Mapping[str, Any]]:
    """Return what reads the arrays of one of two arguments, raising ``ValueError`` for what can be seen at once.

    Args:
        path: an ``.npz`` file, or a folder of ``.npy`` files, or ``None``.
        arrays: arrays by key otherwise.
        required: keys that there must be.
        optional: keys that are read where they are there.
    """
    if path is None:
        return partial(dict, check_arrays(arrays, required))
    if isinstance(path, str | PathLike) and "\0" not in str(path) and Path(path).is_dir():
        return partial(read_folder, path, required=required, optional=optional)
    return partial(read_archive, existing_file(path), required=required, optional=optional)
