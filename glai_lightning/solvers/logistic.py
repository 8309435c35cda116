"""Multinomial and binary logistic regression over fixed features, along a path of strengths of the penalty."""

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from glai_lightning.checks import expect_choice, expect_integer, expect_number
from glai_lightning.solvers.cross_entropy import LossName, make_loss
from glai_lightning.solvers.feature_batches import (
    Batches,
    Data,
    FeatureBatches,
    SystematicSample,
    as_batches,
    held_out_batches,
)
from glai_lightning.solvers.head_weights import HeadSolver
from glai_lightning.solvers.lbfgs import Point
from glai_lightning.solvers.minibatch import BATCH_SIZE, AveragedAdam
from glai_lightning.solvers.objective import HeldOut, LinearModel, MeanLoss, Penalised
from glai_lightning.solvers.path import Candidates, QuasiNewtonPath, Stopping, follow_averages
from glai_lightning.solvers.preconditioner import FeatureSpectrum
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, SolveReport, check_linear, check_strengths

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Strengths of the default path, from strong to weak, relative to the mean variance of the features.
RELATIVE_PATH = tuple(10.0 ** (-1.0 - 2.0 * step / 3.0) for step in range(7))

#: Rows of the sample of the features, for each feature, and at most where there are many features.
_SAMPLED_ROWS_PER_FEATURE, _MOST_SAMPLED_ROWS = 4, 16384
#: Outputs beyond which minibatch steps are made: quasi-Newton steps remember two matrices of all weights each.
_MOST_QUASI_NEWTON_OUTPUTS = 1024
#: Multiply-adds of quasi-Newton steps that are not worth saving, and how many times fewer others have to be.
_FEW_MULTIPLY_ADDS, _WORTH_SAVING = 1e11, 10.0


