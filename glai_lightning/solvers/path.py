"""Solving for one strength of a penalty after the other, and keeping the weights that validate best."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glai_lightning.solvers.lbfgs import LBFGS, Point
from glai_lightning.solvers.minibatch import AveragedAdam
from glai_lightning.solvers.objective import HeldOut, LinearModel, MeanLoss, Penalised
from glai_lightning.solvers.preconditioner import CovariancePreconditioner, FeatureSpectrum

#: Strengths in a row without a better score or loss, after which the rest of a path is left out.
_PATH_PATIENCE = 0
#: Rows of the sample by whose probabilities the curvature is estimated anew for every strength.
_CURVATURE_ROWS = 1024


@dataclass(frozen=True)
class Stopping:
    """When a solve stops: see ``LogisticSolver``."""

    max_passes: int
    tolerance: float
    patience: int


@dataclass(frozen=True)
class Candidate:
    """Weights that were found, with their strength of the penalty, the number of steps to them, and how they validate.

    Args:
        point: the weights with the training loss and gradient, or ``None`` where these are not known.
    """

    weights: Tensor
    l2: float
    step: int
    score: float | None
    negative_loss: float
    point: Point | None = None

    def validates_better(self, other: "Candidate") -> bool:
        """Tell whether the score is higher, or as high with a lower loss."""
        if self.score is None or other.score is None:
            return self.step > other.step
        return (self.score, self.negative_loss) > (other.score, other.negative_loss)


class Candidates:
    """The weights of a solve that validate best; without held-out data, the last.

    Args:
        held_out: scores weights, or ``None`` where there is nothing to validate on.
    """

    def __init__(self, held_out: HeldOut | None) -> None:
        self.tried: dict[float, float | None] = {}
        self.best: Candidate | None = None
        self._held_out = held_out
        self._start: Candidate
        self._highest = -torch.inf

    def begin(self, weights: Tensor) -> None:
        """Take the weights at the start, which are handed back where no others are better."""
        self._start = self._validated(weights, 0.0, 0, None)

    @property
    def start_score(self) -> float | None:
        """Score of the weights at the start."""
        return self._start.score

    def add(self, weights: Tensor, l2: float, step: int, point: Point | None = None) -> bool:
        """Take weights that were found, and return whether their score or their loss is the best so far."""
        candidate = self._validated(weights, l2, step, point)
        better = self.best is None or candidate.validates_better(self.best)
        if better:
            self.best = candidate
        lower_loss = candidate.negative_loss > self._highest
        self._highest = max(self._highest, candidate.negative_loss)
        before = self.tried.get(l2)
        self.tried[l2] = candidate.score if before is None else max(before, candidate.score or before)
        return better or lower_loss

    def chosen(self) -> Candidate:
        """Return the best, that at the start included."""
        if self.best is None or not self.best.validates_better(self._start):
            l2 = next(iter(self.tried), 0.0) if self.best is None else self.best.l2
            return Candidate(self._start.weights, l2, 0, self._start.score, self._start.negative_loss)
        return self.best

    def _validated(self, weights: Tensor, l2: float, step: int, point: Point | None) -> Candidate:
        score, negative_loss = (None, -torch.inf) if self._held_out is None else self._held_out(weights)
        return Candidate(weights, l2, step, score, negative_loss, point)


class QuasiNewtonPath:
    """Steps of L-BFGS along a path of strengths, and then at the best of them.

    Args:
        mean_loss: what is minimised, without the penalty.
        begin: the weights at the start, with the loss and the gradient there.
        spectrum: of the features.
        sampled: a sample of the features, (S, F).
        candidates: validates the weights after each step.
        stopping: when to stop.
    """

    def __init__(
        self,
        mean_loss: MeanLoss,
        begin: Point,
        spectrum: FeatureSpectrum,
        sampled: Tensor,
        candidates: Candidates,
        stopping: Stopping,
    ) -> None:
        self.steps = 0
        self._mean_loss = mean_loss
        self._begin = begin
        self._spectrum = spectrum
        self._sampled = sampled[:: max(1, len(sampled) // _CURVATURE_ROWS)]
        self._candidates = candidates
        self._stopping = stopping
        self._l2 = 0.0
        self._minimiser: LBFGS

    def run(self, strengths: list[float]) -> str:
        """Solve for strengths, from strong to weak, and return why the solve stopped."""
        self._l2 = strengths[0]
        objective = Penalised(self._mean_loss, self._l2)
        start = objective.moved(self._begin, 0.0)
        self._minimiser = LBFGS(
            objective, start, self._preconditioner(start.weights, self._l2), memory=self._stopping.max_passes
        )
        small = self._stopping.tolerance * self._minimiser.gradient_norm()
        if len(strengths) > 1 and self._follow(strengths):
            best = self._candidates.best
            assert best is not None
            assert best.point is not None
            self._go_on_with(best.l2, best.point, best.l2)
        return self._converge(small)

    def _follow(self, strengths: list[float]) -> bool:
        """Make a step for each strength while they validate better, and return whether there was one."""
        worse = 0
        for l2 in strengths:
            if self._passes_left <= 0 or worse > _PATH_PATIENCE:
                break
            if l2 != self._l2:
                self._go_on_with(l2, self._minimiser.point, self._l2)
            if self._minimiser.step(self._passes_left):
                worse = 0 if self._took_step() else worse + 1
        return self.steps > 0

    def _converge(self, small: float) -> str:
        """Make steps at one strength until there is a reason to stop, and return it."""
        worse = 0
        while self._minimiser.gradient_norm() > small:
            if self._passes_left <= 0:
                return "max_passes"
            before, best = self._minimiser.point, self._candidates.best
            if not self._minimiser.step(self._passes_left):
                return "no_progress" if self._passes_left > 0 else "max_passes"
            self._took_step()
            worse = 0 if self._candidates.best is not best else worse + 1
            if worse >= self._stopping.patience:
                return "validation"
            if _is_standstill(before, self._minimiser.point):
                return "no_progress"
        return "converged"

    @property
    def _passes_left(self) -> int:
        return self._stopping.max_passes - self._mean_loss.passes

    def _took_step(self) -> bool:
        self.steps += 1
        point = self._minimiser.point
        return self._candidates.add(point.weights, self._l2, self.steps, point)

    def _go_on_with(self, l2: float, point: Point, l2_there: float) -> None:
        change, objective = l2 - self._l2, Penalised(self._mean_loss, l2)
        model = self._mean_loss.model
        self._l2 = l2
        self._minimiser.change_objective(
            objective,
            objective.moved(point, l2_there),
            self._preconditioner(point.weights, l2),
            lambda step: change * model.without_bias(step),
        )

    def _preconditioner(self, weights: Tensor, l2: float) -> CovariancePreconditioner:
        model: LinearModel = self._mean_loss.model
        return self._spectrum.preconditioner(*model.loss.curvature(model.logits(weights, self._sampled)), l2)


def follow_averages(
    mean_loss: MeanLoss, adam: AveragedAdam, strengths: list[float], candidates: Candidates, stopping: Stopping
) -> str:
    """Make a pass of averaged minibatch steps for each strength, or several for a single one; return why it stopped."""
    # The last pass is for the loss of the weights that are chosen.
    passes = stopping.max_passes - 2
    order = strengths[:passes] if len(strengths) > 1 else strengths * max(passes, 1)
    worse = 0
    for l2 in order:
        mean_loss.passes += 1
        worse = 0 if candidates.add(adam.make_pass(l2), l2, adam.steps) else worse + 1
        if worse >= stopping.patience:
            return "validation"
    return "path_end" if len(strengths) == len(order) else "max_passes"


def _is_standstill(before: Point, after: Point) -> bool:
    resolution = 1e-2 * torch.finfo(before.weights.dtype).eps * abs(before.loss)
    return before.loss - after.loss <= resolution and bool(after.gradient.norm() >= before.gradient.norm())
