"""Data for heads, and for backbones with them: whole batches, resumable and sharded."""

from glai_lightning.datamodules.digits import DigitsDataModule, DigitViewsDataModule
from glai_lightning.datamodules.episodes import EpisodesDataModule
from glai_lightning.datamodules.features import FeaturesDataModule
from glai_lightning.datamodules.images import ImageFolderDataModule
from glai_lightning.datamodules.letter import LetterDataModule
from glai_lightning.datamodules.omniglot import OmniglotDataModule
from glai_lightning.datamodules.tables import TableDataModule
from glai_lightning.datamodules.texts import TextsDataModule
from glai_lightning.datamodules.unlabelled import UnlabelledDataModule
from glai_lightning.datamodules.views import ViewsDataModule

__all__ = [
    "DigitViewsDataModule",
    "DigitsDataModule",
    "EpisodesDataModule",
    "FeaturesDataModule",
    "ImageFolderDataModule",
    "LetterDataModule",
    "OmniglotDataModule",
    "TableDataModule",
    "TextsDataModule",
    "UnlabelledDataModule",
    "ViewsDataModule",
]
