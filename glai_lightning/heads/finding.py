"""Finding out what can be frozen in a module, from one call of it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glai_lightning.checks import UserError, UserTypeError, UserValueError
from glai_lightning.heads.chain import Chain
from glai_lightning.heads.joined import JoinedHead, remember_joined
from glai_lightning.heads.layout import HeadLayout, in_mode, read_head
from glai_lightning.heads.recording import CallRecorder, RecordedCall, is_layer, layer_sizes, unchanged


@dataclass(frozen=True)
class FoundHead:
    """A head that can be frozen.

    Args:
        name: what to give a callback as ``head``.
        widths: inputs, units of every activation, outputs.
        activations: names of the activations, by class or function.
        paths: the kinds of paths that it can be frozen with.
        multiply_adds: share of the multiply-adds of a forward of the whole module that is its own.
        parameters: share of the parameters of the whole module that is its own.
    """

    name: str
    widths: tuple[int, ...]
    activations: tuple[str, ...]
    paths: tuple[str, ...]
    multiply_adds: float
    parameters: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {'-'.join(map(str, self.widths))}, {', '.join(dict.fromkeys(self.activations))}; "
            f"{self.multiply_adds:.1%} of the multiply-adds, {self.parameters:.1%} of the parameters; "
            f"paths {', '.join(self.paths)}"
        )


def find_heads(module: nn.Module, batch: Any) -> list[FoundHead]:
    """List the heads in a module, from one call of it in eval mode that leaves no trace.

    A head is a module with an activation before its last Linear; of several around the same last Linear the smallest is
    listed. Where the layers of a head lie beside each other in a module that calls them itself, its name joins them by
    '+'. What was read is known from here on, so a head that takes more than one tensor can be frozen afterwards.

    Args:
        module: any module; for one with a ``training_step`` that is what is called.
        batch: what ``training_step``, or else the forward, takes: a tensor, a tuple of arguments, or a dict of them. A
            few samples are enough.

    Returns:
        The heads, in the order of the calls of their last Linear.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if it cannot be called with the batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)))
        >>> for head in find_heads(net, torch.randn(2, 6)):
        ...     print(head)
        1: 4-8-3, GELU; 70.0% of the multiply-adds, 70.5% of the parameters; paths output, tangent
    """
    if not isinstance(module, nn.Module):
        raise UserTypeError(f"Expected `module` to be a module, but got {module!r}.")
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    sizes: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    handles = [*_note_calls(module, given), *_note_sizes(module, sizes)]
    try:
        with unchanged(module), torch.no_grad(), in_mode([module], False), counter, CallRecorder(module) as recorder:
            _call(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    total = max(counter.get_total_flops() / 2, 1.0)
    best: dict[int, tuple[int, FoundHead]] = {}
    for name, layout in [*_read(module, given), *_joined(module, recorder)]:
        layers = _layers_of(name, layout.head)
        found = FoundHead(
            name=name,
            widths=layout.widths,
            activations=tuple(kind for kind, _ in layout.names.activations),
            paths=_paths_of(name, layout),
            multiply_adds=min(sum(sizes.get(layer, 0) for layer in layers) / total, 1.0),
            parameters=_count(layout.head) / max(_count(module), 1),
        )
        known = best.get(id(layout.output))
        if known is None or len(layers) < known[0]:
            best[id(layout.output)] = (len(layers), found)
    called = {id(call.module): position for position, call in enumerate(recorder.calls)}
    return [best[output][1] for output in sorted(best, key=lambda output: called.get(output, -1))]


def _layers_of(name: str, head: nn.Module) -> list[str]:
    own = [layer for layer, part in head.named_modules() if is_layer(part)]
    return [str(head.steps[int(layer)]) if isinstance(head, JoinedHead) else f"{name}.{layer}" for layer in own]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _paths_of(name: str, layout: HeadLayout) -> tuple[str, ...]:
    if "+" in name:
        return ("output",)
    return ("output", "tangent", *(["independent"] if isinstance(layout.names.chain, Chain) else []))


def _note_calls(module: nn.Module, given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Note what every module in which a head may be read is given by its first call."""

    def note(name: str) -> Any:
        return lambda _, args, kwargs: given.setdefault(name, (args, kwargs)) and None

    return [
        part.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, part in module.named_modules()
        if name and sum(map(is_layer, part.modules())) > 1
    ]


def _note_sizes(module: nn.Module, sizes: dict[str, int]) -> list[Any]:
    """Count the multiply-adds of every layer."""

    def note(name: str) -> Any:
        def count(layer: Any, _: Any, outputs: Tensor) -> None:
            sizes[name] = sizes.get(name, 0) + outputs.numel() * layer_sizes(layer)[0]

        return count

    return [part.register_forward_hook(note(name)) for name, part in module.named_modules() if is_layer(part)]


def _call(module: nn.Module, batch: Any) -> None:
    step: Any = getattr(module, "training_step", None)
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    with warnings.catch_warnings():
        # A LightningModule warns that what it logs goes nowhere.
        warnings.simplefilter("ignore")
        try:
            if step is not None:
                step(*(batch, 0)[: max(1, step.__code__.co_argcount - 1)])
            elif isinstance(batch, Mapping):
                module(**batch)
            else:
                module(*args)
        except Exception as error:
            called = "its forward" if step is None else "`training_step`"
            raise UserValueError(
                f"Expected `batch` to be what {called} of `{type(module).__name__}` takes, but it failed ({error})."
            ) from error


def _read(
    module: nn.Module, given: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> list[tuple[str, HeadLayout]]:
    found = []
    for name, (args, kwargs) in given.items():
        try:
            found.append((name, read_head(module.get_submodule(name), *args, **kwargs)))
        except UserError:
            continue
    return found


def _joined(module: nn.Module, recorder: CallRecorder) -> list[tuple[str, HeadLayout]]:
    found = []
    for chain in _chains(recorder.calls):
        name = "+".join(chain)
        try:
            found.append((name, read_head(remember_joined(module, name, recorder))))
        except UserError:
            continue
    return found


def _chains(calls: Sequence[RecordedCall]) -> list[list[str]]:
    """Return the names of layers between which every step takes what the one before computes, and nothing else."""
    chains: list[list[str]] = []
    open_chain = False
    for call in calls:
        open_chain = open_chain and call.follows
        if call.is_layer:
            if not open_chain:
                chains.append([])
            chains[-1].append(call.name)
            open_chain = True
    return [chain for chain in chains if len(chain) > 1 and len(set(chain)) == len(chain)]
