"""Data modules for a backbone whose embeddings may be cached, and the folders of such caches."""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from glai_lightning.checks import UserTypeError, UserValueError, expect_number
from glai_lightning.datamodules.arrays import existing_folder
from glai_lightning.datamodules.base import SampleDataModule
from glai_lightning.datamodules.feature_cache import fill_cache, is_cache
from glai_lightning.datamodules.features import FeaturesDataModule
from glai_lightning.fitting.embedded import Embedded

_SECONDS_A_DAY = 24 * 60 * 60


class CachingDataModule(SampleDataModule):
    """Batches of samples for the frozen backbone of a ``HeadModule``, whose embeddings may be computed once.

    Args:
        cache: folder of the caches, which is made; ``None`` to give the backbone the inputs in every epoch.
        **options: those of the splits and the loaders.
    """

    def __init__(self, *, cache: str | PathLike[str] | None, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(cache, str | PathLike | None):
            raise UserTypeError(f"Expected `cache` to be the path of a folder, but got {cache!r}.")
        self.cache = cache
        self._embedded: Mapping[str, Any] | None = None

    def fill(self, backbone: nn.Module) -> Path:
        """Compute the embeddings that the cache does not hold yet, and return the folder of this one.

        Args:
            backbone: a module from a batch of inputs to embeddings (batch, D), frozen and in eval mode.

        Raises:
            ValueError: if there is no ``cache``, inputs are augmented at random, the backbone is not frozen, or the
                folder cannot be written to.
        """
        if self.cache is None:
            raise UserValueError("Expected `cache` of the data module to be a folder, but got None.")
        return fill_cache(self, backbone, self.cache)

    def _rows_of(self, split: str) -> Any:
        # Only now: a fit that resumes has loaded the weights of its backbone after the set-up.
        if self.cache is None or self.trainer is None:
            return super()._rows_of(split)
        if self._embedded is None:
            module = self.trainer.lightning_module
            backbone = getattr(module, "backbone", None)
            if not isinstance(backbone, nn.Module) or not getattr(module, "freeze_backbone", False):
                raise UserValueError(
                    "Expected a `HeadModule` with a frozen backbone for a data module with `cache`, but got "
                    f"`{type(module).__name__}`{'' if backbone is None else ' whose backbone is trained'}. Without "
                    "`cache` any module will do."
                )
            self._embedded = self._embed(backbone)
        return EmbeddedRows(self._embedded[split])

    def _embed(self, backbone: nn.Module) -> Mapping[str, Any]:
        """Return what makes the batches of embeddings of each split."""
        assert self.cache is not None
        return FeaturesDataModule.from_backbone(self, backbone, cache_dir=self.cache).splits


class EmbeddedRows(Dataset[tuple[Embedded, Tensor]]):
    """Batches ``(Embedded(embeddings), targets)`` of rows of features, or of views of them."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of an epoch."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | list[int]) -> tuple[Embedded, Tensor]:
        embeddings, targets = self.rows[rows]
        return Embedded(embeddings), targets


@dataclass(frozen=True)
class CacheFolder:
    """A cache of embeddings.

    Args:
        path: its folder.
        size: bytes on disk.
        used: seconds since the epoch when it was last filled or read.
        complete: whether all of its shards are there.
    """

    path: Path
    size: int
    used: float
    complete: bool


def list_caches(folder: str | PathLike[str]) -> list[CacheFolder]:
    """Return the caches in a folder, the one that was used last first.

    Raises:
        ValueError: if there is no such folder.
    """
    return sorted(_caches(existing_folder("cache", folder)), key=lambda cache: -cache.used)


def prune_caches(folder: str | PathLike[str], unused_days: float) -> list[CacheFolder]:
    """Remove the caches in a folder that were not used for so many days, and return them; nothing else is touched.

    Raises:
        ValueError: if there is no such folder, or ``unused_days`` is negative.
    """
    expect_number("unused_days", unused_days, low=0.0)
    old = [cache for cache in list_caches(folder) if time.time() - cache.used >= unused_days * _SECONDS_A_DAY]
    for cache in old:
        shutil.rmtree(cache.path)
    return old


def _caches(folder: Path) -> Iterator[CacheFolder]:
    for path in folder.iterdir():
        if is_cache(path):
            files = [file.stat() for file in path.iterdir()]
            used = max([path.stat().st_mtime, *(file.st_mtime for file in files)])
            yield CacheFolder(path, sum(file.st_size for file in files), used, (path / "manifest.json").is_file())
