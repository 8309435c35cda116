"""Data in memory for heads: whole batches cut out of tensors, resumable and sharded."""

from glai_lightning.datamodules.digits import DigitEpisodesDataModule, DigitsDataModule
from glai_lightning.datamodules.episodes import EpisodesDataModule
from glai_lightning.datamodules.features import FeaturesDataModule

__all__ = ["DigitEpisodesDataModule", "DigitsDataModule", "EpisodesDataModule", "FeaturesDataModule"]
