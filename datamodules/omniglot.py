"""Handwritten characters of eight alphabets: a few-shot problem that is installed with this package."""

from pathlib import Path

import numpy as np

from glai_lightning.datamodules.episodes import EpisodesDataModule

_ALPHABETS = {
    "train": ["Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean", "Sanskrit"],
    "val": ["Balinese"],
    "test": ["Latin", "Tagalog"],
}


class OmniglotDataModule(EpisodesDataModule):
    """Episodes of 242 characters of eight alphabets, each drawn by 20 people: images (28, 28) of one bit a pixel.

    Whole alphabets are trained on (175 characters of five), validated on (24 of one) or tested on (43 of two), whatever
    the seed. Everything else is as in :class:`EpisodesDataModule`.

    Source: B. M. Lake, R. Salakhutdinov and J. B. Tenenbaum (2015), Human-level concept learning through probabilistic
    program induction, Science 350(6266); https://github.com/brendenlake/omniglot, MIT licence, copyright (c) 2015
    Brenden Lake. The images are those of its small background sets, reduced to 28 x 28 pixels and to ink or no ink.

    Args:
        ways: characters in an episode, 2 to 24.
        shots: support images of each character, at least 1.
        queries: query images of each character, at least 1; with the support no more than 20.
        train_episodes: episodes of an epoch, over all processes.
        eval_episodes: episodes to validate on, and to test on.
        seed: of all episodes, at least 0.

    Raises:
        TypeError: If an argument is no int.
        ValueError: If an argument is out of its range; from :meth:`setup`, if characters or images are too few.

    Example:
        >>> episode = OmniglotDataModule(ways=20, shots=1, queries=5).episodes["test"][0]
        >>> episode["support"].shape, episode["query"].shape
        (torch.Size([20, 28, 28]), torch.Size([100, 28, 28]))
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
        with np.load(Path(__file__).parent / "data" / "omniglot.npz", allow_pickle=False) as archive:
            arrays = dict(archive)
        arrays["x"] = np.unpackbits(arrays["x"], axis=1).reshape(-1, 28, 28)
        super().__init__(
            arrays=arrays,
            ways=ways,
            shots=shots,
            queries=queries,
            train_episodes=train_episodes,
            eval_episodes=eval_episodes,
            classes=_ALPHABETS,
            seed=seed,
            groups="alphabet",
        )
