"""Scikit-learn's handwritten digits, turned, shifted and blurred with noise: contrastive learning in seconds."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from glai_lightning.datamodules.views import ViewsDataModule


class DigitViewsDataModule(ViewsDataModule):
    """Two augmented views of each of the 1,797 digits, images (1, 8, 8), augmented anew in every epoch.

    Everything else is as in :class:`ViewsDataModule`.

    Args:
        batch_size: most samples in a batch, in each process, at least 2.
        val_fraction: part of the digits to validate on, in (0, 1).
        test_fraction: part of the digits to test on, in [0, 1).
        seed: of the splits, the order and the augmentation, at least 0.

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
        self, batch_size: int = 256, val_fraction: float = 0.2, test_fraction: float = 0.2, seed: int = 0
    ) -> None:
        # A second of imports that users of their own data need not wait for.
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        images, labels = load_digits(return_X_y=True)
        # Pixels are 0 to 16; the mean is near 5, the deviation near 6.
        pixels = (torch.from_numpy(images).float().reshape(-1, 1, 8, 8) - 5) / 6
        super().__init__(
            dataset=_Digits(pixels, torch.from_numpy(labels)),
            transform=augment_digit,
            batch_size=batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
        )


class _Digits(TensorDataset):
    classes = tuple(range(10))


def augment_digit(image: Tensor, *, degrees: float = 15.0, shift: float = 0.125, noise: float = 0.1) -> Tensor:
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
    # Beyond its edge an image goes on as it is there: a digit's edge is blank.
    moved = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
    return moved + noise * torch.randn_like(moved)
