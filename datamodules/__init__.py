"""Data in memory for heads: whole batches cut out of tensors, resumable and sharded."""

from glai_lightning.datamodules.digits import DigitsDataModule
from glai_lightning.datamodules.features import FeaturesDataModule

__all__ = ["DigitsDataModule", "FeaturesDataModule"]
