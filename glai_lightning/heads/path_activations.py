"""What a frozen structure allows to compute once: the path activations, for the layers that are still trained."""

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer
from glai_lightning.heads.chain import FunctionStep, title
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.patterns import check_inputs


def output_layers(head: GLAIHead) -> nn.Sequential:
    """Return what a head with output paths does to its path activations.

    Args:
        head: a head frozen with output paths.

    Returns:
        The last Linear and whatever follows it, from (..., H) to (..., C): the very modules of the head, which trains
        with them.

    Raises:
        TypeError: if ``head`` is not a frozen head.
        ValueError: if the paths are not 'output'.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> head, x = freeze_structure(mlp_head(4, 8, 3)), torch.randn(5, 4)
        >>> torch.equal(output_layers(head)(head.path_activations(x)), head(x))
        True
    """
    _check_frozen(head)
    if head.paths != "output":
        raise UserValueError(f"Expected `paths` to be 'output' to train on path activations, but got {head.paths!r}.")
    functions = [title(step) for step in head.layout.trailing if isinstance(step, FunctionStep)]
    if functions:
        raise UserValueError(f"Expected modules alone after the last Linear of the head, but got `{functions[0]}`.")
    return nn.Sequential(head.layout.output, *head.layout.trailing)


@torch.no_grad()
def cache_path_activations(head: GLAIHead, inputs: Tensor, *, rows: int = 4096) -> Tensor:
    """Compute the path activations of inputs, so many at a time.

    Args:
        head: a head with a frozen structure.
        inputs: inputs (..., D).
        rows: inputs that are computed at a time.

    Returns:
        Path activations (..., F), on the device of the inputs.

    Raises:
        TypeError: if ``head`` is not a frozen head, ``inputs`` not a floating-point tensor, or ``rows`` not an integer.
        ValueError: if the inputs have another width, or ``rows`` is below 1.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> cache_path_activations(freeze_structure(mlp_head(4, 8, 3)), torch.randn(2, 5, 4)).shape
        torch.Size([2, 5, 8])
    """
    _check_frozen(head)
    check_inputs("inputs", inputs, head.layout)
    expect_integer("rows", rows, least=1)
    weight = head.layout.output.weight
    parts = [
        head.path_activations(part.to(weight.device, weight.dtype)).to(inputs.device)
        for part in torch.split(inputs.reshape(-1, inputs.shape[-1]), rows)
    ]
    features = torch.cat(parts)
    return features.view(*inputs.shape[:-1], features.shape[-1])


def _check_frozen(head: object) -> None:
    if not isinstance(head, GLAIHead):
        raise UserTypeError(f"Expected `head` to be a head that is frozen, but got `{type(head).__name__}`.")
