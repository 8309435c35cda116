"""The letters A to Z by measurements of their images: a table that is installed with this package."""

from pathlib import Path
from string import ascii_uppercase

from glai_lightning.datamodules.features import FeaturesDataModule


class LetterDataModule(FeaturesDataModule):
    """20,000 printed letters of 20 fonts, distorted at random, each described by 16 measurements of its image.

    A fifth of them, 4,002 rows, is for testing, whatever the seed. Everything else is as in
    :class:`FeaturesDataModule`.

    Source: D. Slate (1991), Letter Recognition, UCI Machine Learning Repository, https://doi.org/10.24432/C5ZP40,
    licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/); P. W. Frey and D. J. Slate (1991), Letter
    Recognition Using Holland-Style Adaptive Classifiers, Machine Learning 6. The rows are those of the source, split
    into training and test rows, with the letters as the numbers 0 to 25.

    Args:
        batch_size: rows in a batch, in each process.
        val_fraction: part of the 15,998 rows that are not for testing to validate on, in (0, 1).
        seed: of the validation rows and of the order of the training rows, at least 0.

    Raises:
        TypeError: If ``batch_size`` or ``seed`` is no int.
        ValueError: If an argument is out of its range, or leaves a split empty.

    Example:
        >>> letters = LetterDataModule()
        >>> letters.num_features, letters.num_classes, "".join(letters.classes)
        (16, 26, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ')
        >>> {split: len(rows) for split, rows in letters.splits.items()}
        {'train': 12798, 'val': 3200, 'test': 4002}
    """

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.2, seed: int = 0) -> None:
        path = Path(__file__).parent / "data" / "letter.npz"
        super().__init__(path, batch_size=batch_size, val_fraction=val_fraction, seed=seed)

    @property
    def classes(self) -> list[str]:
        """The letters, in the order of their labels."""
        return list(ascii_uppercase)
