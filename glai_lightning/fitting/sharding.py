"""Reading the samples of this process once each, where a sampler repeats some so that all processes have as many."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, Sampler


class WithoutRepeats(Sampler[Any]):
    """The samples that a ``DistributedSampler`` gives its process, without those that it repeats to fill up.

    It repeats, behind the last, the first of the order that all processes share. What it yields is as ever, and an
    iteration of it that is under way is left alone.

    Args:
        sampler: the sampler.

    Example:
        >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
        >>> list(sampler), list(WithoutRepeats(sampler))
        ([1, 3, 0], [1, 3])
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = copy.copy(sampler)
        # Lightning's wrapper of another sampler draws into its dataset whenever it is iterated.
        self._sampler.dataset = copy.copy(sampler.dataset)
        places = range(sampler.rank, len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type]
        self._samples = min(len(places), len(sampler))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[Any]:
        return islice(self._sampler, self._samples)


def leave_out_repeats(loader: DataLoader[Any]) -> None:
    """Let a loader, which is nobody else's, read none of the samples of its process twice.

    Args:
        loader: the loader, whose sampler or whose batch sampler's sampler is replaced.
    """
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None:
        if isinstance(loader.sampler, DistributedSampler):
            loader.__dict__["sampler"] = WithoutRepeats(loader.sampler)
    elif isinstance(getattr(batch_sampler, "sampler", None), DistributedSampler):
        own = copy.copy(batch_sampler)
        own.sampler = WithoutRepeats(batch_sampler.sampler)
        loader.__dict__["batch_sampler"] = own
