"""Keeping an optimizer in step with a head that was converted in the middle of training."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from glai_lightning.heads import GLAIHead


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
