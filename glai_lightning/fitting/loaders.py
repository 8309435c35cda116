"""Reading a data loader whose own iteration is under way, each sample once, and telling whether it draws at random."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


def single_loader(loaders: Any, purpose: str) -> Any:
    """Return the one data loader that a fit has for a purpose.

    Raises:
        MisconfigurationException: if there are several.
    """
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        return loaders[0]
    if isinstance(loaders, list | tuple | dict):
        raise UserMisconfigurationError(f"Expected one {purpose} data loader for a solve, but got {len(loaders)}.")
    return loaders


def validation_loader(trainer: Any) -> Any:
    """Return the data loader of a fit's validation, or ``None`` if the fit has none.

    Lightning makes it before the first validation, which may come after a solve; then it is made here.

    Args:
        trainer: the Trainer of the fit; all of its processes must call this together.

    Raises:
        MisconfigurationException: if there are several.
    """
    if not trainer.enable_validation:
        return None
    if trainer.val_dataloaders is None:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    if trainer.val_dataloaders is None or sum(trainer.num_val_batches) == 0:
        return None
    return single_loader(trainer.val_dataloaders, "validation")


def on_device(trainer: Any, batch: Any) -> Any:
    """Return a batch as a step of the fit would get it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def iterate_copy(loader: Any) -> Iterator[Any]:
    """Yield the batches of a loader, from the first. The iteration of the loader itself is not disturbed.

    Samples that a sampler repeats, so that all processes of a fit read as many, are left out.
    """
    with _generators_kept(loader):
        yield from _copy_of(loader)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Context after which the generators of random numbers are as before, after an error too."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        # Lightning's context leaves them as they are where it is told of an error.
        isolation.__exit__(None, None, None)


def draws_at_random(loader: Any, prepare: Callable[[Any], Any]) -> bool:
    """Tell whether the same rows come out differently when they are read twice.

    Of a dataset with an index two rows are fetched, collated and prepared twice. Of any other loader the first batch is
    read twice; one that shuffles an iterable counts as random too, because that cannot be told from augmentation.

    Args:
        loader: the loader, which is not disturbed.
        prepare: what is done with a batch before a step gets it.
    """
    twin = _copy_of(loader)
    with isolated_rng(), _generators_kept(loader):
        rows = _first_rows(twin)
        if rows is None and isinstance(twin, DataLoader):
            twin.__dict__.update(num_workers=0, timeout=0, prefetch_factor=None)
        first, second = (_leaves(twin, rows, prepare) for _ in range(2))
    return len(first) != len(second) or not all(map(torch.equal, first, second))


def _copy_of(loader: Any) -> Any:
    twin = copy.copy(loader)
    if isinstance(twin, DataLoader):
        # Attributes of a DataLoader refuse to be set once it is built. Persistent workers belong to the original.
        twin.__dict__.update(_iterator=None)
        twin.__dict__["persistent_workers"] = False
        _leave_out_repeats(twin)
    if hasattr(twin, "_restored"):
        twin._restored = None
    return twin


def _first_rows(loader: Any) -> Any:
    """Return what names the first two rows in the loader's dataset, ``None`` if there is no such thing."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    rows = next(iter(sampler), None)
    if loader.batch_sampler is None or rows is None:
        return rows
    return list(islice(rows, 2))


def _leaves(loader: Any, rows: Any, prepare: Callable[[Any], Any]) -> list[Tensor]:
    if rows is None:
        batch = next(iter(loader), None)
    elif loader.batch_sampler is None:
        batch = loader.collate_fn(loader.dataset[rows])
    elif hasattr(loader.dataset, "__getitems__"):
        batch = loader.collate_fn(loader.dataset.__getitems__(rows))
    else:
        batch = loader.collate_fn([loader.dataset[row] for row in rows])
    return [leaf for leaf in tree_leaves(prepare(batch)) if isinstance(leaf, Tensor)]


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, getattr(batch_sampler, "sampler", None))
    generators = [g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class WithoutRepeats(Sampler[Any]):
    """The samples that a ``DistributedSampler`` gives its process, without those that it repeats.

    DistributedSampler pads the last round with samples from the start of the epoch; this sampler stops before the
    padding. An iteration of the original that is under way is not disturbed.

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


def _leave_out_repeats(loader: DataLoader[Any]) -> None:
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None:
        if isinstance(loader.sampler, DistributedSampler):
            loader.__dict__["sampler"] = WithoutRepeats(loader.sampler)
    elif isinstance(getattr(batch_sampler, "sampler", None), DistributedSampler):
        own = copy.copy(batch_sampler)
        own.sampler = WithoutRepeats(batch_sampler.sampler)
        loader.__dict__["batch_sampler"] = own
