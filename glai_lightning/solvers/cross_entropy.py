"""Losses of logits: cross-entropy of classes, and binary cross-entropy of one or several outputs."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError

LossName = Literal["cross_entropy", "binary_cross_entropy"]

#: Classes up to which the preconditioner rotates them, which takes a matrix of classes by classes.
_MOST_ROTATED_CLASSES = 512
#: The least variance of a rotated class beside the mean: a class that is never predicted yet has none.
_LEAST_VARIANCE = 0.1


class Loss(Protocol):
    """A loss of logits (C, n), classes first: a softmax over few classes is several times faster that way."""

    def read(self, targets: Tensor, like: Tensor) -> Tensor:
        """Check targets of n samples, and return them as ``evaluate`` takes them, on the device of ``like``."""

    def evaluate(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the summed loss (0-d, float64) and its gradient by the logits, which are overwritten.

        Args:
            logits: (C, n).
            targets: what ``read`` returned.
            weights: (n,), how much each sample counts.
        """

    def normaliser(self, targets: Tensor, weights: Tensor | None) -> float:
        """Return what the summed loss of the whole data is divided by, as far as these samples add to it."""

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return for each sample (n,) whether, or in how much of its outputs, the prediction is right."""

    def curvature(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the rotation of the classes (C, C) that makes the mean curvature diagonal, and the diagonal (C,)."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy as ``torch.nn.functional.cross_entropy`` defines it, summed instead of averaged.

    Targets are class labels (n,), or probabilities of the classes (n, C).

    Args:
        class_weights: (C,).
        label_smoothing: how much of every target is spread evenly over the classes, in [0, 1).
    """

    class_weights: Tensor
    label_smoothing: float

    def read(self, targets: Tensor, like: Tensor) -> Tensor:
        """Return labels (n,), int64, or probabilities (C, n)."""
        classes = len(self.class_weights)
        if targets.is_floating_point() and targets.ndim == 2:
            return _fractions(targets, classes).to(like).t()
        if targets.ndim != 1:
            raise UserValueError(f"Expected targets of shape (samples,), but got {tuple(targets.shape)}.")
        if targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool:
            raise UserTypeError(f"Expected integer class labels as targets, but got {targets.dtype}.")
        if len(targets):
            lowest, highest = (int(bound) for bound in targets.aminmax())
            if lowest < 0 or highest >= classes:
                raise UserValueError(f"Expected class labels in [0, {classes - 1}], but got {lowest} to {highest}.")
        return targets.to(like.device, torch.int64)

    def evaluate(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the summed loss (0-d, float64) and its gradient by the logits, which are overwritten."""
        spread = self.class_weights * (self.label_smoothing / len(self.class_weights))
        wanted: Tensor | None = None
        logits -= logits.amax(0)
        if targets.ndim == 2:
            wanted = torch.addcmul(
                spread.unsqueeze(1), targets, self.class_weights.unsqueeze(1), value=1.0 - self.label_smoothing
            )
            total, loss = wanted.sum(0), -(wanted * logits).sum(0)
        else:
            hit = ((1.0 - self.label_smoothing) * self.class_weights)[targets]
            total, loss = hit + spread.sum(), -hit * logits.gather(0, targets.unsqueeze(0)).squeeze(0)
            if self.label_smoothing:
                loss -= spread @ logits
        exponentials = logits.exp_()
        normaliser = exponentials.sum(0)
        loss += total * normaliser.log()
        gradient = exponentials.mul_(total / normaliser)
        if wanted is not None:
            gradient -= wanted
        else:
            gradient.scatter_add_(0, targets.unsqueeze(0), -hit.unsqueeze(0))
            if self.label_smoothing:
                gradient -= spread.unsqueeze(1)
        return _weighted_sum(loss, gradient, weights)

    def normaliser(self, targets: Tensor, weights: Tensor | None) -> float:
        """Return the weights of labels, their classes' included, or of samples with probabilities as targets."""
        by_class = self.class_weights[targets] if targets.ndim == 1 else torch.ones_like(targets[0])
        return float((by_class if weights is None else by_class * weights).sum(dtype=torch.float64))

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return whether the largest logit is that of the label, or of the most probable class: (n,)."""
        return logits.argmax(0) == (targets if targets.ndim == 1 else targets.argmax(0))

    def curvature(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the eigenvectors and eigenvalues of the mean of diag p - p p', with p the probabilities.

        A softmax is blind to what is added to all logits alike, the first eigenvector: it is given the mean of the
        others. Many classes are left as they are.
        """
        probabilities = logits.softmax(0)
        # What a sample counts is not known of a sample without targets, but what it counts on average is.
        counted = self.class_weights @ probabilities
        counted /= counted.mean()
        if len(logits) > _MOST_ROTATED_CLASSES:
            return None, _bounded_below((counted * (probabilities - probabilities.square())).mean(1))
        between = (counted * probabilities) @ probabilities.t() / logits.shape[1]
        values, vectors = torch.linalg.eigh((torch.diag((counted * probabilities).mean(1)) - between).double())
        values[0] = values[1:].mean()
        return vectors.to(logits), _bounded_below(values.to(logits))


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of each output with logits, summed over outputs and samples.

    Targets are numbers in [0, 1] of shape (n, C), or (n,) for one output.

    Args:
        negative_weights: (C,), what a target of 0 counts.
        positive_weights: (C,), what a target of 1 counts.
        label_smoothing: how much of every target is spread evenly over 0 and 1, in [0, 1).
        labels: whether this is the cross-entropy of two classes with one logit: then targets are 0 or 1, and the mean
            is taken by the weights of classes, as ``torch.nn.functional.cross_entropy`` does, not by their number.
    """

    negative_weights: Tensor
    positive_weights: Tensor
    label_smoothing: float
    labels: bool

    def read(self, targets: Tensor, like: Tensor) -> Tensor:
        """Return targets (C, n) as numbers."""
        outputs = len(self.positive_weights)
        if targets.ndim == 1 and outputs == 1:
            targets = targets.unsqueeze(1)
        if targets.is_complex():
            raise UserTypeError(f"Expected real numbers as targets, but got {targets.dtype}.")
        if self.labels and targets.ndim == 2 and targets.shape[1] == 1 and len(targets):
            lowest, highest = (float(bound) for bound in targets.aminmax())
            if not (lowest >= 0 and highest <= 1):
                raise UserValueError(f"Expected class labels in [0, 1], but got {lowest:g} to {highest:g}.")
            if targets.is_floating_point() and not bool(((targets == 0) | (targets == 1)).all()):
                raise UserValueError("Expected targets of a single logit to be 0 or 1, but got values in between.")
        return _fractions(targets, outputs).to(like).t()

    def evaluate(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the summed loss (0-d, float64) and its gradient by the logits."""
        smoothed = targets * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        positive = self.positive_weights.unsqueeze(1) * smoothed
        total = torch.addcmul(positive, self.negative_weights.unsqueeze(1), 1.0 - smoothed)
        loss = (total * torch.nn.functional.softplus(logits) - positive * logits).sum(0)
        return _weighted_sum(loss, total * logits.sigmoid() - positive, weights)

    def normaliser(self, targets: Tensor, weights: Tensor | None) -> float:
        """Return the weights of samples and their classes, or the number of outputs of all samples."""
        by_sample = torch.full_like(targets[0], len(targets))
        if self.labels:
            by_sample = torch.where(targets[0] > 0.5, self.positive_weights, self.negative_weights)
        return float((by_sample if weights is None else by_sample * weights).sum(dtype=torch.float64))

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the fraction of outputs (n,) on the right side of 0."""
        return ((logits > 0.0) == (targets > 0.5)).double().mean(0)

    def curvature(self, logits: Tensor) -> tuple[None, Tensor]:
        """Return no rotation, for the outputs do not depend on one another, and the mean of p (1 - p): (C,)."""
        probabilities = logits.sigmoid()
        positive = self.positive_weights.unsqueeze(1) * probabilities
        counted = torch.addcmul(positive, self.negative_weights.unsqueeze(1), 1.0 - probabilities)
        counted /= counted.mean() if self.labels else len(logits)
        return None, _bounded_below((counted * (probabilities - probabilities.square())).mean(1))


def make_loss(
    name: LossName, class_weights: list[float] | None, label_smoothing: float, *, outputs: int, like: Tensor
) -> Loss:
    """Return the loss of so many outputs.

    Raises:
        ValueError: if ``class_weights`` are too many or too few, or one is negative or not finite.
    """
    labels_of_one_logit = name == "cross_entropy" and outputs == 1
    count = 2 if labels_of_one_logit else outputs
    weights = (
        like.new_ones(count)
        if class_weights is None
        else torch.tensor(class_weights, dtype=like.dtype, device=like.device)
    )
    if weights.shape != (count,):
        raise UserValueError(f"Expected `class_weights` to be {count} numbers, but got shape {tuple(weights.shape)}.")
    if not bool((weights.isfinite() & (weights >= 0.0)).all()):
        raise UserValueError(f"Expected `class_weights` to be finite and at least 0, but got {weights.tolist()}.")
    if labels_of_one_logit:
        return BinaryCrossEntropy(weights[:1], weights[1:], label_smoothing, labels=True)
    if name == "binary_cross_entropy":
        return BinaryCrossEntropy(torch.ones_like(weights), weights, label_smoothing, labels=False)
    return CrossEntropy(weights, label_smoothing)


def _weighted_sum(loss: Tensor, gradient: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if weights is not None:
        loss, gradient = loss * weights, gradient * weights
    return loss.sum(dtype=torch.float64), gradient


def _fractions(targets: Tensor, outputs: int) -> Tensor:
    if targets.ndim != 2 or targets.shape[1] != outputs:
        raise UserValueError(f"Expected targets of shape (samples, {outputs}), but got {tuple(targets.shape)}.")
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise UserValueError("Expected targets to be in [0, 1], but got numbers outside.")
    return targets.detach()


def _bounded_below(variances: Tensor) -> Tensor:
    return variances.clamp(min=max(_LEAST_VARIANCE * float(variances.mean()), torch.finfo(variances.dtype).tiny))
