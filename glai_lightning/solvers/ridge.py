"""Ridge regression over fixed features: one pass for their statistics, one eigendecomposition for every strength."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.solvers.feature_batches import Batches, Data, FeatureBatches, as_batches, held_out_batches
from glai_lightning.solvers.head_weights import HeadSolver
from glai_lightning.solvers.moments import check_summable
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, check_linear, check_strengths
from glai_lightning.solvers.ridge_path import RidgePath
from glai_lightning.solvers.statistics import PathStatistics
from glai_lightning.solvers.statistics_kind import MIXED_TARGETS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RidgeSolver(HeadSolver):
    """Sets a frozen head's path weights to those of the smallest squared error plus a penalty, in closed form.

    What is minimised is half the mean squared error + l2 / 2 times the squared weights. The squared error is summed
    over outputs and averaged over samples; the bias is not penalised. With integer targets it is a classifier: the
    outputs are fitted to one-hot codes, a single output to -1 and 1. Of several strengths of the penalty, all solved by
    the same eigendecomposition, the one of the best score is used: accuracy of a classifier, squared error of a
    regression, on the validation data or, without, of the leave-one-out predictions of the training data,
    y - (y - f(x)) / (1 - leverage). Of equals the strongest penalty is used.

    Everything is computed in float64. Features may be constant, collinear, and fewer or more than the samples:
    directions with less than F times the machine epsilon of the largest variance get no weight. Among columns of scales
    1e8 apart the small ones are such directions; scale columns if they matter.

    Args:
        l2: strength of the penalty, at least 0, or several to choose from. Default: 17 strengths from 1e-6 to 100 times
            the mean variance of the path activations.

    Raises:
        ValueError: if a strength is out of range.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> head = freeze_structure(mlp_head(4, 8, 1))
        >>> inputs = torch.randn(60, 4)
        >>> RidgeSolver(l2=1e-6).solve(head, inputs, head(inputs).detach() + 1.0).reason
        'closed_form'
    """

    l2: float | list[float] | None = None

    def __post_init__(self) -> None:
        check_strengths(self.l2)

    def solve_features(
        self,
        features: Tensor | Batches | FeatureBatches,
        targets: Tensor | None = None,
        *,
        weight: Tensor,
        bias: Tensor | None = None,
        sample_weights: Tensor | None = None,
        validation: Data | FeatureBatches | None = None,
        group: "ProcessGroup | None" = None,
    ) -> LinearSolution:
        """Fit a linear model over fixed features.

        With a ``group``, the samples are those of all its processes, each of which reads its own. All end with the same
        weights, to the last bit, and where one raises an error all do.

        Args:
            features: (N, F), or a re-iterable of batches ((n, F), targets).
            targets: class labels (N,), integers in [0, C); or numbers of a floating dtype (N, C), (N,) for one output.
            weight: (C, F): its shape, dtype and device are those of the result. Not changed.
            bias: (C,), or ``None`` for a model without.
            sample_weights: ``None``: samples all count the same.
            validation: another (features, targets), or re-iterable of batches. The given weights are handed back where
                no solution scores better on it.
            group: the processes that share the samples, those of ``validation`` too; ``None`` for this one alone.

        Returns:
            ``weight`` (C, F) and ``bias`` (C,) or ``None``, and the report.

        Raises:
            TypeError: if dtypes are wrong, or batches can be read only once.
            ValueError: if shapes disagree, a label is out of range, numbers are not finite, or there is no sample.
            RuntimeError: if another process of the group raised an error.

        Example:
            >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
            >>> fit = RidgeSolver(l2=0.0).solve_features(
            ...     features, 2.0 * features + 1.0, weight=torch.zeros(1, 1), bias=torch.zeros(1)
            ... )
            >>> round(fit.weight.item(), 4), round(fit.bias.item(), 4)
            (2.0, 1.0)
        """
        began = time.perf_counter()
        processes = Processes(group, weight.device)
        with processes.failing_together():
            check_linear(weight, bias)
            batches = as_batches(features, targets, sample_weights, outputs=len(weight))
            held_out = held_out_batches(validation, outputs=len(weight))
            statistics = _statistics(batches, weight)
        covariances = statistics.all_reduce(group).covariances(centred=bias is not None)
        code = _Targets(len(weight), classification=statistics.classes is not None)
        path = RidgePath(
            covariances.difference() if code.classification and len(weight) == 1 else covariances,
            has_bias=bias is not None,
            strengths=check_strengths(self.l2),
        )
        start = weight.detach().double(), None if bias is None else bias.detach().double()
        passes, start_score, scores = 1, None, None
        if held_out is not None:
            candidates = len(path.strengths) + 1
            scored = _scored(held_out, code, weight, processes, candidates, lambda x, y: _with_start(path, *start, x))
            start_score, scores = float(scored[0].mean()), scored[1:]
        elif len(path.strengths) > 1:
            scores = _scored(batches, code, weight, processes, len(path.strengths), path.left_out)
            passes += 1
        # Of equal scores the first, for the strongest penalty.
        best = torch.zeros(1, dtype=torch.int64) if scores is None else scores.argmax(0)
        chosen = path.l2[best].expand(len(weight))
        score = None if start_score is None or scores is None else float(scores.amax(0).mean())
        kept = start_score is not None and score is not None and score <= start_score
        found_weight = start[0] if kept else path.weight(chosen)
        found_bias = start[1] if kept or bias is None else path.bias(found_weight)
        # The same in all processes, if their arithmetic is.
        found_weight = processes.from_first(found_weight.contiguous())
        if found_bias is not None:
            found_bias = processes.from_first(found_bias.contiguous())
        solution = path.solution(
            (found_weight, found_bias),
            start,
            chosen,
            scores=scores,
            score=score,
            start_score=start_score,
            kept=kept,
            passes=passes,
            began=began,
        )
        return LinearSolution(
            solution.weight.to(weight, copy=True),
            None if bias is None or solution.bias is None else solution.bias.to(bias, copy=True),
            solution.report,
        )


class _Targets:
    """What the outputs are fitted to: regression targets as they are, or codes of class labels.

    Labels are coded one-hot, and as -1 and 1 for a single output, so that in both cases the largest logit, or its sign,
    tells the class.

    Args:
        outputs: number C of outputs.
        classification: whether targets are class labels.
    """

    def __init__(self, outputs: int, *, classification: bool) -> None:
        self.outputs = outputs
        self.classification = classification

    def check(self, targets: Tensor) -> Tensor:
        """Return labels (n,) or numbers (n, C).

        Raises:
            TypeError: if some targets are labels and others are numbers.
            ValueError: if a shape is wrong, or a label out of range.
        """
        if targets.is_floating_point() == self.classification:
            raise UserTypeError(MIXED_TARGETS)
        if not self.classification:
            if targets.ndim == 1 and self.outputs == 1:
                targets = targets.unsqueeze(1)
            if targets.ndim != 2 or targets.shape[1] != self.outputs:
                raise UserValueError(
                    f"Expected targets of shape (samples, {self.outputs}), but got {tuple(targets.shape)}."
                )
            return targets.detach()
        if targets.ndim == 2 and targets.shape[1] == 1 and self.outputs == 1:
            targets = targets.squeeze(1)
        if targets.ndim != 1:
            raise UserValueError(f"Expected class labels of shape (samples,), but got {tuple(targets.shape)}.")
        labels, classes = targets.long(), max(self.outputs, 2)
        lowest, highest = (int(bound) for bound in labels.aminmax())
        if lowest < 0 or highest >= classes:
            raise UserValueError(f"Expected class labels in [0, {classes - 1}], but got {lowest} to {highest}.")
        return labels

    def encode(self, targets: Tensor) -> Tensor:
        """Return what the outputs are fitted to, (n, C) in float64."""
        targets = self.check(targets)
        if not self.classification:
            check_summable("targets", targets)
            return targets.double()
        if self.outputs == 1:
            return (2.0 * targets - 1.0).double().unsqueeze(1)
        return F.one_hot(targets, self.outputs).double()

    def scores(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        """Return the summed scores of outputs (G, n, C): correct classes (G, 1), or minus squared errors (G, C)."""
        if not self.classification:
            return -(outputs - encoded).square().sum(1)
        if self.outputs == 1:
            return ((outputs > 0.0) == (encoded > 0.0)).double().sum(1)
        return (outputs.argmax(2) == encoded.argmax(1)).double().sum(1, keepdim=True)


def _statistics(batches: FeatureBatches, weight: Tensor) -> PathStatistics:
    """Return the statistics of this process's samples, none if it has none."""
    code, statistics = None, PathStatistics(nn.Identity())
    for features, targets, sample_weights in batches:
        if sample_weights is not None:
            raise UserValueError("Expected no weights of samples for `RidgeSolver`, but got some.")
        if code is None:
            code = _Targets(len(weight), classification=not targets.is_floating_point())
            if code.classification:
                statistics = PathStatistics(nn.Identity(), classes=range(max(len(weight), 2)))
        checked = code.check(targets)
        _check_width(features, weight)
        statistics.update(features.to(weight.device), checked)
    return statistics


