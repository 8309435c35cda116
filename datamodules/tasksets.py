"""Episodes out of somebody's tasks, such as those of a ``learn2learn.data.Taskset``."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.datamodules.checks import check_finite
from glai_lightning.datamodules.class_splits import check_class_sizes, check_disjoint, listed
from glai_lightning.datamodules.episode_drawing import Episode


class TasksetEpisodes(Dataset[Episode]):
    """Numbered episodes out of a taskset.

    Tasks are drawn with Python's, numpy's and PyTorch's global generators, which transforms use. Those are seeded for
    each task by its number, and put back afterwards: a task does not depend on what was drawn before it, nor does the
    rest of a program depend on tasks.

    Args:
        taskset: has ``taskset[i]``, a pair of samples (n, ...) and labels (n,), integers. One of a length above 1 is
            read round and round; one of length 1, which is how learn2learn says that tasks never end, has a task of its
            own for every number.
        episodes: number of episodes in an epoch.
        shots: of each class, in the order of the task, the first so many samples are the support.
        queries: so many behind these are the query; others are left out.
        seeds: what the tasks follow from: a seed, and which stream of episodes this is.
    """

    def __init__(
        self, taskset: Any, *, episodes: int, shots: int, queries: int, seeds: tuple[int, int] = (0, 0)
    ) -> None:
        self.taskset = taskset
        self.episodes, self.shots, self.queries = episodes, shots, queries
        self.seeds = seeds

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, number: int) -> Episode:
        tasks = len(self.taskset)
        index = number % tasks
        seed, stream = self.seeds
        # A finite taskset keeps the description of a task once it is drawn: that of an index must not depend on when.
        with _seeded(np.random.SeedSequence(seed, spawn_key=(stream, number if tasks == 1 else index))):
            samples, labels = self.taskset[index]
        return split_task(samples, labels, shots=self.shots, queries=self.queries)

    def in_batches(self, sampler: Sampler[int]) -> Sampler[int]:
        """Return the sampler: an episode is a batch."""
        return sampler


def split_task(samples: Tensor, labels: Tensor, *, shots: int, queries: int) -> Episode:
    """Split the samples of a task into support and query.

    Args:
        samples: (n, ...).
        labels: (n,), integers.
        shots: of each class, the first so many samples are the support.
        queries: so many behind these are the query.

    Returns:
        ``support`` (ways * shots, ...), ``support_labels``, ``query`` (ways * queries, ...) and ``query_labels``, in
        ascending order of the labels.

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


def check_tasksets_disjoint(tasksets: dict[str, Any]) -> None:
    """Raise ``ValueError``, naming the classes, if validation or test have classes of training, where that can be seen.

    Labels of different datasets cannot be compared. Those of tasksets that draw from one and the same dataset can be,
    unless a transform (learn2learn's ``FilterLabels``) picks classes.
    """
    train = tasksets["train"]
    for split in ("val", "test"):
        other = tasksets[split]
        source = _source(train)
        if source is None or source is not _source(other) or _filters(train) or _filters(other):
            continue
        check_disjoint({"train": train.dataset.labels, "val": (), "test": (), split: other.dataset.labels})


def _source(taskset: Any) -> Any:
    dataset = getattr(taskset, "dataset", None)
    return getattr(dataset, "dataset", None) if hasattr(dataset, "labels") else None


def _filters(taskset: Any) -> bool:
    return any("Filter" in type(transform).__name__ for transform in getattr(taskset, "task_transforms", None) or ())


@contextmanager
def _seeded(seeds: np.random.SeedSequence) -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for_python, for_numpy, for_torch = (int(seed) for seed in seeds.generate_state(3))
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
