"""Images in folders, one for each class, for backbones that read pixels."""

import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError, expect_choice, listed
from glai_lightning.datamodules.arrays import existing_folder
from glai_lightning.datamodules.base import Splits, expect_callable
from glai_lightning.datamodules.cached import CachingDataModule
from glai_lightning.datamodules.splits import SPLITS
from glai_lightning.datamodules.views import AugmentedViews
from glai_lightning.optional import import_optional


class ImageFolderDataModule(CachingDataModule):
    """Batches ``(images, labels)`` out of torchvision's ``ImageFolder``: ``root/train/cat/1.jpg`` is of class 'cat'.

    Where there is no ``root/val`` or no ``root/test``, images of ``root/train`` are set apart for it. Images are read,
    in RGB, and transformed when their batch is made. Order and transformation follow from the seed, the epoch and the
    image, so that a fit resumed in the middle of an epoch gets what it would have had.

    Args:
        root: the folder that holds ``train`` and, if you like, ``val`` and ``test``, with the same classes.
        transform: from a PIL image to a tensor or another image, all of one size; an image becomes a tensor
            (3, height, width), uint8, as the backbones take it. By default images are left as they are.
        batch_size: images in a batch, in each process.
        val_fraction: part of ``train`` to validate on, in (0, 1); without effect where there is ``val``.
        test_fraction: part of ``train`` to test on, in [0, 1 - ``val_fraction``), 0 for no test; without effect where
            there is ``test``.
        seed: of the splits, of the order and of random transformations, at least 0.
        num_workers: processes that read images ahead; 0 for none.
        on_error: 'raise' an error where an image cannot be read; or 'skip' such images, which reads all of them once
            beforehand, and names them in one warning.
        cache: folder for the embeddings of the module's frozen backbone, which then sees each image once, whatever the
            number of epochs and fits, see ``docs/one_pass.md``; ``None`` for none.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
        TypeError: If ``batch_size``, ``seed`` or ``num_workers`` is no int.
        ValueError: If there are no such folders, or an argument is out of its range; from :meth:`setup`, if there are
            fewer than two classes, a class without images, classes in ``val`` or ``test`` that are not those of
            ``train``, or too few images; from a loader, if images cannot be read or differ in size.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        cache: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            cache=cache,
            batch_size=batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            num_workers=num_workers,
        )
        expect_choice("on_error", on_error, ("raise", "skip"))
        expect_callable("transform", transform)
        self.root = existing_folder("root", root)
        if not (self.root / "train").is_dir():
            raise UserValueError(f"Expected `root` to be a folder that holds 'train', but got '{root}'.")
        _imported("torchvision.datasets")
        self.transform = transform
        self.on_error = on_error

    def _read(self) -> Splits:
        folders = {split: self._read_folder(split) for split in SPLITS if (self.root / split).is_dir()}
        train = folders["train"]
        for folder in folders.values():
            if folder.classes != train.classes:
                raise UserValueError(
                    f"Expected the classes in '{folder.root}' to be those of 'train', {listed(train.classes)}, but got "
                    f"{listed(folder.classes) or 'none'}."
                )
        absent = [train.classes[label] for label in set(range(len(train.classes))) - set(train.targets)]
        if absent:
            raise UserValueError(f"Expected images of every class in '{train.root}', but got none of {listed(absent)}.")
        rows = self._split(len(train), **{f"{split}_fraction": 0 for split in folders if split != "train"})
        rows |= {split: torch.arange(len(folder)) for split, folder in folders.items() if split != "train"}
        sources = {
            split: _Images(
                folders.get(split, train),
                chosen,
                ToTensor(self.transform),
                num_views=1,
                seed=self.seed,
                varied=split == "train",
            )
            for split, chosen in rows.items()
        }
        return Splits(sources, num_classes=len(train.classes), classes=train.classes)

    def _read_folder(self, split: str) -> Any:
        path = self.root / split
        classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        if len(classes) < 2:
            raise UserValueError(
                f"Expected folders of at least two classes in '{path}', but got {listed(classes) or 'none'}."
            )
        folder = _imported("torchvision.datasets").ImageFolder(str(path), loader=read_image, allow_empty=True)
        if self.on_error == "skip":
            self._skip_unreadable(folder)
        if len(folder) == 0:
            raise UserValueError(f"Expected images in the folders of '{path}', but got none that can be read.")
        return folder

    def _skip_unreadable(self, folder: Any) -> None:
        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            readable = list(pool.map(_is_readable, (path for path, _ in folder.samples)))
        skipped = [path for (path, _), fine in zip(folder.samples, readable, strict=True) if not fine]
        if skipped:
            named = listed(map(repr, skipped))
            warnings.warn(f"Skipped images that cannot be read, {len(skipped)}: {named}.", stacklevel=2)
        folder.samples = [sample for sample, fine in zip(folder.samples, readable, strict=True) if fine]
        folder.targets = [label for _, label in folder.samples]


class _Images(AugmentedViews):
    """Batches of the one view of each image."""

    def __getitem__(self, rows: Tensor | list[int]) -> tuple[Tensor, Tensor | None]:
        (images,), labels = super().__getitem__(rows)
        return images, labels


class ToTensor:
    """Transforms a PIL image, and makes it a tensor (channels, height, width) where it is none yet."""

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        """Return the tensor of an image."""
        transformed = image if self.transform is None else self.transform(image)
        if isinstance(transformed, Tensor):
            return transformed
        return _imported("torchvision.transforms.functional").pil_to_tensor(transformed)  # type: ignore[no-any-return]


def read_image(path: str | PathLike[str]) -> Any:
    """Read an image file as a PIL image in RGB.

    Raises:
        ValueError: If it is empty, damaged, of no known format, or unpacks to more than is safe; it is named.
    """
    image = _imported("PIL.Image")
    # What Pillow raises for damaged files, whatever their format.
    damaged = (OSError, ValueError, SyntaxError, EOFError, struct.error, image.DecompressionBombError)
    try:
        with image.open(path) as opened:
            return opened.convert("RGB")
    except damaged as error:
        raise UserValueError(
            f"Expected an image that can be read, but got '{path}': {error}. With `on_error='skip'` it is left out."
        ) from error


def _is_readable(path: str) -> bool:
    try:
        read_image(path)
    except ValueError:
        return False
    return True


def _imported(name: str) -> Any:
    return import_optional(name, needed_for="`ImageFolderDataModule`", extra="vision")
