"""Sizes of modules and of what optimizers remember."""

import torch


def count_trainable(module: torch.nn.Module) -> int:
    """Return how many numbers in a module's parameters require gradients.

    Example:
        >>> count_trainable(torch.nn.Linear(4, 3))
        15
    """
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def count_bytes(state: object) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples.

    Example:
        >>> count_bytes({"step": 3, "moments": [torch.zeros(4), torch.zeros(4)]})
        32
    """
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(count_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(count_bytes(value) for value in state)
    return 0
