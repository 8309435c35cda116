"""Episodes out of labelled samples in memory: numbered, each a function of the seed and its number alone."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from glai_lightning.checks import UserValueError

#: Episodes whose rows are drawn together: drawing them one by one takes ten times as long.
_BLOCK = 64

Episode = dict[str, Tensor]


class EpisodeSampler(DistributedSampler[int]):
    """Numbers of episodes, shared out to the processes of a fit.

    As a ``DistributedSampler`` it is left alone by Lightning, which would repeat evaluation episodes until every
    process has as many.

    Args:
        episodes: the episodes; their number is that of an epoch.
        fresh: whether every epoch has episodes of its own, and every process as many: an epoch then is rounded up to a
            multiple of the processes. Else all epochs have the same ones, each in one process.
        num_replicas: processes that share the episodes.
        rank: which of them this is, from 0.

    Raises:
        ValueError: If there are fewer episodes than processes.

    Example:
        >>> [list(EpisodeSampler(range(5), fresh=False, num_replicas=2, rank=rank)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
        >>> sampler = EpisodeSampler(range(5), fresh=True, num_replicas=2, rank=1)
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [7, 9, 11]
    """

    def __init__(self, episodes: Any, *, fresh: bool, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(episodes, num_replicas, rank, shuffle=False)
        if len(episodes) < num_replicas:
            raise UserValueError(
                f"Expected at least one episode for each of {num_replicas} processes, but got {len(episodes)} episodes."
            )
        self.fresh = fresh

    def __len__(self) -> int:
        episodes = len(self.dataset)  # type: ignore[arg-type]
        if self.fresh:
            return math.ceil(episodes / self.num_replicas)
        return len(range(self.rank, episodes, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        if not self.fresh:
            return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
        in_epoch = len(self) * self.num_replicas
        first = self.epoch * in_epoch
        return iter(range(first + self.rank, first + in_epoch, self.num_replicas))


class NumberedEpisodes(Dataset[Episode]):
    """Episodes ``ways`` x (``shots`` + ``queries``) out of labelled samples in memory.

    Episode ``n`` is a dict of ``support`` (ways * shots, ...) and ``query`` (ways * queries, ...), float32, and
    ``support_labels`` and ``query_labels``, int64: the labels of the data. Classes and samples are drawn without
    replacement, all classes alike. There is no end to the numbers; ``len`` is the number of episodes in an epoch.

    Args:
        inputs: samples (N, ...), of any real dtype.
        labels: their labels (N,), int64.
        rows: which of the samples to draw from, (M,), int64.
        mean: subtracted from float32 samples, of a shape that broadcasts with them.
        scale: what they are divided by then, likewise.
        episodes: number of episodes in an epoch.
        ways: classes in an episode.
        shots: support samples of each.
        queries: query samples of each.
        seeds: what the episodes follow from: a seed, and which stream of episodes this is.

    Example:
        >>> labels = torch.arange(12) % 3
        >>> episodes = NumberedEpisodes(torch.randn(12, 5), labels, torch.arange(12), episodes=4, ways=2, shots=1,
        ...     queries=3)
        >>> {key: tuple(value.shape) for key, value in episodes[0].items()}
        {'support': (2, 5), 'support_labels': (2,), 'query': (6, 5), 'query_labels': (6,)}
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        episodes: int,
        ways: int,
        shots: int,
        queries: int,
        seeds: tuple[int, int] = (0, 0),
    ) -> None:
        self.inputs, self.labels, self.mean, self.scale = inputs, labels, mean, scale
        self.episodes, self.ways, self.shots, self.queries = episodes, ways, shots, queries
        self.seeds = seeds
        by_class = rows[torch.argsort(labels[rows], stable=True)]
        classes, counts = torch.unique_consecutive(labels[by_class], return_counts=True)
        self._rows, self._classes, self._counts = by_class.numpy(), classes.numpy(), counts.numpy()
        self._starts = np.cumsum(self._counts) - self._counts
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, number: int) -> Episode:
        block, position = divmod(number, _BLOCK)
        if self._drawn is None or self._drawn[0] != block:
            self._drawn = (block, *self._draw(block))
        _, rows, labels = self._drawn
        samples = self._standardised(self.inputs.index_select(0, rows[position]))
        support = self.ways * self.shots
        return {
            "support": samples[:support],
            "support_labels": labels[position].repeat_interleave(self.shots),
            "query": samples[support:],
            "query_labels": labels[position].repeat_interleave(self.queries),
        }

    def in_batches(self, sampler: Sampler[int]) -> Sampler[int]:
        """Return the sampler: an episode is a batch."""
        return sampler

    def _standardised(self, samples: Tensor) -> Tensor:
        samples = samples.float()
        # In place: index_select has made a tensor of its own.
        if self.mean is not None:
            samples.sub_(self.mean)
        return samples if self.scale is None else samples.div_(self.scale)

    def _draw(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the rows (episodes, ways * shots + ways * queries) and class labels (episodes, ways) of a block."""
        seed, stream = self.seeds
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, block)))
        classes = distinct_integers(generator, np.full(_BLOCK, len(self._classes)), self.ways)
        flat = classes.ravel()
        samples = distinct_integers(generator, self._counts[flat], self.shots + self.queries)
        rows = self._rows[self._starts[flat, None] + samples].reshape(_BLOCK, self.ways, -1)
        support, query = rows[:, :, : self.shots], rows[:, :, self.shots :]
        in_order = np.concatenate([support.reshape(_BLOCK, -1), query.reshape(_BLOCK, -1)], axis=1)
        return torch.from_numpy(in_order), torch.from_numpy(self._classes[classes])


def distinct_integers(generator: np.random.Generator, below: np.ndarray, size: int) -> np.ndarray:
    """Draw rows of distinct integers, in random order, in a time that does not depend on their range.

    Floyd's algorithm (Bentley and Floyd 1987), for all rows at once.

    Args:
        generator: where the randomness comes from.
        below: for each of M rows, what its integers lie below, at least ``size``, (M,).
        size: integers in a row.

    Returns:
        Integers (M, size), int64, each row one of all ordered selections with equal probability.
    """
    drawn = np.empty((size, len(below)), dtype=np.int64)
    for step in range(size):
        largest = below - size + step
        candidates = generator.integers(0, largest, endpoint=True)
        taken = (drawn[:step] == candidates).any(axis=0)
        drawn[step] = np.where(taken, largest, candidates)
    return generator.permuted(drawn.T, axis=1)
