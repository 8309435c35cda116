"""What data modules of samples in splits have in common: their settings, and loaders that can be resumed."""

from collections.abc import Mapping
from functools import partial

import lightning.pytorch as pl

from glai_lightning.datamodules.checks import check_integer
from glai_lightning.datamodules.loader import Batches, BatchLoader, SeededBatchSampler, fit_progress
from glai_lightning.datamodules.splits import check_fractions


class SplitDataModule(pl.LightningDataModule):
    """Batches of the samples in each split of ``splits``, which a subclass makes.

    The order of the training samples follows from (seed, epoch), a checkpoint holds the position in it, and under
    distributed strategies every sample is read by one process an epoch.

    Args:
        batch_size: samples in a batch, in each process.
        val_fraction: part of the samples to validate on, in (0, 1), rounded to whole samples.
        test_fraction: part of the samples to test on, in [0, 1 - ``val_fraction``).
        seed: of the splits and of the order, at least 0.
        num_workers: processes that make batches ahead; 0 for none.

    Attributes:
        sampler_class: what cuts the samples of a split into batches.
        smallest_batch: samples that a batch has at least.
    """

    sampler_class: type[SeededBatchSampler] = SeededBatchSampler
    smallest_batch: int = 1

    def __init__(
        self, *, batch_size: int, val_fraction: float, test_fraction: float, seed: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, at_least=self.smallest_batch)
        check_integer("seed", seed, at_least=0)
        check_integer("num_workers", num_workers, at_least=0)
        check_fractions(val_fraction, test_fraction)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_workers = num_workers

    @property
    def splits(self) -> Mapping[str, Batches]:
        """The samples of ``train`` and ``val``, and of ``test`` where there are some; read when first asked for."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the data; only the first call does.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        _ = self.splits

    def train_dataloader(self) -> BatchLoader:
        """Return the training samples, in another order in every epoch."""
        return self._loader("train", shuffled=True)

    def val_dataloader(self) -> BatchLoader:
        """Return the validation samples, always in the same order."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Return the test samples, or no loader where there are none."""
        return self._loader("test") if "test" in self.splits else []

    def predict_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Return the test samples with their labels, or no loader where there are none."""
        return self.test_dataloader()

    def _loader(self, split: str, *, shuffled: bool = False) -> BatchLoader:
        trainer = self.trainer
        batches = self.splits[split]
        # What Lightning is about to shard the sampler with; None unless the strategy is a distributed one.
        sharding = trainer.distributed_sampler_kwargs if trainer is not None else None
        sampler = self.sampler_class(
            len(batches),
            self.batch_size,
            shuffle_seed=self.seed if shuffled else None,
            num_shards=1 if sharding is None else sharding["num_replicas"],
        )
        progress = partial(fit_progress, trainer) if shuffled and trainer is not None and trainer.training else None
        return BatchLoader(batches, sampler=sampler, progress=progress, num_workers=self.num_workers)
