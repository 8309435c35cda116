"""Ridge regression over fixed features: streaming moments, one eigendecomposition, every strength of the penalty."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.solvers.feature_batches import (
    Batches,
    Data,
    FeatureBatches,
    as_batches,
    held_out_batches,
)
from glai_lightning.solvers.head_weights import HeadSolver
from glai_lightning.solvers.moments import Moments
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, SolveReport, check_linear, check_strengths

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Strengths of the penalty to choose from, relative to the mean variance of the features.
RELATIVE_GRID = tuple(10.0 ** (exponent / 2.0) for exponent in range(4, -13, -1))

MIXED_TARGETS = "Expected all targets to be class labels (integers) or all to be numbers (floating), but got both."


class RidgeTargets:
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

    @staticmethod
    def of(targets: Tensor, outputs: int) -> "RidgeTargets":
        """Read from the first targets whether they are labels (integers, bool) or numbers to regress on."""
        return RidgeTargets(outputs, classification=not targets.is_floating_point())

    def encode(self, targets: Tensor) -> Tensor:
        """Return what the outputs are fitted to, (n, C) in float64.

        Raises:
            TypeError: if some targets are labels and others are numbers.
            ValueError: if a shape is wrong, a label out of range or a number not finite.
        """
        if targets.is_floating_point() == self.classification:
            raise UserTypeError(MIXED_TARGETS)
        if self.classification:
            return self._encode_labels(targets)
        if targets.ndim == 1 and self.outputs == 1:
            targets = targets.unsqueeze(1)
        if targets.ndim != 2 or targets.shape[1] != self.outputs:
            raise UserValueError(
                f"Expected targets of shape (samples, {self.outputs}), but got {tuple(targets.shape)}."
            )
        if not bool(targets.isfinite().all()):
            raise UserValueError("Expected targets to be finite, but got NaN or infinity.")
        return targets.detach().double()

    def _encode_labels(self, targets: Tensor) -> Tensor:
        if targets.ndim == 2 and targets.shape[1] == 1 and self.outputs == 1:
            targets = targets.squeeze(1)
        if targets.ndim != 1:
            raise UserValueError(f"Expected class labels of shape (samples,), but got {tuple(targets.shape)}.")
        labels = targets.long()
        classes = max(self.outputs, 2)
        lowest, highest = (int(bound) for bound in labels.aminmax())
        if lowest < 0 or highest >= classes:
            raise UserValueError(f"Expected class labels in [0, {classes - 1}], but got {lowest} to {highest}.")
        if self.outputs == 1:
            return (2.0 * labels - 1.0).double().unsqueeze(1)
        return torch.nn.functional.one_hot(labels, classes).double()

    def scores(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        """Return the summed scores of outputs (G, n, C): correct classes (G, 1), or minus squared errors (G, C)."""
        if not self.classification:
            return -(outputs - encoded).square().sum(1)
        if self.outputs == 1:
            return ((outputs > 0.0) == (encoded > 0.0)).double().sum(1)
        return (outputs.argmax(2) == encoded.argmax(1)).double().sum(1, keepdim=True)


class RidgePath:
    """The ridge solutions for every strength of the penalty, from one eigendecomposition of the covariance.

    For a strength l2 the weights are V (L + l2)^-1 V' c, with c the covariance of features and targets and V L V' that
    of the features. Eigenvalues below F times the machine epsilon of the largest are noise; their directions get no
    weight.

    Args:
        moments: of the features and targets.
    """

    def __init__(self, moments: Moments) -> None:
        self.samples = moments.samples
        self.has_bias = moments.has_bias
        self.features_mean = moments.features_mean()
        self.targets_mean = moments.targets_mean()
        self.eigenvalues, self.vectors = torch.linalg.eigh(moments.covariance())
        largest = self.eigenvalues[-1].clamp(min=0.0)
        noise = largest * len(self.eigenvalues) * torch.finfo(torch.float64).eps
        self._kept = self.eigenvalues > noise
        self.rotated = self.vectors.t() @ moments.cross_covariance()

    def shrinkage(self, l2: Tensor) -> Tensor:
        """Return 1 / (eigenvalue + l2) for strengths (G,): (G, F), zero for directions that are noise."""
        inverse = 1.0 / (self.eigenvalues + l2.unsqueeze(1))
        return torch.where(self._kept, inverse, 0.0)

    def weight(self, l2: Tensor) -> Tensor:
        """Return the weights (C, F) for a strength of each output, (C,)."""
        weight: Tensor = (self.shrinkage(l2) * self.rotated.t()) @ self.vectors.t()
        return weight

    def bias(self, weight: Tensor) -> Tensor:
        """Return the bias (C,) that goes with weights (C, F)."""
        return self.targets_mean - weight @ self.features_mean

    def outputs(self, features: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (G, n, C) of features (n, F) for strengths (G,), and the features' leverages (G, n).

        The leverage of a training sample is the derivative of its output by its own target.
        """
        projected = (features - self.features_mean) @ self.vectors
        shrinkage = self.shrinkage(l2)
        outputs = torch.stack([projected @ (row.unsqueeze(1) * self.rotated) for row in shrinkage])
        leverages = shrinkage @ projected.square().t() / self.samples
        return outputs + self.targets_mean, leverages + float(self.has_bias) / self.samples


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
        moments, code = _moments(batches, weight, has_bias=bias is not None, processes=processes)
        path = RidgePath(moments)
        strengths = check_strengths(self.l2)
        if strengths is None:
            spread = float(path.eigenvalues.clamp(min=0.0).mean()) or 1.0
            strengths = [relative * spread for relative in RELATIVE_GRID]
        candidates = torch.tensor(strengths, dtype=torch.float64, device=path.eigenvalues.device)
        start_weight = weight.detach().double()
        start_bias = None if bias is None else bias.detach().double()
        passes, start_score, scores = 1, None, None
        if held_out is not None:
            scores, start_score = _validation_scores(
                path, code, held_out, candidates, start_weight, start_bias, processes
            )
        elif len(candidates) > 1:
            scores = _leave_one_out_scores(path, code, batches, candidates, processes)
            passes += 1
        # Of equal scores the first, for the strongest penalty.
        best = torch.zeros(1, dtype=torch.int64) if scores is None else scores.argmax(0)
        chosen = candidates[best].expand(len(weight))
        score = None if start_score is None or scores is None else float(scores.amax(0).mean())
        kept = start_score is not None and score is not None and score <= start_score
        found_weight = start_weight if kept else path.weight(chosen)
        found_bias = start_bias if kept or start_bias is None else path.bias(found_weight)
        # The same in all processes, if their arithmetic is.
        found_weight = processes.from_first(found_weight.contiguous())
        if found_bias is not None:
            found_bias = processes.from_first(found_bias.contiguous())
        loss, gradient_norm = _penalised(moments, found_weight, found_bias, chosen)
        start_loss, start_gradient_norm = _penalised(moments, start_weight, start_bias, chosen)
        by_strength = [None] * len(strengths) if scores is None else scores.mean(1).tolist()
        return LinearSolution(
            weight=found_weight.to(weight, copy=True),
            bias=None if bias is None or found_bias is None else found_bias.to(bias, copy=True),
            report=SolveReport(
                loss=loss,
                start_loss=start_loss,
                gradient_norm=gradient_norm,
                start_gradient_norm=start_gradient_norm,
                score=start_score if kept else score,
                start_score=start_score,
                l2=float(chosen.mean()),
                tried=tuple(zip(strengths, by_strength, strict=True)),
                method="closed_form",
                steps=1,
                best_step=0 if kept else 1,
                passes=passes,
                seconds=time.perf_counter() - began,
                reason="closed_form",
            ),
        )


