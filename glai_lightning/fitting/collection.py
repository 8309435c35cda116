"""Reading a head's inputs and targets off somebody's own training step, without a trace in the fit."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

from glai_lightning.fitting.loss_watching import LossCall, LossReached, LossWatcher
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.sharding import WithoutRepeats, leave_out_repeats

Stage = Literal["training", "validation"]

_METRIC_BOOKKEEPING = ("_update_count", "_computed", "_forward_cache")


@contextmanager
def without_a_trace(pl_module: Any) -> Iterator[None]:
    """Context for running steps of a module in eval mode, beside its fit.

    At the end modes, states of torchmetrics and random number generators are as before, and nothing was logged.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    metrics = [(module, _metric_state(module)) for module in pl_module.modules() if isinstance(module, Metric)]
    pl_module.eval()
    pl_module.__dict__["log"] = pl_module.__dict__["log_dict"] = _log_nothing
    try:
        with isolate_rng():
            yield
    finally:
        del pl_module.__dict__["log"], pl_module.__dict__["log_dict"]
        for metric, state in metrics:
            metric.__dict__.update(state)
        for module, mode in modes:
            module.training = mode


def _log_nothing(*_: Any, **__: Any) -> None:
    return None


def _metric_state(metric: Metric) -> dict[str, Any]:
    state = {name: getattr(metric, name) for name in (*metric._defaults, *_METRIC_BOOKKEEPING)}
    return {name: list(value) if isinstance(value, list) else copy.deepcopy(value) for name, value in state.items()}


def watch_step(
    trainer: Any,
    pl_module: Any,
    head: nn.Module,
    batch: Any,
    batch_idx: int,
    *,
    stage: Stage = "training",
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> list[LossCall]:
    """Run a step of a module, and return the calls of a known loss on the outputs of its head.

    Args:
        trainer: the Trainer in whose fit this happens.
        pl_module: the LightningModule.
        head: its head.
        batch: a batch on the device of the module.
        batch_idx: index of the batch.
        stage: whose step to run.
        outputs: what to return in place of the head's outputs, (batch, D) -> (batch, C). Then the step ends at the
            first loss call.
    """
    step: Callable[..., Any] = getattr(pl_module, f"{stage}_step")
    arguments = (batch, batch_idx) if len(inspect.signature(step).parameters) > 1 else (batch,)
    watcher = LossWatcher(head, outputs=outputs, stop=outputs is not None)
    with torch.no_grad(), trainer.precision_plugin.forward_context(), suppress(LossReached), watcher:
        step(*arguments)
    return watcher.calls


def watch_next_step(pl_module: Any, head: nn.Module, check: Callable[[list[LossCall]], None]) -> None:
    """Let the next training step of a fit be watched while it runs as ever.

    Args:
        pl_module: the LightningModule.
        head: its head.
        check: is given the calls of a known loss on the outputs of the head, before the step returns.
    """
    step, replaced = pl_module.training_step, pl_module.__dict__.get("training_step")

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        del pl_module.__dict__["training_step"]
        if replaced is not None:
            pl_module.__dict__["training_step"] = replaced
        with LossWatcher(head) as watcher:
            outputs = step(*args, **kwargs)
        check(watcher.calls)
        return outputs

    pl_module.__dict__["training_step"] = watched


class StepBatches:
    """What a head is given and what it is trained on, over all batches of a loader; to be read any number of times.

    Each reading runs the module's own step on every batch, up to its loss.

    Args:
        trainer: the Trainer in whose fit this happens.
        loader: where the batches come from; its position in the fit is left alone.
        num_batches: most batches to read.
        read: returns head inputs (batch, D) and targets (batch,) of a batch and its index.
    """

    def __init__(
        self, trainer: Any, loader: Any, num_batches: float, read: Callable[[Any, int], tuple[Tensor, Tensor]]
    ) -> None:
        self._trainer = trainer
        self._loader = loader
        self._num_batches = num_batches
        self._read = read

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with without_a_trace(self._trainer.lightning_module):
            for batch_idx, batch in enumerate(untouched(self._loader)):
                if batch_idx >= self._num_batches:
                    return
                yield self._read(on_device(self._trainer, batch), batch_idx)


def on_device(trainer: Any, batch: Any) -> Any:
    """Return a batch as a step of the fit would get it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


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


def untouched(loader: Any) -> Iterator[Any]:
    """Yield the batches of a loader whose own iteration, which may be under way, goes on as if nothing happened.

    Samples that it repeats, so that all processes of a fit read as many, are left out.
    """
    twin = copy.copy(loader)
    if isinstance(twin, DataLoader):
        # Attributes of a DataLoader refuse to be set once it is built. Persistent workers belong to the original.
        twin.__dict__.update(_iterator=None)
        twin.__dict__["persistent_workers"] = False
        leave_out_repeats(twin)
    if hasattr(twin, "_restored"):
        twin._restored = None
    with _generators_as_before(loader):
        yield from twin


@contextmanager
def _generators_as_before(loader: Any) -> Iterator[None]:
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, getattr(batch_sampler, "sampler", None))
    generators = [g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def draws_at_random(loader: Any) -> bool:
    """Tell whether the same rows of a loader's dataset come out differently when they are read twice."""
    dataset: Any = getattr(loader, "dataset", None)
    sampler: Any = getattr(loader, "sampler", None)
    if not hasattr(dataset, "__getitem__") or sampler is None:
        return False
    if isinstance(sampler, DistributedSampler):
        sampler = WithoutRepeats(sampler)
    with isolate_rng(), _generators_as_before(loader):
        rows = next(iter(sampler), None)
        if rows is None:
            return False
        first, second = (tree_leaves(dataset[rows]) for _ in range(2))
    return any(
        isinstance(one, Tensor) and isinstance(other, Tensor) and not torch.equal(one, other)
        for one, other in zip(first, second, strict=True)
    )
