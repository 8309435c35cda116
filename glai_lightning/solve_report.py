"""What a solve says about itself."""

from dataclasses import dataclass


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
