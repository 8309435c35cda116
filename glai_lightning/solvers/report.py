"""What a solve hands back: a linear model, and an account of how it was found."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError, expect_number


@dataclass(frozen=True)
class SolveReport:
    """What a solve did. ``str`` makes a sentence of it.

    Args:
        loss: training loss with the penalty, of the weights handed back.
        start_loss: the same of the weights at the start.
        gradient_norm: Euclidean norm of the gradient of ``loss``.
        start_gradient_norm: the same at the start.
        score: validation score of the weights handed back (accuracy in [0, 1]; minus the mean squared error of a
            regression), or ``None`` where nothing was validated.
        start_score: the same at the start; ``None`` where ``score`` is.
        l2: strength of the penalty that was chosen; the mean over outputs where each has its own.
        tried: the strengths that were tried, in their order, each with the best score that it reached, ``None`` without
            validation.
        method: ``"quasi_newton"``, ``"minibatch"`` or ``"closed_form"``.
        steps: steps taken.
        best_step: the step whose weights were handed back; 0 means those at the start.
        passes: how many times the training data was read from beginning to end, for whatever purpose.
        seconds: wall-clock time.
        reason: why the solve stopped. ``"converged"``: the gradient is small beside that at the start.
            ``"no_progress"``: the loss no longer falls. ``"max_passes"``: no pass over the data is left.
            ``"validation"``: the validation score no longer rises. ``"path_end"``: all strengths were tried.
            ``"closed_form"``: there was nothing to iterate.
        held_out: rows of the training data that were held out to choose by, for want of validation data.
    """

    loss: float
    start_loss: float
    gradient_norm: float
    start_gradient_norm: float
    score: float | None
    start_score: float | None
    l2: float
    tried: tuple[tuple[float, float | None], ...]
    method: str
    steps: int
    best_step: int
    passes: int
    seconds: float
    reason: str
    held_out: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.passes} passes in {self.seconds:.2f} s, until {_REASONS.get(self.reason, self.reason)}; "
            f"loss {self.start_loss:.4g} before, {self.loss:.4g} now"
        )
        if self.score is not None and self.start_score is not None:
            text += f"; validation score {self.start_score:.4f} before, {self.score:.4f} now"
        text += f"; penalty l2 = {self.l2:.2g}"
        if len(self.tried) > 1:
            by = f"{self.held_out:,} training rows held out" if self.held_out else "validation"
            text += f", chosen from {len(self.tried)} by {by}"
        elif self.held_out:
            text += f"; {self.held_out:,} training rows were held out to choose by"
        return text + "."


#: The reasons for which a solve stops, in words that follow "until".
_REASONS = {
    "converged": "the gradient was small",
    "no_progress": "the loss no longer fell",
    "max_passes": "no pass was left",
    "validation": "the validation score no longer rose",
    "path_end": "all penalties were tried",
    "closed_form": "the closed form was computed",
}


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


def check_strengths(l2: float | list[float] | None) -> list[float] | None:
    """Check one or several strengths of a penalty, and return them from strong to weak; ``None`` stays.

    Raises:
        TypeError: if one is not a number.
        ValueError: if there is none, or one is negative or not finite.
    """
    if l2 is None:
        return None
    strengths = list(l2) if isinstance(l2, list | tuple) else [l2]
    if not strengths:
        raise UserValueError("Expected `l2` to be a number or several, but got none.")
    for strength in strengths:
        expect_number("l2", strength, low=0.0)
    return sorted({float(strength) for strength in strengths}, reverse=True)


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
