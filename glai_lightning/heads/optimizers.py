"""Keeping an optimizer in step with a head that was converted in the middle of training."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from glai_lightning.heads.frozen import GLAIHead


def trains_any(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Tell whether an optimizer holds at least one parameter of a module."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for parameter in module.parameters())


def follow_conversion(optimizer: torch.optim.Optimizer, head: GLAIHead) -> None:
    """Edit an optimizer in place, so that it goes on with what a converted head trains.

    The optimizer, its groups and the lists in them stay the same objects: a scheduler goes on stepping them, and
    ``add_param_group`` would break OneCycleLR and ReduceLROnPlateau (pytorch#104361). New parameters take the
    position of those that they replace. Frozen parameters stay in their groups, where optimizers skip them for want of
    a gradient, so that position in the group still identifies every parameter in a checkpoint; their state is dropped.

    Args:
        optimizer: the optimizer that trained the head as an MLP.
        head: the head after ``GLAIHead.adopt``.

    Example:
        >>> from glai_lightning import GLAIHead, mlp_head
        >>> mlp = mlp_head(4, 8, 3)
        >>> optimizer = torch.optim.Adam(mlp.parameters())
        >>> follow_conversion(optimizer, GLAIHead.adopt(mlp, paths="independent"))
        >>> [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
        [(8, 4), (8,), (3, 8, 4), (3, 8), (3,)]
    """
    replaced = {id(old): new for old, new in head.replaced_parameters().items()}
    forget_state(optimizer, (*head.frozen_parameters(), *head.replaced_parameters()))
    for group in optimizer.param_groups:
        group["params"][:] = [parameter for held in group["params"] for parameter in replaced.get(id(held), [held])]


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


def follow_thaw(
    optimizer: torch.optim.Optimizer, head: GLAIHead, mlp: nn.Module, state: Mapping[str, dict[str, Any]]
) -> None:
    """Edit an optimizer in place, so that it goes on with the MLP that a frozen head was: undo ``follow_conversion``.

    The optimizer, its groups and the lists in them stay the same objects, and every parameter gets its position back.
    LBFGS, which keeps one state for all of its parameters together, starts to remember anew.

    Args:
        optimizer: the optimizer that trained the head.
        head: the frozen head.
        mlp: what ``head.thaw`` returned.
        state: what ``copy_state`` copied before the freeze.

    Example:
        >>> from glai_lightning import GLAIHead, mlp_head
        >>> mlp = mlp_head(4, 8, 3)
        >>> optimizer, weights = torch.optim.Adam(mlp.parameters()), mlp.state_dict()
        >>> head = GLAIHead.adopt(mlp, paths="independent")
        >>> follow_conversion(optimizer, head)
        >>> follow_thaw(optimizer, head, head.thaw(weights), {})
        >>> [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
        [(8, 4), (8,), (3, 8), (3,)]
    """
    replaced = head.replaced_parameters()
    forget_state(optimizer, (*mlp.parameters(), *(new for news in replaced.values() for new in news)))
    # The first of those that replaced a parameter stands where it stood, and the others go.
    back: dict[int, list[Tensor]] = {id(new): [] for news in replaced.values() for new in news}
    back |= {id(news[0]): [old] for old, news in replaced.items()}
    remembered = {} if isinstance(optimizer, torch.optim.LBFGS) else state
    names = {id(parameter): name for name, parameter in mlp.named_parameters()}
    for group in optimizer.param_groups:
        group["params"][:] = [parameter for held in group["params"] for parameter in back.get(id(held), [held])]
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