def _check_width(features: Tensor, weight: Tensor) -> None:
    if features.shape[1] != weight.shape[1]:
        raise UserValueError(f"Expected {weight.shape[1]} features a sample, but got {features.shape[1]}.")


def _with_start(path: RidgePath, weight: Tensor, bias: Tensor | None, features: Tensor) -> Tensor:
    """Return outputs of the weights at the start, and of all strengths after them, (1 + G, n, C)."""
    return torch.cat([F.linear(features, weight, bias).unsqueeze(0), path.outputs(features)[0]])


def _scored(
    batches: FeatureBatches,
    code: _Targets,
    weight: Tensor,
    processes: Processes,
    candidates: int,
    predict: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the mean scores over all samples of what G candidates predict from features and targets: (G, 1 or C)."""
    total = torch.zeros(candidates, 1 if code.classification else code.outputs, dtype=torch.float64).to(weight.device)
    samples = 0
    with processes.failing_together():
        for features, targets, _ in batches:
            encoded = code.encode(targets).to(weight.device)
            _check_width(features, weight)
            check_summable("validation features", features)
            total += code.scores(predict(features.to(weight.device, torch.float64), encoded), encoded)
            samples += len(encoded)
    (samples_of_all,) = processes.sum_numbers(samples)
    if not samples_of_all:
        raise UserValueError("Expected at least one validation sample, but got none.")
    return processes.sum(total) / samples_of_all
