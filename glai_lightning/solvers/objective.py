"""Passes over the data of a linear model: its mean loss and gradient, and its score on held-out data."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError
from glai_lightning.solvers.cross_entropy import Loss
from glai_lightning.solvers.feature_batches import FeatureBatches, SystematicSample
from glai_lightning.solvers.lbfgs import Point
from glai_lightning.solvers.processes import Processes

#: A batch as a solve computes with it: features (n, F), what ``Loss.read`` returned, and weights of samples (n,).
Batch = tuple[Tensor, Tensor, Tensor | None]


class LinearModel:
    """How weights (C, F), or (C, F + 1) with a bias as the last column, read features and make logits.

    Args:
        start: weights at the start, whose dtype and device are computed in.
        has_bias: whether the last column of weights is a bias.
        loss: of the logits.
        processes: those that share the samples.
    """

    def __init__(self, start: Tensor, *, has_bias: bool, loss: Loss, processes: Processes) -> None:
        self.start = start
        self.has_bias = has_bias
        self.loss = loss
        self.processes = processes
        self.num_features = start.shape[1] - has_bias

    def read(self, batches: FeatureBatches, *, checked: bool, what: str = "features") -> Iterator[Batch]:
        """Yield batches moved to the weights.

        Args:
            batches: features, targets and weights of this process.
            checked: whether they were found to be finite in a pass before.
            what: the features' name in an error.
        """
        for features, targets, weights in batches:
            if features.shape[1] != self.num_features:
                raise UserValueError(f"Expected {self.num_features} features a sample, but got {features.shape[1]}.")
            moved = features.to(self.start)
            if not checked and not math.isfinite(float(moved.sum())) and not bool(moved.isfinite().all()):
                raise UserValueError(f"Expected {what} to be finite, but got NaN or infinity.")
            read = self.loss.read(targets, self.start)
            yield moved, read, None if weights is None else weights.to(self.start)

    def logits(self, weights: Tensor, features: Tensor) -> Tensor:
        """Return logits (C, n) of features (n, F)."""
        if self.has_bias:
            return torch.addmm(weights[:, -1:], weights[:, :-1], features.t())
        return weights @ features.t()

    def add_gradient(self, gradient: Tensor, by_logits: Tensor, features: Tensor) -> None:
        """Add to a gradient by the weights what a gradient (C, n) by the logits makes of it."""
        gradient[:, : self.num_features].addmm_(by_logits, features)
        if self.has_bias:
            gradient[:, -1] += by_logits.sum(1)

    def squared(self, weights: Tensor) -> float:
        """Return half the sum of the squared weights, without the bias."""
        return 0.5 * float(weights[:, : self.num_features].square().sum(dtype=torch.float64))

    def without_bias(self, weights: Tensor) -> Tensor:
        """Return the weights with zero in the place of the bias: the gradient of ``squared``."""
        kept = weights.clone()
        kept[:, self.num_features :] = 0.0
        return kept


class MeanLoss:
    """Mean loss of a linear model over the batches of all processes, and the gradient: one pass over the data.

    A pass adds up over processes once, at its end: they may read different numbers of batches.

    Args:
        model: the linear model.
        batches: features, targets and weights of this process.
        sample: takes an evenly spaced sample of the features in the first pass.
    """

    def __init__(self, model: LinearModel, batches: FeatureBatches, sample: SystematicSample) -> None:
        self.model = model
        self.batches = batches
        self.sample = sample
        self.passes = 0
        #: In all processes, as what follows.
        self.samples = 0
        self.normaliser = 0.0

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return the mean loss and the gradient at weights (C, F or F + 1)."""
        model = self.model
        first = self.passes == 0
        loss = torch.zeros((), dtype=torch.float64, device=weights.device)
        gradient = torch.zeros_like(weights)
        samples, normaliser = 0, 0.0
        with model.processes.failing_together():
            for features, targets, sample_weights in model.read(self.batches, checked=not first):
                if first:
                    self.sample.add(features)
                    normaliser += model.loss.normaliser(targets, sample_weights)
                batch_loss, by_logits = model.loss.evaluate(model.logits(weights, features), targets, sample_weights)
                loss += batch_loss
                model.add_gradient(gradient, by_logits, features)
                samples += len(features)
        self.passes += 1
        summed, counted, all_normaliser = model.processes.sum_numbers(float(loss), samples, normaliser)
        if first:
            self.samples, self.normaliser = int(counted), all_normaliser
            check_samples(self.samples, self.normaliser)
        elif int(counted) != self.samples:
            raise UserValueError(f"Expected every pass to read {self.samples} samples, but got {int(counted)}.")
        model.processes.sum(gradient).div_(self.normaliser)
        if first and not (math.isfinite(summed) and bool(gradient.isfinite().all())):
            raise UserValueError(
                "Expected a finite loss at the start, but the logits overflow: scale the features or weights."
            )
        return summed / self.normaliser, gradient


