"""The first-order expansion of any head around its weights at the freeze, by forward-mode derivatives."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from glai_lightning.checks import UserValueError
from glai_lightning.heads.layout import HeadLayout, in_mode
from glai_lightning.heads.made_up import made_up_inputs
from glai_lightning.heads.record import record_of
from glai_lightning.heads.recording import call_with, unchanged


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linearised_outputs(
    layout: HeadLayout,
    forward: Callable[..., Any],
    references: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Evaluate f(x; W') + J(x; W') (W - W') up to the last Linear, this included, and what follows as it is.

    The head's own forward runs once, with the weights at the freeze W' and the direction W - W' carried beside them.

    Args:
        layout: the layout of the head, with the weights W as they are trained.
        forward: its forward.
        references: the weights W' at the freeze, by the names of those that are trained.
        args: what the head is given.
        kwargs: the same by name.

    Returns:
        What the forward returns, its tensors linear in the weights up to what follows the last Linear.
    """

    def summed(_: nn.Module, __: Any, outputs: Any) -> Any:
        return tree_map_only(Tensor, _sum, outputs)

    if torch.is_inference_mode_enabled():
        # Tensors that are made in inference mode carry no derivatives, in either mode.
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            return linearised_outputs(layout, forward, references, args, kwargs)
    with forward_mode.dual_level():
        duals = {
            name: forward_mode.make_dual(  # type: ignore[no-untyped-call]
                reference, layout.head.get_parameter(name) - reference
            )
            for name, reference in references.items()
        }
        handle = layout.output.register_forward_hook(summed)
        try:
            return summed(layout.head, (), call_with(layout.head, forward, duals, args, kwargs))
        finally:
            handle.remove()


def _sum(value: Tensor) -> Tensor:
    primal: Tensor
    tangent: Tensor | None
    primal, tangent = forward_mode.unpack_dual(value)  # type: ignore[no-untyped-call]
    return primal if tangent is None else primal + tangent


def check_linearised(head: nn.Module) -> None:
    """Check that what a head computes has forward-mode derivatives.

    Raises:
        ValueError: otherwise.
    """
    for inputs in made_up_inputs(head):
        forward = record_of(head).original.forward
        try:
            with unchanged(head), torch.no_grad():
                forward(head, inputs)
        except Exception:
            # The head does not take inputs of this shape.
            continue
        try:
            with unchanged(head), torch.no_grad(), in_mode([head], training=False):
                head.forward(inputs)
        except (RuntimeError, NotImplementedError) as error:
            raise UserValueError(
                f"Expected a head with derivatives in forward mode, for 'tangent' paths, but got one without "
                f"({str(error).splitlines()[0]})"
            ) from error
        return
