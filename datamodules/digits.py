"""Scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that are installed with it."""

import math
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from glai_lightning.datamodules.features import FeaturesDataModule
from glai_lightning.datamodules.views import ViewsDataModule


class DigitsDataModule(FeaturesDataModule):
    """The digits 0 to 9 with a fixed fifth of them for testing, to try things out in seconds.

    Everything else is as in :class:`FeaturesDataModule`.

    Args:
        batch_size: rows in a batch, in each process.
        val_fraction: part of the 1,437 rows that are not for testing to validate on, in (0, 1).
        seed: of the validation rows and of the order of the training rows, at least 0. The 360 test rows, with
            the digits in proportion, do not depend on it.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is no int.
        ValueError: If an argument is out of its range, or leaves a split empty.

    Example:
        >>> digits = DigitsDataModule()
        >>> digits.num_features, digits.num_classes
        (64, 10)
        >>> [len(split[1]) for split in (digits.splits.train, digits.splits.val, digits.splits.test)]
        [1150, 287, 360]
    """

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.2, seed: int = 0) -> None:
        super().__init__(arrays=_split_digits(), batch_size=batch_size, val_fraction=val_fraction, seed=seed)


class DigitViewsDataModule(ViewsDataModule):
    """Two augmented views of each of the 1,797 digits, images (1, 8, 8), augmented anew in every epoch.

    Everything else is as in :class:`ViewsDataModule`.

    Args:
        batch_size: most samples in a batch, in each process, at least 2.
        val_fraction: part of the digits to validate on, in (0, 1).
        test_fraction: part of the digits to test on, in [0, 1).
        seed: of the splits, the order and the augmentation, at least 0.
        cache: see :class:`ViewsDataModule`.
        cached_views: see :class:`ViewsDataModule`.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is no int.
        ValueError: If an argument is out of its range, or leaves a split with fewer than two digits.

    Example:
        >>> digits = DigitViewsDataModule()
        >>> views, labels = next(iter(digits.train_dataloader()))
        >>> views.shape, digits.num_classes
        (torch.Size([2, 216, 1, 8, 8]), 10)
    """

    def __init__(
        self,
        batch_size: int = 256,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
        cache: str | PathLike[str] | None = None,
        cached_views: int = 8,
    ) -> None:
        images, labels = _load_digits()
        # Pixels are 0 to 16; the mean is near 5, the deviation near 6.
        pixels = (torch.from_numpy(images).float().reshape(-1, 1, 8, 8) - 5) / 6
        super().__init__(
            dataset=_Digits(pixels, torch.from_numpy(labels)),
            transform=_augment_digit,
            batch_size=batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            cache=cache,
            cached_views=cached_views,
        )


class _Digits(TensorDataset):
    classes = tuple(range(10))


def _augment_digit(image: Tensor, *, degrees: float = 15.0, shift: float = 0.125, noise: float = 0.1) -> Tensor:
    """Turn, stretch and shift an image at random, and add noise.

    Args:
        image: image (channels, height, width), normalised.
        degrees: most degrees to turn it either way; it is stretched by up to 20 % either way.
        shift: furthest to shift it, as a fraction of half its side.
        noise: standard deviation of the noise.

    Returns:
        An image of the same shape.
    """
    angle, scale, *offsets = torch.empty(4).uniform_(-1, 1).tolist()
    angle, scale = math.radians(degrees) * angle, 1.2**scale
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    motion = torch.tensor([[[cosine, -sine, shift * offsets[0]], [sine, cosine, shift * offsets[1]]]])
    grid = F.affine_grid(motion, [1, *image.shape], align_corners=False)
    # Outside of the image its edge is repeated: the edge of a digit is blank.
    moved = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
    return moved + noise * torch.randn_like(moved)


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    # A second of imports that users of their own data need not wait for.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    return load_digits(return_X_y=True)  # type: ignore[no-any-return]


def _split_digits() -> dict[str, np.ndarray]:
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    parts = train_test_split(*_load_digits(), test_size=0.2, random_state=0, stratify=_load_digits()[1])
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))