def check_samples(samples: int, normaliser: float) -> None:
    """Check that there is a sample, and one that counts."""
    if samples == 0:
        raise UserValueError("Expected at least one sample, but got none.")
    if not normaliser > 0.0:
        raise UserValueError(
            "Expected weights of samples, and `class_weights` of a class that has samples, to be positive, but got "
            "zeros."
        )


class Penalised:
    """A mean loss plus l2 times half the squared weights.

    Args:
        mean_loss: the mean loss.
        l2: strength of the penalty.
    """

    def __init__(self, mean_loss: MeanLoss, l2: float) -> None:
        self.mean_loss = mean_loss
        self.l2 = l2

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return the loss and the gradient at weights (C, F or F + 1), by one pass over the data."""
        loss, gradient = self.mean_loss(weights)
        point = self.moved(Point(weights, loss, gradient), 0.0)
        return point.loss, point.gradient

    def moved(self, point: Point, l2: float) -> Point:
        """Return a point of the same loss with another strength of the penalty, without a pass."""
        change, model = self.l2 - l2, self.mean_loss.model
        gradient = point.gradient.clone()
        gradient[:, : model.num_features].add_(point.weights[:, : model.num_features], alpha=change)
        return Point(point.weights, point.loss + change * model.squared(point.weights), gradient)


class HeldOut:
    """Scores of weights on held-out data.

    Args:
        model: the linear model.
        batches: features, targets and weights of this process.
    """

    def __init__(self, model: LinearModel, batches: FeatureBatches) -> None:
        self.model = model
        self.batches = batches
        self.samples = 0

    def __call__(self, weights: Tensor) -> tuple[float, float]:
        """Return the accuracy of weights (C, F or F + 1), and minus their mean loss.

        Raises:
            ValueError: in the first call, if there is no sample, or the data is not what it has to be.
        """
        model, sums = self.model, [0.0] * 5
        with model.processes.failing_together():
            for features, targets, sample_weights in model.read(
                self.batches, checked=self.samples > 0, what="validation features"
            ):
                logits = model.logits(weights, features)
                correct = model.loss.correct(logits, targets).double()
                counted = torch.ones_like(correct) if sample_weights is None else sample_weights.double()
                loss, _ = model.loss.evaluate(logits, targets, sample_weights)
                parts = ((correct * counted).sum(), counted.sum(), loss)
                for index, part in enumerate(parts):
                    sums[index] += float(part)
                sums[3] += model.loss.normaliser(targets, sample_weights)
                sums[4] += len(features)
        correct_sum, count, loss_sum, normaliser, samples = model.processes.sum_numbers(*sums)
        self.samples = int(samples)
        if not samples:
            raise UserValueError("Expected at least one validation sample, but got none.")
        return correct_sum / (count or 1.0), -loss_sum / (normaliser or 1.0)
