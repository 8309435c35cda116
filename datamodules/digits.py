"""Scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that are installed with it."""

import numpy as np

from glai_lightning.datamodules.episodes import EpisodesDataModule
from glai_lightning.datamodules.features import FeaturesDataModule


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
        super().__init__(arrays=_digits(), batch_size=batch_size, val_fraction=val_fraction, seed=seed)


class DigitEpisodesDataModule(EpisodesDataModule):
    """Episodes of the digits, to try few-shot learning out in seconds: a toy.

    It trains on the digits 0 to 4, and validates and tests on 5 to 9: the same five classes for both, because there are
    no others, but other images. Everything else is as in :class:`EpisodesDataModule`.

    Args:
        ways: classes in an episode, 2 to 5.
        shots: support images of each class, at least 1.
        queries: query images of each class, at least 1.
        train_episodes: episodes of an epoch.
        eval_episodes: episodes to validate on, and to test on.
        seed: of all episodes, and of which images are for testing, at least 0.

    Raises:
        TypeError: If an argument is no int.
        ValueError: If an argument is out of its range; from :meth:`setup`, if there are not enough classes or images.

    Example:
        >>> episode = DigitEpisodesDataModule(ways=3).episodes["test"][0]
        >>> episode["support"].shape, bool((episode["query_labels"] >= 5).all())
        (torch.Size([3, 8, 8]), True)
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_episodes: int = 100,
        eval_episodes: int = 600,
        seed: int = 0,
    ) -> None:
        # A second of imports that users of their own data need not wait for.
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        images, labels = load_digits(return_X_y=True)
        super().__init__(
            arrays={"x": images.reshape(-1, 8, 8), "y": labels},
            ways=ways,
            shots=shots,
            queries=queries,
            train_episodes=train_episodes,
            eval_episodes=eval_episodes,
            classes={"train": [0, 1, 2, 3, 4], "val": [5, 6, 7, 8, 9], "test": [5, 6, 7, 8, 9]},
            seed=seed,
        )


def _digits() -> dict[str, np.ndarray]:
    # A second of imports that users of their own data need not wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