@dataclass(frozen=True)
class LogisticSolver(HeadSolver):
    """Sets a frozen head's path weights to those of the smallest mean cross-entropy + l2 / 2 times their squared norm.

    The mean is that of ``torch.nn.functional.cross_entropy`` or ``binary_cross_entropy_with_logits`` with the same
    weights of classes and label smoothing, taken by the weights of samples where there are any. The output bias is not
    penalised.

    Several strengths are solved from strong to weak, each from where the last one ended. The weights of the best
    validation score are kept, of equal scores those of the lowest validation loss; the weights at the start are one of
    the candidates. Without validation data, and with a choice to make, a tenth of the training rows is held out and
    used instead; what a row holds decides whether it is. The report says so.

    Each strength of a path gets one quasi-Newton step, see ``LBFGS``, preconditioned by one eigendecomposition of the
    features' covariance, see ``CovariancePreconditioner``. The path ends where neither the score nor the loss on
    validation data gets better; the rest of the passes goes into more steps at the best strength. A single strength
    gets all steps. With more than 1,024 outputs, or where the eigendecomposition costs too much, the steps are those of
    averaged minibatches, see ``AveragedAdam``, one pass for each strength. Memory is O(F^2 + max_passes F C + batch)
    with quasi-Newton steps and O(F C + batch) with minibatches. The same data in the same order gives the same result.

    Features may be constant, collinear, fewer or more than the samples, and of any scale that float32 holds. Where no
    minimum exists (separable classes, ``l2=0``) the weights grow until the solve stops, and are finite.

    Args:
        l2: strength of the penalty, at least 0; several to choose from; or ``None`` for seven strengths from 1e-1 to
            1e-5 times the mean variance of the path activations.
        class_weights: a number of at least 0 for each class, two for a single logit. With binary cross-entropy as the
            loss, one for each output: what a target of 1 counts (``pos_weight`` of PyTorch).
        label_smoothing: in [0, 1).
        max_passes: most passes over the data, at least 2.
        tolerance: quasi-Newton steps have converged when the norm of the gradient, in the metric of the preconditioner,
            is this small beside that at the start.
        patience: with validation data, the solve stops after this many steps at one strength without a better score.
        loss: ``"cross_entropy"`` of class labels (N,) or of probabilities (N, C), which for a single logit is binary;
            or ``"binary_cross_entropy"`` of targets (N, C) in [0, 1], each output by itself.

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

    l2: float | list[float] | None = None
    class_weights: list[float] | None = None
    label_smoothing: float = 0.0
    max_passes: int = 12
    tolerance: float = 1e-4
    patience: int = 2
    loss: LossName = "cross_entropy"

    def __post_init__(self) -> None:
        check_strengths(self.l2)
        expect_number("label_smoothing", self.label_smoothing, low=0.0, high=1.0, below=True)
        expect_integer("max_passes", self.max_passes, least=2)
        expect_number("tolerance", self.tolerance, low=0.0, high=1.0, below=True)
        expect_integer("patience", self.patience, least=1)
        expect_choice("loss", self.loss, ("cross_entropy", "binary_cross_entropy"))

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
            features: (N, F), or a re-iterable of batches, see ``solve``.
            targets: class labels (N,), integers in [0, C), for one logit also bool, or 0.0 and 1.0, and of shape
                (N, 1); or floating numbers in [0, 1] (N, C), see ``loss``.
            weight: (C, F), where to start; not changed. Computed in float64 if this or a tensor of features is in it,
                in float32 otherwise.
            bias: (C,), or ``None`` for a model without.
            sample_weights: (N,), or ``None``.
            validation: another (features, targets) or (features, targets, weights), or re-iterable of batches.
            group: the processes that share the samples, those of ``validation`` too; ``None`` for this one alone.

        Returns:
            ``weight`` (C, F) and ``bias`` (C,) or ``None``, in the dtype and on the device of those given, and the
            report.

        Raises:
            TypeError: if dtypes are wrong, or batches can be read only once.
            ValueError: if shapes disagree, a target is out of range, numbers are not finite, or there is no sample.
            RuntimeError: if another process of the group raised an error.

        Example:
            >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
            >>> targets = torch.tensor([0, 0, 1, 1])
            >>> solver = LogisticSolver(l2=1e-3, max_passes=30)
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
            batches = as_batches(features, targets, sample_weights, outputs=len(weight))
            held_out = held_out_batches(validation, outputs=len(weight))
        start = weight.detach().to(_compute_dtype(batches.features, weight, processes))
        start = torch.cat([start] if bias is None else [start, bias.detach().to(start).unsqueeze(1)], dim=1)
        processes.from_first(start)
        loss = make_loss(self.loss, self.class_weights, self.label_smoothing, outputs=len(weight), like=start)
        model = LinearModel(start, has_bias=bias is not None, loss=loss, processes=processes)
        own_held_out = 0
        if held_out is None and not _is_single(self.l2):
            batches, held_out, own_held_out = _held_out_part(batches, processes)
        point, report = self._solve(model, batches, held_out)
        # The same in all processes, if their arithmetic is.
        best = processes.from_first(point.weights.clone())
        return LinearSolution(
            weight=best[:, : model.num_features].to(weight, copy=True).contiguous(),
            bias=None if bias is None else best[:, -1].to(bias, copy=True),
            report=replace(report, seconds=time.perf_counter() - began, held_out=own_held_out),
        )

    def _solve(
        self, model: LinearModel, batches: FeatureBatches, held_out: FeatureBatches | None
    ) -> tuple[Point, SolveReport]:
        candidates = Candidates(None if held_out is None else HeldOut(model, held_out))
        candidates.begin(model.start)
        sample = _sample_for(model, batches)
        mean_loss = MeanLoss(model, batches, sample)
        begin = Point(model.start, *mean_loss(model.start))
        sampled = model.processes.all_rows(sample.collect())
        strengths = check_strengths(self.l2) or _default_path(sampled, chosen_by_validation=held_out is not None)
        stopping = Stopping(self.max_passes, self.tolerance, self.patience)
        method: Literal["quasi_newton", "minibatch"] = "quasi_newton"
        outputs, width = len(model.start), model.num_features
        if _minibatches_are_worth_it(mean_loss.samples, outputs, width, len(sampled), self.max_passes):
            method = "minibatch"
            adam = AveragedAdam(mean_loss, sampled)
            reason = follow_averages(mean_loss, adam, strengths, candidates, stopping)
            steps = adam.steps
        else:
            spectrum = FeatureSpectrum.of(sampled, has_bias=model.has_bias, processes=model.processes)
            path = QuasiNewtonPath(mean_loss, begin, spectrum, sampled, candidates, stopping)
            reason = path.run(strengths)
            steps = path.steps
        chosen = candidates.chosen()
        penalised = Penalised(mean_loss, chosen.l2)
        at_start = penalised.moved(begin, 0.0)
        point = at_start if chosen.step == 0 else chosen.point or Point(chosen.weights, *penalised(chosen.weights))
        return point, SolveReport(
            loss=point.loss,
            start_loss=at_start.loss,
            gradient_norm=float(point.gradient.norm()),
            start_gradient_norm=float(at_start.gradient.norm()),
            score=chosen.score,
            start_score=candidates.start_score,
            l2=chosen.l2,
            tried=tuple(candidates.tried.items()),
            method=method,
            steps=steps,
            best_step=chosen.step,
            passes=mean_loss.passes,
            seconds=0.0,
            reason=reason,
        )


def _is_single(l2: float | list[float] | None) -> bool:
    return len(check_strengths(l2) or ()) == 1


def _held_out_part(batches: FeatureBatches, processes: Processes) -> tuple[FeatureBatches, FeatureBatches | None, int]:
    """Return the training part, the held-out part and its size in all processes; all and nothing where one is empty."""
    kept, held_out = batches.split()
    sizes = [0, 0]
    with processes.failing_together():
        for index, part in enumerate((kept, held_out)):
            sizes[index] = sum(len(targets) for _, targets, _ in part.untransformed())
    kept_samples, held_out_samples = (int(size) for size in processes.sum_numbers(*sizes))
    if not kept_samples or not held_out_samples:
        return batches, None, 0
    return kept, held_out, held_out_samples


def _sample_for(model: LinearModel, batches: FeatureBatches) -> SystematicSample:
    rows = _SAMPLED_ROWS_PER_FEATURE * model.num_features
    if rows > _MOST_SAMPLED_ROWS:
        rows = _MOST_SAMPLED_ROWS // _SAMPLED_ROWS_PER_FEATURE
    sample = SystematicSample(math.ceil(max(1024, rows) / model.processes.count), batches.samples)
    # There may be none in one process of several.
    sample.add(model.start.new_empty(0, model.num_features))
    return sample


def _default_path(sampled: Tensor, *, chosen_by_validation: bool) -> list[float]:
    spread = float(sampled.var(0, correction=0).mean()) or 1.0
    relative = RELATIVE_PATH if chosen_by_validation else RELATIVE_PATH[len(RELATIVE_PATH) // 2 :][:1]
    return [strength * spread for strength in relative]


def _minibatches_are_worth_it(samples: int, outputs: int, features: int, sampled: int, passes: int) -> bool:
    """Tell by counted multiply-adds whether minibatch steps take the place of quasi-Newton steps."""
    decomposed = min(sampled, features)
    # An eigendecomposition was measured to take the time of 13 products of such matrices.
    spectrum = sampled * features * decomposed + 13 * (decomposed**3 + passes * outputs**3)
    one_pass = 2 * samples * features * outputs
    steps = samples / BATCH_SIZE * 10 * outputs * features
    many = spectrum + passes * one_pass
    return outputs > _MOST_QUASI_NEWTON_OUTPUTS or (
        many > _FEW_MULTIPLY_ADDS and many > _WORTH_SAVING * passes * (1.5 * one_pass + steps)
    )


def _compute_dtype(features: object, weight: Tensor, processes: Processes) -> torch.dtype:
    doubled = weight.dtype is torch.float64 or (isinstance(features, Tensor) and features.dtype is torch.float64)
    return torch.float64 if processes.sum_numbers(doubled) != [0.0] else torch.float32
