"""Numbered episodes, each a function of the seed and its number alone: of samples in memory, and of tasksets."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from glai_lightning.checks import UserTypeError, UserValueError, listed
from glai_lightning.datamodules.arrays import check_finite

#: Episodes whose rows are drawn together: drawing them one by one takes ten times as long.
_BLOCK = 64

_Episode = dict[str, Tensor]


class NumberedEpisodes(Dataset[_Episode]):
    """Episodes ``ways`` x (``shots`` + ``queries``) of labelled samples (N, ...) in memory.

    Episode ``n`` is a dict of ``support`` (ways * shots, ...) and ``query`` (ways * queries, ...), float32, and
    ``support_labels`` and ``query_labels``, int64: the labels of the data. Classes and samples are drawn without
    replacement, all classes alike, from ``rows``; samples become ``(sample - mean) / scale``. The numbers have no end;
    ``episodes`` is how many of them make an epoch. ``seeds`` are a seed, and which stream of episodes this is.

    Example:
        >>> labels = torch.arange(12) % 3
        >>> sizes = {"ways": 2, "shots": 1, "queries": 3}
        >>> episodes = NumberedEpisodes(torch.randn(12, 5), labels, torch.arange(12), episodes=4, **sizes)
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

    def __getitem__(self, number: int) -> _Episode:
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


class TasksetEpisodes(Dataset[_Episode]):
    """Numbered episodes of a taskset, such as a ``learn2learn.data.Taskset``.

    Tasks are drawn with Python's, numpy's and PyTorch's global generators, which transforms use. Each task seeds them
    by its number and puts them back afterwards. So a task does not depend on what was drawn before it, and drawing
    tasks does not change what the rest of a program draws. A taskset of a length above 1 is read round and round. One
    of length 1, which is how learn2learn says that tasks never end, has a new task for every number.
    """

    def __init__(
        self, taskset: Any, *, episodes: int, shots: int, queries: int, seeds: tuple[int, int] = (0, 0)
    ) -> None:
        self.taskset = taskset
        self.episodes, self.shots, self.queries = episodes, shots, queries
        self.seeds = seeds

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, number: int) -> _Episode:
        tasks = len(self.taskset)
        index = number % tasks
        seed, stream = self.seeds
        # A finite taskset keeps the description of a task once it is drawn: that of an index must not depend on when.
        with isolate_rng(include_cuda=False):
            seed_generators(seed, (stream, number if tasks == 1 else index))
            samples, labels = self.taskset[index]
        return split_task(samples, labels, shots=self.shots, queries=self.queries)


def split_task(samples: Tensor, labels: Tensor, *, shots: int, queries: int) -> _Episode:
    """Split the samples (n, ...) of a task, with labels (n,), into support and query.

    Of each class the first ``shots`` samples are the support and the next ``queries`` the query, in ascending order of
    the labels.

    Raises:
        TypeError: If samples are no tensor, or labels no integers.
        ValueError: If there are fewer than two classes, a class has too few samples (the message names it), or a sample
            is not finite.

    Example:
        >>> task = split_task(torch.arange(8.0), torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]), shots=1, queries=2)
        >>> task["support"], task["query"]
        (tensor([1., 0.]), tensor([3., 5., 2., 4.]))
    """
    if not isinstance(samples, Tensor) or not isinstance(labels, Tensor):
        raise UserTypeError(
            "Expected a task to be a pair of tensors, samples and labels, "
            f"but got {type(samples).__name__} and {type(labels).__name__}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise UserTypeError(f"Expected the labels of a task to be integers, but got {labels.dtype}.")
    if labels.shape != (len(samples),):
        raise UserValueError(
            f"Expected a label for each of {len(samples)} samples of a task, but got the shape {tuple(labels.shape)}."
        )
    check_finite("samples", samples)
    order = torch.argsort(labels, stable=True)
    classes, counts = torch.unique_consecutive(labels[order], return_counts=True)
    if len(classes) < 2:
        raise UserValueError(f"Expected a task of at least 2 classes, but got {listed(classes.tolist()) or 'none'}.")
    check_class_sizes("of a task", classes, counts, shots=shots, queries=queries)
    starts = (counts.cumsum(0) - counts).unsqueeze(1)
    support = order[(starts + torch.arange(shots)).flatten()]
    query = order[(starts + torch.arange(shots, shots + queries)).flatten()]
    return {
        "support": samples[support],
        "support_labels": labels[support].long(),
        "query": samples[query],
        "query_labels": labels[query].long(),
    }


def check_class_sizes(where: str, classes: Tensor, counts: Tensor, *, shots: int, queries: int) -> None:
    """Raise ``ValueError`` if a class has too few samples for support and query; ``where`` is what the classes are."""
    short = counts < shots + queries
    if short.any():
        named = [f"{label} with {n}" for label, n in zip(classes[short].tolist(), counts[short].tolist(), strict=True)]
        raise UserValueError(
            f"Expected every class {where} to have at least {shots + queries} samples, {shots} for the support "
            f"and {queries} for the query, but got class {listed(named)}."
        )


def seed_generators(seed: int, key: tuple[int, ...]) -> None:
    """Seed PyTorch's, numpy's and Python's global generators, not those of accelerators, by a seed and its use."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(seed, spawn_key=key).generate_state(3)
    torch.default_generator.manual_seed(int(for_torch))
    np.random.seed(for_numpy)
    random.seed(int(for_python))


def distinct_integers(generator: np.random.Generator, below: np.ndarray, size: int) -> np.ndarray:
    """Draw rows of distinct integers, in random order, in a time that does not depend on their range.

    Row ``i`` of the result (M, ``size``) holds integers below ``below[i]``; all ordered selections have the same
    probability. Floyd's algorithm (Bentley and Floyd 1987), for all rows at once.
    """
    drawn = np.empty((size, len(below)), dtype=np.int64)
    for step in range(size):
        largest = below - size + step
        candidates = generator.integers(0, largest, endpoint=True)
        taken = (drawn[:step] == candidates).any(axis=0)
        drawn[step] = np.where(taken, largest, candidates)
    return generator.permuted(drawn.T, axis=1)
