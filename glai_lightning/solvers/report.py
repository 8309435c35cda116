"""What a solve hands back: a linear model, and an account of how it was found."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError


@dataclass(frozen=True)
class SolveReport:
    """What a solve did.

    Args:
        loss: training loss with the penalty, of the weights handed back.
        start_loss: the same of the weights at the start.
        gradient_norm: Euclidean norm of the gradient of ``loss``.
        start_gradient_norm: the same at the start.
        score: validation score of the weights handed back (accuracy in [0, 1]; minus the mean squared error of a
            regression), or ``None`` without validation.
        start_score: the same at the start.
        l2: strength of the penalty.
        steps: steps taken.
        best_step: the step whose weights were handed back; 0 means those at the start.
        passes: how many times the training data was read from beginning to end, for whatever purpose.
        seconds: wall-clock time.
        reason: why the solve stopped. ``"converged"``: the gradient is small beside that at the start.
            ``"no_progress"``: the loss no longer falls. ``"max_passes"``: no pass over the data is left.
            ``"validation"``: the validation score no longer rises. ``"closed_form"``: there was nothing to iterate.
    """

    loss: float
    start_loss: float
    gradient_norm: float
    start_gradient_norm: float
    score: float | None
    start_score: float | None
    l2: float
    steps: int
    best_step: int
    passes: int
    seconds: float
    reason: str


class LinearSolution(NamedTuple):
    """The weights that a solve found, and its report.

    Args:
        weight: (C, F).
        bias: (C,), or ``None`` for a model without.
        report: what the solve did.
    """

    weight: Tensor
    bias: Tensor | None
    report: SolveReport


def check_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Check the weight (C, F) and the bias (C,) that a solve starts from.

    Raises:
        TypeError: if one is not of a floating dtype.
        ValueError: if shapes disagree or a number is not finite.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise UserValueError(f"Expected `weight` to be of shape (outputs, features), but got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserValueError(f"Expected `bias` to be of shape ({len(weight)},), but got {tuple(bias.shape)}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise UserTypeError(f"Expected `{name}` to be of a floating dtype, but got {tensor.dtype}.")
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise UserValueError(f"Expected `{name}` to be finite, but got NaN or infinity.")
