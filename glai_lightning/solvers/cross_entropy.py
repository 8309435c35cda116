"""Cross-entropy of a linear model over fixed features, with a penalty: its value, gradient and curvature."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.solvers.feature_batches import FeatureBatches, SystematicSample
from glai_lightning.solvers.lbfgs import Point
from glai_lightning.solvers.preconditioner import CenteredFeatures, CovariancePreconditioner
from glai_lightning.solvers.processes import Processes

Center = Literal["zero", "current"]


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits (C, n) as ``torch.nn.functional.cross_entropy`` defines it, summed instead of averaged.

    A single logit z (C = 1) stands for the pair (0, z), which is binary cross-entropy.

    Args:
        class_weights: (C,), or (2,) for one logit: a sample counts as much as its class.
        label_smoothing: how much of every target is spread evenly over the classes, in [0, 1).
    """

    class_weights: Tensor
    label_smoothing: float

    def evaluate(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss (0-d, float64) and its gradient by the logits.

        Args:
            logits: (C, n), overwritten.
            labels: (n,), int64.
        """
        single = len(logits) == 1
        if single:
            logits = torch.cat([torch.zeros_like(logits), logits])
        spread = self.class_weights * (self.label_smoothing / len(self.class_weights))
        hit = ((1.0 - self.label_smoothing) * self.class_weights)[labels]
        logits -= logits.amax(0)
        loss = -hit * logits.gather(0, labels.unsqueeze(0)).squeeze(0)
        if self.label_smoothing:
            loss -= spread @ logits
        exponentials = logits.exp_()
        normaliser = exponentials.sum(0)
        total = hit + spread.sum()
        loss += total * normaliser.log()
        gradient = exponentials.mul_(total / normaliser)
        gradient.scatter_add_(0, labels.unsqueeze(0), -hit.unsqueeze(0))
        if self.label_smoothing:
            gradient -= spread.unsqueeze(1)
        return loss.sum(dtype=torch.float64), gradient[1:] if single else gradient

    def sample_weights(self, labels: Tensor) -> Tensor:
        """Return how much each sample adds to the loss, and with it to the curvature: (n,)."""
        spread = self.label_smoothing * self.class_weights.mean()
        return (1.0 - self.label_smoothing) * self.class_weights[labels] + spread


def class_probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities (C, n) of logits (C, n); of the positive class alone where there is one logit."""
    return logits.sigmoid() if len(logits) == 1 else logits.softmax(0)


class LogisticObjective:
    """Mean cross-entropy of a linear model over the batches of all processes, and a penalty.

    A pass adds up over processes once, at its end: they may read different numbers of batches.

    Args:
        batches: features and labels of this process; checked in the first pass, which ``begin`` makes.
        start: weights (C, F), or (C, F + 1) with the bias as the last column, at the start.
        has_bias: whether the last column of weights is a bias.
        cross_entropy: the loss.
        l2: strength of the penalty.
        center: what the penalty pulls to, see ``LogisticSolver``.
        processes: those that share the samples.
    """

    def __init__(
        self,
        batches: FeatureBatches,
        start: Tensor,
        *,
        has_bias: bool,
        cross_entropy: CrossEntropy,
        l2: float,
        center: Center,
        processes: Processes,
    ) -> None:
        self.passes = 0
        #: In all processes, like every sum from here on.
        self.samples = 0
        self.processes = processes
        self.batches = batches
        self.start = start
        self.has_bias = has_bias
        self.cross_entropy = cross_entropy
        self.l2 = l2
        self.center = center
        self._total_weight = 0.0
        self._start_logits: list[Tensor] = []

    def over(self, batches: FeatureBatches) -> "LogisticObjective":
        """Return the same objective over other batches."""
        return LogisticObjective(
            batches,
            self.start,
            has_bias=self.has_bias,
            cross_entropy=self.cross_entropy,
            l2=self.l2,
            center=self.center,
            processes=self.processes,
        )

    def begin(self, sample: SystematicSample) -> Point:
        """Make the first pass, at the start: checks what is read and fills a sample of it.

        Raises:
            TypeError: if features or labels have the wrong dtype.
            ValueError: if there is no sample, or shapes, labels or numbers are not what they have to be.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.start.device)
        gradient = torch.zeros_like(self.start)
        total_weight = torch.zeros_like(loss)
        samples = 0
        width = self.start.shape[1] - self.has_bias
        # There may be none in one process of several.
        sample.add(self.start.new_empty(0, width), torch.empty(0, dtype=torch.int64, device=self.start.device))
        with self.processes.failing_together():
            for features, targets in self.batches:
                check_batch(features, targets, num_features=width, num_logits=len(self.start))
                features, labels = self._moved(features, targets)
                sample.add(features, labels)
                logits = linear_logits(self.start, features, has_bias=self.has_bias)
                if self.batches.in_memory and self.center == "current":
                    self._start_logits.append(logits.clone())
                batch_loss, by_logits = self.cross_entropy.evaluate(logits, labels)
                loss += batch_loss
                total_weight += self.cross_entropy.class_weights[labels].sum(dtype=torch.float64)
                self._accumulate(gradient, by_logits, features)
                samples += len(features)
        self.passes += 1
        summed_loss, self._total_weight, counted = self.processes.sum_numbers(float(loss), float(total_weight), samples)
        self.samples = int(counted)
        if self.samples == 0:
            raise UserValueError("Expected at least one sample, but got none.")
        if not self._total_weight > 0.0:
            raise UserValueError("Expected `class_weights` to be positive for a class that has samples, but got zeros.")
        point = self._finished(self.start, summed_loss, gradient)
        if not (math.isfinite(point.loss) and bool(gradient.isfinite().all())):
            self._explain_overflow()
        return point

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return the loss and the gradient at weights (C, F or F + 1), by one pass over the data."""
        loss = torch.zeros((), dtype=torch.float64, device=weights.device)
        gradient = torch.zeros_like(weights)
        samples = 0
        pull = self.l2 * self._total_weight / self.samples if self.center == "current" else 0.0
        with self.processes.failing_together():
            for index, (features, targets) in enumerate(self.batches):
                features, labels = self._moved(features, targets)
                logits = linear_logits(weights, features, has_bias=self.has_bias)
                if pull:
                    change = logits - self._logits_at_start(index, features)
                    loss += 0.5 * pull * change.square().sum(dtype=torch.float64)
                batch_loss, by_logits = self.cross_entropy.evaluate(logits, labels)
                loss += batch_loss
                if pull:
                    by_logits.add_(change, alpha=pull)
                self._accumulate(gradient, by_logits, features)
                samples += len(features)
        self.passes += 1
        summed_loss, counted = self.processes.sum_numbers(float(loss), samples)
        if int(counted) != self.samples:
            raise UserValueError(f"Expected every pass to read {self.samples} samples, but got {int(counted)}.")
        point = self._finished(weights, summed_loss, gradient)
        return point.loss, point.gradient

    def preconditioner(
        self, sample: CenteredFeatures, features: Tensor, labels: Tensor, weights: Tensor, *, blocks: int
    ) -> CovariancePreconditioner:
        """Return the preconditioner at weights (C, F or F + 1), from a sample of features (S, F) and labels (S,)."""
        return CovariancePreconditioner(
            sample,
            class_probabilities(linear_logits(weights, features, has_bias=self.has_bias)),
            self.cross_entropy.sample_weights(labels) * (self.samples / self._total_weight),
            ridge=self.l2 if self.center == "zero" else 0.0,
            logit_ridge=self.l2 if self.center == "current" else 0.0,
            blocks=blocks,
        )

    def _accumulate(self, gradient: Tensor, by_logits: Tensor, features: Tensor) -> None:
        if self.has_bias:
            gradient[:, :-1].addmm_(by_logits, features)
            gradient[:, -1] += by_logits.sum(1)
        else:
            gradient.addmm_(by_logits, features)

    def _finished(self, weights: Tensor, loss: float, gradient: Tensor) -> Point:
        """Turn sums over samples into means, the gradient of this process into that of all; add the penalty."""
        self.processes.sum(gradient).div_(self._total_weight)
        mean_loss = loss / self._total_weight
        if self.center == "zero":
            without_bias = weights[:, :-1] if self.has_bias else weights
            mean_loss += 0.5 * self.l2 * float(without_bias.square().sum(dtype=torch.float64))
            gradient[:, : without_bias.shape[1]].add_(without_bias, alpha=self.l2)
        return Point(weights, mean_loss, gradient)

    def _logits_at_start(self, index: int, features: Tensor) -> Tensor:
        if self._start_logits:
            return self._start_logits[index]
        return linear_logits(self.start, features, has_bias=self.has_bias)

    def _moved(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        labels = targets.reshape(-1).to(self.start.device, torch.int64)
        return features.to(self.start), labels

    def _explain_overflow(self) -> None:
        finite = all(bool(features.isfinite().all()) for features, _ in self.batches)
        if self.processes.sum_numbers(not finite) != [0.0]:
            raise UserValueError("Expected features to be finite, but got NaN or infinity.")
        raise UserValueError(
            "Expected a finite loss at the start, but the logits overflow: scale the features or weights."
        )


def linear_logits(weights: Tensor, features: Tensor, *, has_bias: bool) -> Tensor:
    """Return logits (C, n), classes first: a softmax over few classes is several times faster that way."""
    if has_bias:
        return torch.addmm(weights[:, -1:], weights[:, :-1], features.t())
    return weights @ features.t()


def check_labelled(batches: FeatureBatches, weight: Tensor, *, processes: Processes) -> None:
    """Check features and labels that ``classification_accuracy`` is to read, against a weight (C, F).

    Raises:
        TypeError: if labels have the wrong dtype.
        ValueError: if there is no sample, or shapes, labels or numbers are not what they have to be.
    """
    samples = 0
    with processes.failing_together():
        for features, targets in batches:
            check_batch(features, targets, num_features=weight.shape[1], num_logits=len(weight))
            if not bool(features.isfinite().all()):
                raise UserValueError("Expected validation features to be finite, but got NaN or infinity.")
            samples += len(features)
    if processes.sum_numbers(samples) == [0.0]:
        raise UserValueError("Expected at least one validation sample, but got none.")


def check_batch(features: Tensor, targets: Tensor, *, num_features: int, num_logits: int) -> None:
    """Check the width of a batch, and its labels: integers in [0, C); for one logit also bool, 0.0 and 1.0."""
    single = num_logits == 1
    if features.shape[1] != num_features:
        raise UserValueError(f"Expected {num_features} features a sample, but got {features.shape[1]}.")
    if targets.ndim != 1 and not (single and targets.ndim == 2 and targets.shape[1] == 1):
        raise UserValueError(f"Expected targets of shape (samples,), but got {tuple(targets.shape)}.")
    if targets.is_complex() or (not single and (targets.is_floating_point() or targets.dtype is torch.bool)):
        raise UserTypeError(f"Expected integer class labels as targets, but got {targets.dtype}.")
    if targets.dtype is torch.bool:
        return
    lowest, highest = (bound.item() for bound in targets.aminmax())
    num_classes = max(num_logits, 2)
    if not (lowest >= 0 and highest < num_classes):
        raise UserValueError(f"Expected class labels in [0, {num_classes - 1}], but got {lowest} to {highest}.")
    if targets.is_floating_point() and not bool(((targets == 0) | (targets == 1)).all()):
        raise UserValueError("Expected targets of a single logit to be 0 or 1, but got values in between.")


def classification_accuracy(weights: Tensor, batches: FeatureBatches, *, has_bias: bool, processes: Processes) -> float:
    """Return the fraction of samples, of all processes, whose largest logit is that of their label.

    Args:
        weights: (C, F), or (C, F + 1) with the bias as the last column; a single logit is positive for class 1.
        batches: features and labels, checked already.
        has_bias: whether the last column of weights is a bias.
        processes: those that share the samples.
    """
    correct, samples = 0, 0
    with processes.failing_together():
        for features, targets in batches:
            logits = linear_logits(weights, features.to(weights), has_bias=has_bias)
            labels = targets.reshape(-1).to(logits.device, torch.int64)
            predicted = (logits[0] > 0).long() if len(logits) == 1 else logits.argmax(0)
            correct += int((predicted == labels).sum())
            samples += len(labels)
    all_correct, all_samples = processes.sum_numbers(correct, samples)
    return all_correct / all_samples