def _moments(
    batches: FeatureBatches, weight: Tensor, *, has_bias: bool, processes: Processes
) -> tuple[Moments, RidgeTargets]:
    moments, code = Moments(weight.shape[1], len(weight), has_bias=has_bias, device=weight.device), None
    with processes.failing_together():
        for features, targets, sample_weights in batches:
            if sample_weights is not None:
                raise UserValueError("Expected no weights of samples for `RidgeSolver`, but got some.")
            if code is None:
                code = RidgeTargets.of(targets, len(weight))
            moments.add(*_doubled(features, targets, code, weight))
    code = _common_code(code, len(weight), processes)
    moments.add_up(processes)
    if not bool(moments.covariance().isfinite().all()):
        raise UserValueError("Expected features to be finite, and their squares too, but got NaN or infinity.")
    return moments, code


def _common_code(code: RidgeTargets | None, outputs: int, processes: Processes) -> RidgeTargets:
    labels, numbers = processes.sum_numbers(
        code is not None and code.classification, code is not None and not code.classification
    )
    if not labels and not numbers:
        raise UserValueError("Expected at least one sample, but got none.")
    if labels and numbers:
        raise UserTypeError(MIXED_TARGETS)
    return RidgeTargets(outputs, classification=bool(labels))


def _doubled(features: Tensor, targets: Tensor, code: RidgeTargets, weight: Tensor) -> tuple[Tensor, Tensor]:
    if features.shape[1] != weight.shape[1]:
        raise UserValueError(f"Expected {weight.shape[1]} features a sample, but got {features.shape[1]}.")
    return features.to(weight.device, torch.float64), code.encode(targets).to(weight.device)


