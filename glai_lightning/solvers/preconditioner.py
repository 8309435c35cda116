"""The preconditioner of the logistic solve: covariances of the features, weighted by how undecided the logits are."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glai_lightning.solvers.processes import Processes

#: Added to a covariance of unit variances before it is factorised, the first that makes it positive definite: float32
#: products are good to about as much as the smallest.
_JITTERS = (3e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)


@dataclass(frozen=True)
class CenteredFeatures:
    """A sample of features, shifted and scaled column by column so that products of any columns can be compared.

    Args:
        features: (S, F), those of this process, in units of the standard deviation; behind them a column of ones where
            there is a bias.
        samples: how many there are in all processes.
        mean: (F,), zero where there is no bias to make up for a shift.
        scale: (F,), positive also where a column is constant.
        has_bias: whether the last column of weights is a bias.
        processes: those that share the sample.
    """

    features: Tensor
    samples: int
    mean: Tensor
    scale: Tensor
    has_bias: bool
    processes: Processes

    @staticmethod
    def of(features: Tensor, *, has_bias: bool, processes: Processes) -> "CenteredFeatures":
        """Center and scale features (S, F), each process its own by the means and deviations of all."""
        samples = int(processes.sum_numbers(len(features))[0])
        mean = processes.sum(features.sum(0)) / samples if has_bias else features.new_zeros(features.shape[1])
        centered = features - mean
        scale = (processes.sum(centered.square().sum(0)) / samples).sqrt()
        largest = processes.max(torch.cat([features.abs(), features.new_zeros(1, features.shape[1])]).amax(0))
        # What is left of a constant column is the rounding of its mean.
        rounding = 8.0 * torch.finfo(features.dtype).eps * largest
        scale = torch.where(scale > rounding, scale, torch.inf)
        centered /= scale
        scale = torch.where(scale.isinf(), 1.0, scale)
        if has_bias:
            centered = torch.cat([centered, torch.ones_like(centered[:, :1])], dim=1)
        return CenteredFeatures(centered, samples, mean, scale, has_bias, processes)

    def gradient_for(self, gradient: Tensor) -> Tensor:
        """Turn a gradient by weights of the features as given into one by weights of the centered ones."""
        if not self.has_bias:
            return gradient / self.scale
        by_bias = gradient[:, -1:]
        return torch.cat([(gradient[:, :-1] - by_bias * self.mean) / self.scale, by_bias], dim=1)

    def weights_from(self, weights: Tensor) -> Tensor:
        """Turn weights of the centered features into the weights (C, F or F + 1) of the features as given."""
        if not self.has_bias:
            return weights / self.scale
        by_feature = weights[:, :-1] / self.scale
        return torch.cat([by_feature, weights[:, -1:] - by_feature @ self.mean.unsqueeze(1)], dim=1)


class CovariancePreconditioner:
    """An approximate inverse Hessian of the regularised cross-entropy, block-diagonal in rotated classes.

    The Hessian is the mean of (diag p - p p') (x) x x' over samples with probabilities p, plus the penalty. Rotating
    the classes by the eigenvectors of the mean of diag p - p p' makes its blocks between classes small (they vanish
    where p does not depend on x); each of the rest is a covariance of the features weighted by sample, and is inverted.
    Neighbouring classes share one inverse where there are fewer blocks than classes.

    Args:
        sample: a sample of features, S of them in this process.
        probabilities: their probabilities (C, S), of the positive class alone (1, S) where there is one logit.
        sample_weights: (S,), what each sample counts in the mean cross-entropy; 1 on average without class weights.
        ridge: l2 of a penalty on the squared weights.
        logit_ridge: l2 of a penalty on the squared change of the logits.
        blocks: how many inverses there are, from 1 to C - 1 (1 for one logit).
    """

    def __init__(
        self,
        sample: CenteredFeatures,
        probabilities: Tensor,
        sample_weights: Tensor,
        *,
        ridge: float,
        logit_ridge: float,
        blocks: int,
    ) -> None:
        self._sample = sample
        classes = len(probabilities)
        between = sample.processes.sum((probabilities * sample_weights) @ probabilities.t())
        within = torch.diag(sample.processes.sum((probabilities * sample_weights).sum(1)))
        rotation = torch.linalg.eigh((within - between).double())[1].to(probabilities.dtype)
        variances = rotation.t().square() @ probabilities - (rotation.t() @ probabilities).square()
        variances = variances.clamp_(min=0.0) * sample_weights
        # Bounded, for the square of a tiny scale is zero.
        penalty = (math.sqrt(ridge) / sample.scale).square().clamp(max=1e20)
        if sample.has_bias:
            penalty = torch.cat([penalty, penalty.new_zeros(1)])
        # A softmax is blind to one direction of the classes, the first here: without curvature of its own it is given
        # that of its neighbours.
        seen = max(classes - 1, 1)
        self._rotation = rotation
        self._groups = [0, *(classes - seen + seen * part // blocks for part in range(1, blocks + 1))]
        self._inverses = []
        for start, end in zip(self._groups[:-1], self._groups[1:], strict=True):
            weights = variances[start:end].sum(0) / (end - max(start, classes - seen)) + logit_ridge
            self._inverses.append(_inverse_covariance(sample, weights / sample.samples, penalty))

    def __call__(self, gradient: Tensor) -> Tensor:
        """Multiply the approximate inverse Hessian by a gradient (C, F or F + 1)."""
        rotated = self._rotation.t() @ self._sample.gradient_for(gradient)
        parts = [
            rotated[start:end] @ inverse
            for start, end, inverse in zip(self._groups[:-1], self._groups[1:], self._inverses, strict=True)
        ]
        return self._sample.weights_from(self._rotation @ torch.cat(parts))


def _inverse_covariance(sample: CenteredFeatures, weights: Tensor, penalty: Tensor) -> Tensor:
    covariance = sample.processes.sum(sample.features.t() @ (sample.features * weights.unsqueeze(1)))
    covariance.diagonal().add_(penalty)
    deviation = covariance.diagonal().clamp(min=0.0).sqrt()
    # Columns without any curvature are left alone.
    deviation = torch.where(deviation > 0.0, deviation, 1.0)
    covariance.div_(deviation).div_(deviation.unsqueeze(1))
    inverse = torch.cholesky_inverse(_cholesky(covariance))
    return inverse.div_(deviation).div_(deviation.unsqueeze(1))


def _cholesky(correlation: Tensor) -> Tensor:
    identity = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
    factor: Tensor
    for jitter in _JITTERS:
        factor, failed_at = torch.linalg.cholesky_ex(correlation + jitter * identity)
        if not failed_at:
            break
    return factor
