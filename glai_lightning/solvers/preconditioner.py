"""The preconditioner of the logistic solve: one eigendecomposition of the features' covariance serves every penalty."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glai_lightning.solvers.processes import Processes

#: Columns whose deviation is further than this from the median one are scaled, for eigenvalues to be told apart.
_BAND = 10.0
#: Multiples of the dtype's resolution that products of features are good to.
_ROUNDING = 8.0


@dataclass(frozen=True)
class FeatureSpectrum:
    """The eigenvectors of the covariance of a sample of features, in units that make columns comparable.

    Columns of a usual deviation are left as they are, so that a penalty on squared weights is isotropic in the
    coordinates of the eigenvectors, and exactly diagonal. Others are scaled to the edge of what is usual.

    Args:
        mean: (F,), zero where there is no bias to make up for a shift.
        scale: (F,), what columns are divided by.
        values: (K,), eigenvalues in ascending order, K = min(S, F) of S samples.
        vectors: (F, K), eigenvectors.
        penalties: (K,), what the squared norm of weights of the features as given is along each eigenvector.
        has_bias: whether the last column of weights is a bias.
    """

    mean: Tensor
    scale: Tensor
    values: Tensor
    vectors: Tensor
    penalties: Tensor
    has_bias: bool

    @staticmethod
    def of(features: Tensor, *, has_bias: bool, processes: Processes) -> "FeatureSpectrum":
        """Decompose the covariance of features (S, F), the same in all processes."""
        mean = features.mean(0) if has_bias else features.new_zeros(features.shape[1])
        centered = features - mean
        deviation = centered.square().mean(0).sqrt()
        # What is left of a constant column is the rounding of its mean.
        varies = deviation > _ROUNDING * torch.finfo(features.dtype).eps * features.abs().amax(0)
        usual = float(deviation[varies].median()) if bool(varies.any()) else 1.0
        scale = torch.where(varies, deviation / deviation.clamp(usual / _BAND, usual * _BAND), 1.0)
        centered = torch.where(varies, centered / scale, 0.0)
        if len(centered) < features.shape[1]:
            values, left = torch.linalg.eigh(centered @ centered.t() / len(centered))
            vectors = centered.t() @ left
            vectors /= vectors.norm(dim=0).clamp(min=torch.finfo(features.dtype).tiny)
        else:
            values, vectors = torch.linalg.eigh(centered.t() @ centered / len(centered))
        values = processes.from_first(values.clamp(min=0.0))
        vectors = processes.from_first(vectors.contiguous())
        penalties = (vectors / scale.unsqueeze(1)).square().sum(0)
        return FeatureSpectrum(mean, scale, values, vectors, penalties, has_bias)

    def preconditioner(self, rotation: Tensor | None, variances: Tensor, l2: float) -> "CovariancePreconditioner":
        """Return the approximate inverse Hessian where the logits have a curvature, see ``Loss.curvature``.

        Args:
            rotation: of the classes, (C, C), or ``None``.
            variances: curvature of the loss by each rotated logit, (C,).
            l2: strength of the penalty.
        """
        return CovariancePreconditioner(self, rotation, variances, l2)


class CovariancePreconditioner:
    """An approximate inverse Hessian of the regularised loss, diagonal in rotated classes and rotated features.

    The Hessian is the mean of B(p) (x) x x' over samples with probabilities p, plus the penalty. It is approximated by
    mean B(p) (x) mean x x', whose eigenvectors are products of those of both.
    """

    def __init__(self, spectrum: FeatureSpectrum, rotation: Tensor | None, variances: Tensor, l2: float) -> None:
        self._spectrum = spectrum
        self._rotation = rotation
        self._variances = variances.unsqueeze(1)
        resolution = _ROUNDING * torch.finfo(variances.dtype).eps
        values = spectrum.values + resolution * (float(spectrum.values[-1]) or 1.0)
        self._curvature = self._variances * values + l2 * spectrum.penalties
        # What no sampled feature is seen in, where there are fewer samples than features.
        rest = self._variances * values[:1] + l2 * float(spectrum.scale.reciprocal().square().mean())
        self._rest = rest if spectrum.vectors.shape[0] > spectrum.vectors.shape[1] else None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Multiply the approximate inverse Hessian by a gradient (C, F or F + 1)."""
        spectrum = self._spectrum
        rotated = gradient if self._rotation is None else self._rotation.t() @ gradient
        by_weight = rotated
        if spectrum.has_bias:
            by_bias = rotated[:, -1:]
            by_weight = rotated[:, :-1] - by_bias * spectrum.mean
        by_weight = by_weight / spectrum.scale
        along = by_weight @ spectrum.vectors
        weights = (along / self._curvature) @ spectrum.vectors.t()
        if self._rest is not None:
            weights += (by_weight - along @ spectrum.vectors.t()) / self._rest
        weights /= spectrum.scale
        if spectrum.has_bias:
            bias = by_bias / self._variances - weights @ spectrum.mean.unsqueeze(1)
            weights = torch.cat([weights, bias], dim=1)
        return weights if self._rotation is None else self._rotation @ weights
