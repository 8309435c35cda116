"""Multinomial and binary logistic regression over fixed features, by quasi-Newton or averaged minibatch steps."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError, expect_choice, expect_integer, expect_number
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.solvers.cross_entropy import (
    Center,
    CrossEntropy,
    LogisticObjective,
    check_labelled,
    classification_accuracy,
)
from glai_lightning.solvers.feature_batches import (
    Batches,
    FeatureBatches,
    SystematicSample,
    as_batches,
    held_out_batches,
)
from glai_lightning.solvers.head_weights import HeadData, solve_head
from glai_lightning.solvers.lbfgs import LBFGS, Point
from glai_lightning.solvers.minibatch import AveragedAdam
from glai_lightning.solvers.preconditioner import CenteredFeatures, CovariancePreconditioner
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, SolveReport, check_linear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How the minimum is looked for.
Method = Literal["quasi_newton", "minibatch"]

#: Steps after which the preconditioner is made anew, once: by then the probabilities are near those of the solution.
_REFRESH_AFTER = 6
#: Classes beyond which a renewed preconditioner shares one covariance among all, as the first one does.
_CLASSES_WITH_OWN_COVARIANCE = 16
#: Rows of the sample that covariances are taken of, for each feature.
_SAMPLED_ROWS_PER_FEATURE = 4
#: Steps that are remembered.
_MEMORY = 30


@dataclass(frozen=True)
class LogisticSolver:
    """Sets a frozen head's path weights to those of the smallest mean cross-entropy + l2 / 2 times a penalty.

    The mean is that of ``torch.nn.functional.cross_entropy`` with the same class weights and label smoothing. One logit
    (C = 1) means binary cross-entropy, as the cross-entropy of the pair (0, logit). The penalty is

    - ``center="zero"``: the sum of the squared weights, without the bias;
    - ``center="current"``: the squared change of the logits from those of the given weights, summed over classes and
      averaged over samples (whatever the class weights). It does not depend on how features are scaled or rotated.

    By default the steps are those of L-BFGS, see ``LBFGS``, preconditioned by covariances of a sample of the features,
    see ``CovariancePreconditioner``, and start at the given weights. Each step reads the data once, and more often
    where the loss does not fall at once. Memory over batches is O(F^2 + F C + batch). With ``method="minibatch"`` they
    are steps of Adam, see ``AveragedAdam``, whose average comes near the minimum in about three passes and then
    approaches it slowly. With many classes that is cheaper than covariances, and often as good on new data as the
    minimum is. The same data in the same order gives the same result.

    Features may be constant, collinear, fewer or more than the samples, and of scales from 1e-8 to 1e8. The logits of a
    class without samples fall for as long as the solve runs. Where no minimum exists (separable classes, ``l2=0``) the
    weights grow until the solve stops, and are finite.

    Args:
        l2: strength of the penalty, at least 0.
        center: ``"zero"`` or ``"current"``.
        max_passes: most passes over the data, at least 2.
        class_weights: C numbers of at least 0; two for one logit.
        label_smoothing: in [0, 1).
        tolerance: quasi-Newton steps have converged when the norm of the gradient is this small beside that at the
            start.
        patience: with validation data, the solve stops after this many quasi-Newton steps, or passes of minibatch
            steps, without a better score.
        method: ``"quasi_newton"`` or ``"minibatch"``.
        learning_rate: of minibatch steps.
        batch_size: rows of a minibatch, in each process.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> head = freeze_structure(mlp_head(4, 8, 3))
        >>> inputs, targets = torch.randn(60, 4), torch.arange(60) % 3
        >>> report = LogisticSolver(l2=1e-2).solve(head, inputs, targets)
        >>> report.loss < report.start_loss
        True
    """

    l2: float = 1e-3
    center: Center = "current"
    max_passes: int = 6
    class_weights: list[float] | None = None
    label_smoothing: float = 0.0
    tolerance: float = 1e-4
    patience: int = 2
    method: Method = "quasi_newton"
    learning_rate: float = 5e-3
    batch_size: int = 256

    def __post_init__(self) -> None:
        expect_number("l2", self.l2, low=0.0)
        expect_choice("center", self.center, ("zero", "current"))
        expect_number("label_smoothing", self.label_smoothing, low=0.0, high=1.0, below=True)
        expect_integer("max_passes", self.max_passes, least=2)
        expect_number("tolerance", self.tolerance, low=0.0, high=1.0, below=True)
        expect_integer("patience", self.patience, least=1)
        expect_choice("method", self.method, ("quasi_newton", "minibatch"))
        expect_number("learning_rate", self.learning_rate, low=0.0, above=True)
        expect_integer("batch_size", self.batch_size, least=1)

    def solve(
        self,
        head: GLAIHead,
        inputs: Tensor | Batches,
        targets: Tensor | None = None,
        *,
        validation: HeadData | None = None,
        group: "ProcessGroup | None" = None,
    ) -> SolveReport:
        """Set the path weights of a head in place.

        Args:
            head: a head with output or independent paths, from (N, D) to (N, C). Its mode is left as it is.
            inputs: (N, D), or a re-iterable of (inputs, targets) batches: then path activations are computed anew in
                every pass, and never held all at once.
            targets: class labels (N,), or ``None`` where ``inputs`` yields them.
            validation: (inputs, targets), or batches of them; with it the head is never worse on them than before.
            group: the processes of ``torch.distributed`` that share the data, each reading its own part; all end with
                the same weights. ``None`` for this process alone.

        Returns:
            What the solve did.

        Raises:
            TypeError: if ``head`` is not frozen, or dtypes are wrong.
            ValueError: if the head is not linear in its path weights, or the data is not what it has to be, see
                ``solve_features``. The head is then as it was.
            RuntimeError: if another process of the group raised an error.
        """
        return solve_head(self.solve_features, head, inputs, targets, validation=validation, group=group)

    def solve_features(
        self,
        features: Tensor | Batches | FeatureBatches,
        targets: Tensor | None = None,
        *,
        weight: Tensor,
        bias: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | Batches | FeatureBatches | None = None,
        group: "ProcessGroup | None" = None,
    ) -> LinearSolution:
        """Fit a linear classifier over fixed features.

        With a ``group``, the samples are those of all its processes, each of which reads its own. All end with the same
        weights, to the last bit, and where one raises an error all do.

        Args:
            features: (N, F), or a re-iterable of batches ((n, F), (n,)).
            targets: class labels (N,), integers in [0, C); for one logit also bool, or 0.0 and 1.0, and of shape
                (N, 1).
            weight: (C, F), where to start; not changed. Computed in float64 if this or a tensor of features is in it,
                in float32 otherwise.
            bias: (C,), or ``None`` for a model without.
            validation: another (features, targets), or re-iterable of batches. The weights of the best accuracy are
                handed back, of equals the first, those at the start included.
            group: the processes that share the samples, those of ``validation`` too; ``None`` for this one alone.

        Returns:
            ``weight`` (C, F) and ``bias`` (C,) or ``None``, in the dtype and on the device of those given, and the
            report. With minibatches its losses and gradients are those of a sample of the data, spread evenly over it.

        Raises:
            TypeError: if dtypes are wrong, or batches can be read only once.
            ValueError: if shapes disagree, a label is out of range, numbers are not finite, or there is no sample.
            RuntimeError: if another process of the group raised an error.

        Example:
            >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
            >>> targets = torch.tensor([0, 0, 1, 1])
            >>> solver = LogisticSolver(center="zero", max_passes=30)
            >>> weight, bias, report = solver.solve_features(
            ...     features, targets, weight=torch.zeros(2, 1), bias=torch.zeros(2)
            ... )
            >>> (features @ weight.T + bias).argmax(1), report.reason
            (tensor([0, 0, 1, 1]), 'converged')
        """
        began = time.perf_counter()
        processes = Processes(group, weight.device)
        with processes.failing_together():
            check_linear(weight, bias)
            batches = as_batches(features, targets, outputs=len(weight))
            held_out = held_out_batches(validation, outputs=len(weight))
        if held_out is not None:
            check_labelled(held_out, weight, processes=processes)
        start = weight.detach().to(_compute_dtype(batches.features, weight, processes))
        start = torch.cat([start] if bias is None else [start, bias.detach().to(start).unsqueeze(1)], dim=1)
        processes.from_first(start)
        objective = LogisticObjective(
            batches,
            start,
            has_bias=bias is not None,
            cross_entropy=CrossEntropy(_class_weights(self.class_weights, start), self.label_smoothing),
            l2=self.l2,
            center=self.center,
            processes=processes,
        )
        descent: _Descent | _AveragedDescent
        if self.method == "minibatch":
            steps = AveragedAdam(objective, learning_rate=self.learning_rate, batch_size=self.batch_size)
            descent = _AveragedDescent(steps, held_out, max_passes=self.max_passes)
        else:
            descent = _Descent(objective, held_out, max_passes=self.max_passes)
        reason = descent.run(tolerance=self.tolerance, patience=self.patience)
        begin, best = descent.begin, descent.best
        # The same in all processes, if their arithmetic is.
        best_weights = processes.from_first(best.weights.clone())
        solved = best_weights.to(weight)
        return LinearSolution(
            weight=solved if bias is None else solved[:, :-1].contiguous(),
            bias=None if bias is None else best_weights[:, -1].to(bias, copy=True),
            report=SolveReport(
                loss=best.loss,
                start_loss=begin.loss,
                gradient_norm=float(best.gradient.norm()),
                start_gradient_norm=float(begin.gradient.norm()),
                score=descent.score,
                start_score=descent.start_score,
                l2=self.l2,
                steps=descent.steps,
                best_step=descent.best_step,
                passes=descent.passes,
                seconds=time.perf_counter() - began,
                reason=reason,
            ),
        )


class _Descent:
    """The steps of one solve: where they began, where they are, and the best of them."""

    def __init__(self, objective: LogisticObjective, held_out: FeatureBatches | None, *, max_passes: int) -> None:
        self._objective = objective
        self._held_out = held_out
        self._max_passes = max_passes
        rows = max(1024, _SAMPLED_ROWS_PER_FEATURE * objective.start.shape[1])
        self._sample = SystematicSample(math.ceil(rows / objective.processes.count), objective.batches.samples)
        self.begin = self.best = objective.begin(self._sample)
        self._centered = CenteredFeatures.of(
            self._sample.collect()[0], has_bias=objective.has_bias, processes=objective.processes
        )
        preconditioner = self._preconditioner(self.begin, blocks=1)
        self._minimiser = LBFGS(objective, self.begin, preconditioner, memory=min(_MEMORY, max_passes))
        self.steps = self.best_step = 0
        self.score = self.start_score = self._score(self.begin)

    def run(self, *, tolerance: float, patience: int) -> str:
        """Step until there is a reason to stop, and return it."""
        small = tolerance * float(self.begin.gradient.norm())
        while float(self._minimiser.point.gradient.norm()) > small:
            passes_left = self._max_passes - self._objective.passes
            if passes_left <= 0:
                return "max_passes"
            if self.steps == _REFRESH_AFTER:
                self._minimiser.precondition(self._preconditioner(self._minimiser.point, blocks=self._blocks()))
            before = self._minimiser.point
            if not self._minimiser.step(passes_left):
                return "no_progress" if self._objective.passes < self._max_passes else "max_passes"
            self.steps += 1
            self._keep_if_better()
            if self.steps - self.best_step >= patience:
                return "validation"
            if _is_standstill(before, self._minimiser.point):
                return "no_progress"
        return "converged"

    @property
    def passes(self) -> int:
        """How many times the data was read."""
        return self._objective.passes

    def _keep_if_better(self) -> None:
        score = self._score(self._minimiser.point)
        if score is None or self.score is None or score > self.score:
            self.best, self.best_step, self.score = self._minimiser.point, self.steps, score

    def _score(self, point: Point) -> float | None:
        if self._held_out is None:
            return None
        return classification_accuracy(
            point.weights, self._held_out, has_bias=self._objective.has_bias, processes=self._objective.processes
        )

    def _preconditioner(self, point: Point, *, blocks: int) -> CovariancePreconditioner:
        features, labels = self._sample.collect()
        return self._objective.preconditioner(self._centered, features, labels, point.weights, blocks=blocks)

    def _blocks(self) -> int:
        """Return how many covariances a renewed preconditioner has.

        With few classes a covariance costs more than a pass, yet one for each rotated class pays: it halves the number
        of passes. With many classes, sharing several among them was measured to save no pass.
        """
        classes = len(self.begin.weights)
        return max(classes - 1, 1) if classes <= _CLASSES_WITH_OWN_COVARIANCE else 1


class _AveragedDescent:
    """The averages of one solve after each of its passes, and the best of them."""

    def __init__(self, adam: AveragedAdam, held_out: FeatureBatches | None, *, max_passes: int) -> None:
        self._adam = adam
        self._held_out = held_out
        self._max_passes = max_passes
        self.best_step = 0
        self.score = self.start_score = self._score(adam.objective.start)

    def run(self, *, tolerance: float, patience: int) -> str:
        """Make all passes, fewer if validation says so, and return the reason to stop; there is no ``tolerance``."""
        best, best_pass, reason = self._adam.objective.start, 1, "max_passes"
        # The average of the first pass is of weights on their way, and dropped after it.
        self._adam.make_pass()
        while self._adam.passes < self._max_passes:
            average = self._adam.make_pass()
            score = self._score(average)
            if score is None or self.score is None or score > self.score:
                best, best_pass, self.best_step, self.score = average, self._adam.passes, self._adam.steps, score
            if self._adam.passes - best_pass >= patience:
                reason = "validation"
                break
        objective = self._adam.sampled_objective()
        self.begin = objective.begin(SystematicSample(1))
        self.best = Point(best, *objective(best)) if self.best_step else self.begin
        return reason

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return self._adam.steps

    @property
    def passes(self) -> int:
        """How many times the data was read."""
        return self._adam.passes

    def _score(self, weights: Tensor) -> float | None:
        if self._held_out is None:
            return None
        objective = self._adam.objective
        return classification_accuracy(
            weights, self._held_out, has_bias=objective.has_bias, processes=objective.processes
        )


def _is_standstill(before: Point, after: Point) -> bool:
    resolution = 1e-2 * torch.finfo(before.weights.dtype).eps * abs(before.loss)
    return before.loss - after.loss <= resolution and bool(after.gradient.norm() >= before.gradient.norm())


def _class_weights(given: list[float] | None, start: Tensor) -> Tensor:
    classes = max(len(start), 2)
    if given is None:
        return start.new_ones(classes)
    weights = torch.tensor(given, dtype=start.dtype, device=start.device)
    if weights.shape != (classes,):
        raise UserValueError(f"Expected `class_weights` to be {classes} numbers, but got shape {tuple(weights.shape)}.")
    if not bool((weights.isfinite() & (weights >= 0.0)).all()):
        raise UserValueError(f"Expected `class_weights` to be finite and at least 0, but got {weights.tolist()}.")
    return weights


def _compute_dtype(features: object, weight: Tensor, processes: Processes) -> torch.dtype:
    doubled = weight.dtype is torch.float64 or (isinstance(features, Tensor) and features.dtype is torch.float64)
    return torch.float64 if processes.sum_numbers(doubled) != [0.0] else torch.float32
