"""Keeping an optimizer in step with a head that is frozen or unfrozen in the middle of training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from glai_lightning.heads.frozen import frozen_parameters, replaced_parameters


def trains_any(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Tell whether an optimizer holds at least one parameter of a module."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for parameter in module.parameters())


def replace_parameters(optimizer: torch.optim.Optimizer, head: nn.Module) -> None:
    """Edit an optimizer in place, so that it trains what a head that was just frozen still trains.

    The optimizer, its groups and the lists in them stay the same objects: a scheduler goes on stepping them, and
    ``add_param_group`` would break OneCycleLR and ReduceLROnPlateau (pytorch#104361). New parameters take the
    position of those that they replace. Frozen parameters stay in their groups, where optimizers skip them for want of
    a gradient, so that position in the group still identifies every parameter in a checkpoint; their state is dropped.

    Args:
        optimizer: the optimizer that trained the head as an MLP.
        head: the frozen head.

    Example:
        >>> from glai_lightning.heads import freeze_in_place, mlp_head, unfreeze_in_place
        >>> head = mlp_head(4, 8, 3)
        >>> optimizer = torch.optim.Adam(head.parameters())
        >>> replace_parameters(optimizer, freeze_in_place(head, paths="independent"))
        >>> [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
        [(8, 4), (8,), (3, 8, 4), (3, 8), (3,)]
    """
    replaced = replaced_parameters(head)
    forget_state(optimizer, (*frozen_parameters(head), *replaced))
    _put(optimizer, {id(old): new for old, new in replaced.items()})


def _put(optimizer: torch.optim.Optimizer, others: Mapping[int, Sequence[tuple[str, Tensor]]]) -> None:
    """Put others, with the last parts of their names, in the place of some parameters, by the ids of these."""
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        entries = [
            entry
            for name, held in zip(names, group["params"], strict=True)
            for entry in (
                [(f"{name.rpartition('.')[0]}.{last}".lstrip("."), other) for last, other in others[id(held)]]
                if id(held) in others
                else [(name, held)]
            )
        ]
        group["params"][:] = [parameter for _, parameter in entries]
        if "param_names" in group:
            group["param_names"][:] = [name for name, _ in entries]


def copy_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
    """Copy what an optimizer remembers of the parameters of a module.

    Returns:
        For each parameter that it remembers something of, by its name in the module: that, copied.
    """
    return {
        name: tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, state)
        for name, parameter in module.named_parameters()
        if (state := optimizer.state.get(parameter))
    }


def restore_parameters(
    optimizer: torch.optim.Optimizer,
    head: nn.Module,
    unfreeze: Callable[[], object],
    state: Mapping[str, dict[str, Any]],
) -> None:
    """Unfreeze a head and edit an optimizer in place, so that it trains the MLP again: undo ``replace_parameters``.

    The optimizer, its groups and the lists in them stay the same objects, and every parameter gets its position back.
    LBFGS, which keeps one state for all of its parameters together, starts to remember anew.

    Args:
        optimizer: the optimizer that trained the frozen head.
        head: the frozen head.
        unfreeze: makes it the MLP that it was.
        state: what ``copy_state`` copied before the freeze.

    Example:
        >>> from glai_lightning.heads import freeze_in_place, mlp_head, unfreeze_in_place
        >>> head = mlp_head(4, 8, 3)
        >>> optimizer, weights = torch.optim.Adam(head.parameters()), head.state_dict()
        >>> replace_parameters(optimizer, freeze_in_place(head, paths="independent"))
        >>> restore_parameters(optimizer, head, lambda: unfreeze_in_place(head, weights), {})
        >>> [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
        [(8, 4), (8,), (3, 8), (3,)]
    """
    replaced = replaced_parameters(head)
    unfreeze()
    forget_state(optimizer, (*head.parameters(), *(new for news in replaced.values() for _, new in news)))
    own = {id(parameter): name.rpartition(".")[2] for name, parameter in head.named_parameters()}
    # The first of those that replaced a parameter stands where it stood, and the others go.
    back: dict[int, list[tuple[str, Tensor]]] = {id(new): [] for news in replaced.values() for _, new in news}
    _put(optimizer, back | {id(news[0][1]): [(own[id(old)], old)] for old, news in replaced.items()})
    remembered = {} if isinstance(optimizer, torch.optim.LBFGS) else state
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names.get(id(parameter)) in remembered:
                optimizer.state[parameter] = _placed(remembered[names[id(parameter)]], parameter, group)


def _placed(state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    # As `Optimizer.load_state_dict` does it: counts of steps stay on the CPU unless the device counts them.
    counts_on_device = group.get("capturable") or group.get("fused")
    return {
        name: value.to(parameter.device)
        if isinstance(value, Tensor) and (name != "step" or counts_on_device)
        else value
        for name, value in state.items()
    }


def optimizer_parameters(head: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a frozen head as an optimizer that held the MLP's goes on to hold them."""
    frozen = {id(parameter) for parameter in frozen_parameters(head)}
    return [p for p in head.parameters() if p.requires_grad or id(p) in frozen]


def forget_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Let an optimizer forget what it remembers of parameters that it no longer trains as it did.

    LBFGS keeps one state for all of its parameters together, so it forgets all: its curvature pairs would go on moving
    what is frozen, though no gradient of it is left.

    Args:
        optimizer: the optimizer that holds the parameters.
        parameters: the parameters that were frozen, replaced or set by a solve.
    """
    forgotten = list(parameters)
    for parameter in forgotten:
        optimizer.state.pop(parameter, None)
    if forgotten and isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None
