"""Moments of features and targets, which hold all that a least-squares solve needs to know of them."""

from functools import partial

import torch
from torch import Tensor

from glai_lightning.solvers.processes import Processes


class Moments:
    """Means and covariances of features and targets, summed in float64 batch by batch: O(F^2 + F C) memory.

    Sums are taken around the first batch's means: the mean of a column may be far larger than its deviation.

    Args:
        num_features: F.
        num_targets: C.
        has_bias: whether means are to be taken out, for a bias makes up for them.
        device: where the sums are held.
    """

    def __init__(
        self, num_features: int, num_targets: int, *, has_bias: bool, device: torch.device | str = "cpu"
    ) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.samples = 0
        self.has_bias = has_bias
        self._features_shift, self._targets_shift = zeros(num_features), zeros(num_targets)
        self._features_sum, self._targets_sum = zeros(num_features), zeros(num_targets)
        self._features_squares = zeros(num_features, num_features)
        self._products = zeros(num_features, num_targets)
        self._targets_squares = zeros(num_targets)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add features (n, F) and targets (n, C), both float64."""
        if self.samples == 0 and self.has_bias:
            self._features_shift, self._targets_shift = features.mean(0), targets.mean(0)
        features = features - self._features_shift
        targets = targets - self._targets_shift
        self.samples += len(features)
        self._features_sum += features.sum(0)
        self._targets_sum += targets.sum(0)
        self._features_squares.addmm_(features.t(), features)
        self._products.addmm_(features.t(), targets)
        self._targets_squares += targets.square().sum(0)

    def add_up(self, processes: Processes) -> None:
        """Add up what each process was given, so that all have the moments of everything."""
        samples = int(processes.sum_numbers(self.samples)[0])
        share = self.samples / max(samples, 1)
        self._shift_to(processes.sum(self._features_shift * share), processes.sum(self._targets_shift * share))
        for sums in (
            self._features_sum,
            self._targets_sum,
            self._features_squares,
            self._products,
            self._targets_squares,
        ):
            processes.sum(sums)
        self.samples = samples

    def _shift_to(self, features_shift: Tensor, targets_shift: Tensor) -> None:
        """Take the sums around other numbers than the first batch's means."""
        by_feature, by_target = self._features_shift - features_shift, self._targets_shift - targets_shift
        self._features_shift, self._targets_shift = features_shift, targets_shift
        # Halfway sums make the corrections of second order symmetric: (x + d)^2 = x^2 + d (x + (x + d)).
        features_sum = self._features_sum + self.samples * by_feature
        targets_sum = self._targets_sum + self.samples * by_target
        self._features_squares += self._features_sum.outer(by_feature) + by_feature.outer(features_sum)
        self._products += self._features_sum.outer(by_target) + by_feature.outer(targets_sum)
        self._targets_squares += by_target * (self._targets_sum + targets_sum)
        self._features_sum, self._targets_sum = features_sum, targets_sum

    def features_mean(self) -> Tensor:
        """Return the means of the features, (F,); zeros without a bias."""
        return self._features_shift + self._features_sum / self.samples * self.has_bias

    def targets_mean(self) -> Tensor:
        """Return the means of the targets, (C,); zeros without a bias."""
        return self._targets_shift + self._targets_sum / self.samples * self.has_bias

    def covariance(self) -> Tensor:
        """Return the covariance of the features around ``features_mean``, (F, F)."""
        mean = self._features_sum / self.samples * self.has_bias
        return self._features_squares / self.samples - mean.outer(mean)

    def cross_covariance(self) -> Tensor:
        """Return the covariance of features and targets, (F, C)."""
        features_mean = self._features_sum / self.samples * self.has_bias
        return self._products / self.samples - features_mean.outer(self._targets_sum / self.samples)

    def targets_variance(self) -> Tensor:
        """Return the variances of the targets around ``targets_mean``, (C,)."""
        mean = self._targets_sum / self.samples * self.has_bias
        return self._targets_squares / self.samples - mean.square()

    def half_squared_error(self, weight: Tensor, bias: Tensor | None) -> tuple[float, Tensor]:
        """Return half the mean over samples of the squared errors, summed over outputs, and its gradient.

        Args:
            weight: (C, F), float64.
            bias: (C,), float64, or ``None`` without.

        Returns:
            The half squared error, and its gradient (C, F), or (C, F + 1) with that by the bias last.
        """
        cross = self.cross_covariance().t()
        explained = weight @ self.covariance()
        errors = self.targets_variance().sum() - 2.0 * (weight * cross).sum() + (weight * explained).sum()
        gradient = explained - cross
        if bias is not None:
            offset = weight @ self.features_mean() + bias - self.targets_mean()
            errors = errors + offset.square().sum()
            gradient = torch.cat([gradient + offset.outer(self.features_mean()), offset.unsqueeze(1)], dim=1)
        return 0.5 * float(errors.clamp(min=0.0)), gradient