def _leave_one_out_scores(
    path: RidgePath, code: RidgeTargets, batches: FeatureBatches, l2: Tensor, processes: Processes
) -> Tensor:
    total = _no_scores(code, l2)
    with processes.failing_together():
        for features, targets, _ in batches:
            doubled, encoded = _doubled(features, targets, code, path.rotated.t())
            outputs, leverages = path.outputs(doubled, l2)
            # A leverage of 1 leaves nothing to predict the sample from.
            errors = (encoded - outputs) / (1.0 - leverages).clamp(min=1e-8).unsqueeze(2)
            total += code.scores(encoded - errors, encoded)
    return processes.sum(total) / path.samples


def _validation_scores(
    path: RidgePath,
    code: RidgeTargets,
    held_out: FeatureBatches,
    l2: Tensor,
    start_weight: Tensor,
    start_bias: Tensor | None,
    processes: Processes,
) -> tuple[Tensor, float]:
    total, own_start_total, own_samples = _no_scores(code, l2), 0.0, 0
    with processes.failing_together():
        for features, targets, _ in held_out:
            doubled, encoded = _doubled(features, targets, code, start_weight)
            if not bool(doubled.isfinite().all()):
                raise UserValueError("Expected validation features to be finite, but got NaN or infinity.")
            total += code.scores(path.outputs(doubled, l2)[0], encoded)
            at_start = doubled @ start_weight.t() if start_bias is None else doubled @ start_weight.t() + start_bias
            own_start_total += float(code.scores(at_start.unsqueeze(0), encoded).mean())
            own_samples += len(encoded)
    processes.sum(total)
    start_total, samples = processes.sum_numbers(own_start_total, own_samples)
    if samples == 0:
        raise UserValueError("Expected at least one validation sample, but got none.")
    return total / samples, start_total / samples


def _no_scores(code: RidgeTargets, l2: Tensor) -> Tensor:
    return l2.new_zeros(len(l2), 1 if code.classification else code.outputs)


def _penalised(moments: Moments, weight: Tensor, bias: Tensor | None, l2: Tensor) -> tuple[float, float]:
    loss, gradient = moments.half_squared_error(weight, bias)
    gradient[:, : weight.shape[1]] += l2.unsqueeze(1) * weight
    return loss + 0.5 * float(l2 @ weight.square().sum(1)), float(gradient.norm())
