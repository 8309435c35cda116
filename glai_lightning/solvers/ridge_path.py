"""The ridge solutions for every strength of the penalty, and what tells between them, from covariances alone."""

import time

import torch
from torch import Tensor

from glai_lightning.solvers.moments import Covariances
from glai_lightning.solvers.report import LinearSolution, SolveReport

#: Strengths of the penalty to choose from, relative to the mean variance of the features.
_RELATIVE_GRID = tuple(10.0 ** (exponent / 2.0) for exponent in range(4, -13, -1))
#: The least that a leverage leaves of an error: one of 1 leaves nothing to predict a sample from.
_LEAST_LEFT = 1e-8


class RidgePath:
    """The ridge solutions for every strength of the penalty, from one eigendecomposition of the covariance.

    For a strength l2 the weights are V (L + l2)^-1 V' c, with c the covariance of features and targets and V L V' that
    of the features. Eigenvalues below F times the machine epsilon of the largest, or below what the sums resolve, are
    noise; their directions get no weight.

    Args:
        covariances: of the features and targets, centred where there is a bias.
        has_bias: whether there is one.
        strengths: of the penalty, from strong to weak; ``None`` for 17 between 1e-6 and 100 times the mean variance of
            the features.
    """

    def __init__(self, covariances: Covariances, *, has_bias: bool, strengths: list[float] | None) -> None:
        self.covariances = covariances
        self.has_bias = has_bias
        self.samples = covariances.samples
        self.eigenvalues, self.vectors = torch.linalg.eigh(covariances.features)
        largest = self.eigenvalues[-1].clamp(min=0.0)
        noise = largest * len(self.eigenvalues) * torch.finfo(torch.float64).eps
        self._kept = self.eigenvalues > noise.clamp(min=covariances.resolution)
        self.rotated = self.vectors.t() @ covariances.cross
        spread = float(self.eigenvalues.clamp(min=0.0).mean()) or 1.0
        self.strengths = [relative * spread for relative in _RELATIVE_GRID] if strengths is None else strengths
        self.l2 = self.eigenvalues.new_tensor(self.strengths)

    def shrinkage(self, l2: Tensor) -> Tensor:
        """Return 1 / (eigenvalue + l2) for strengths (G,): (G, F), zero for directions that are noise."""
        inverse = 1.0 / (self.eigenvalues + l2.unsqueeze(1))
        return torch.where(self._kept, inverse, 0.0)

    def weight(self, l2: Tensor) -> Tensor:
        """Return the weights (C, F) for a strength of each output, (C,)."""
        shrunk = self.shrinkage(l2[:1] if bool((l2 == l2[0]).all()) else l2)
        weight: Tensor = (shrunk * self.rotated.t()) @ self.vectors.t()
        return weight

    def bias(self, weight: Tensor) -> Tensor:
        """Return the bias (C,) that goes with weights (C, F)."""
        return self.covariances.targets_mean - weight @ self.covariances.features_mean

    def outputs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (G, n, C) of features (n, F) for all strengths, and the features' leverages (G, n).

        The leverage of a training sample is the derivative of its output by its own target.
        """
        projected = (features - self.covariances.features_mean) @ self.vectors
        shrinkage = self.shrinkage(self.l2)
        outputs = torch.stack([projected @ (row.unsqueeze(1) * self.rotated) for row in shrinkage])
        leverages = shrinkage @ projected.square().t() / self.samples
        return outputs + self.covariances.targets_mean, leverages + float(self.has_bias) / self.samples

    def left_out(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return what is predicted for training samples by solutions without them, for all strengths: (G, n, C)."""
        outputs, leverages = self.outputs(features)
        return targets - (targets - outputs) / (1.0 - leverages).clamp(min=_LEAST_LEFT).unsqueeze(2)

    def errors_on(self, others: Covariances, *, per_output: bool) -> Tensor:
        """Return the mean squared errors of all strengths on other data, from its covariances.

        Args:
            others: of the other data.
            per_output: whether by output, or summed over outputs.

        Returns:
            (G, C) or (G, 1).
        """
        apart = self.vectors.t() @ (others.features_mean - self.covariances.features_mean)
        offset = self.covariances.targets_mean - others.targets_mean
        squares = self.vectors.t() @ others.features @ self.vectors + apart.outer(apart)
        products = self.rotated * (self.vectors.t() @ others.cross - apart.outer(offset))
        shrinkage = self.shrinkage(self.l2)
        constant = others.targets + offset.square()
        if per_output:
            scaled = shrinkage.unsqueeze(2) * self.rotated
            errors = torch.einsum("gfc,fe,gec->gc", scaled, squares, scaled)
        else:
            errors = ((shrinkage @ (squares * (self.rotated @ self.rotated.t()))) * shrinkage).sum(1, keepdim=True)
            products, constant = products.sum(1, keepdim=True), constant.sum(0, keepdim=True)
        found: Tensor = errors - 2.0 * (shrinkage @ products) + constant
        return found

    def cross_validated(self, *, per_output: bool) -> Tensor:
        """Return the generalised cross-validation scores of all strengths (Golub, Heath and Wahba 1979).

        They are the squared errors of leave-one-out predictions in which every sample has the mean leverage.

        Returns:
            (G, C), or (G, 1) summed over outputs.
        """
        shrunk = self.l2.unsqueeze(1) * self.shrinkage(self.l2)
        explained = torch.where(self._kept.unsqueeze(1), self.rotated.square() / self.eigenvalues.unsqueeze(1), 0.0)
        residual = (self.covariances.targets - explained.sum(0)).clamp(min=0.0)
        errors = residual + shrunk.square() @ explained
        free = self.samples - int(self._kept.sum()) - float(self.has_bias)
        left = ((free + shrunk.sum(1)) / self.samples).clamp(min=_LEAST_LEFT)
        scores: Tensor = errors / left.square().unsqueeze(1)
        return scores if per_output else scores.sum(1, keepdim=True)

    def penalised(self, weight: Tensor, bias: Tensor | None, l2: Tensor) -> tuple[float, float]:
        """Return the training loss with the penalty, and the norm of its gradient."""
        loss, gradient = self.covariances.half_squared_error(weight, bias)
        gradient[:, : weight.shape[1]] += l2.unsqueeze(1) * weight
        return loss + 0.5 * float(l2 @ weight.square().sum(1)), float(gradient.norm())

    def solution(
        self,
        found: tuple[Tensor, Tensor | None],
        start: tuple[Tensor, Tensor | None],
        chosen: Tensor,
        *,
        scores: Tensor | None,
        score: float | None = None,
        start_score: float | None = None,
        kept: bool = False,
        passes: int,
        began: float,
    ) -> LinearSolution:
        """Return weights (C, F) and a bias, float64, with the report of how they were found."""
        loss, gradient_norm = self.penalised(*found, chosen)
        start_loss, start_gradient_norm = self.penalised(*start, chosen)
        by_strength = [None] * len(self.strengths) if scores is None else scores.mean(1).tolist()
        report = SolveReport(
            loss=loss,
            start_loss=start_loss,
            gradient_norm=gradient_norm,
            start_gradient_norm=start_gradient_norm,
            score=start_score if kept else score,
            start_score=start_score,
            l2=float(chosen[0] if bool((chosen == chosen[0]).all()) else chosen.mean()),
            tried=tuple(zip(self.strengths, by_strength, strict=True)),
            method="closed_form",
            steps=1,
            best_step=0 if kept else 1,
            passes=passes,
            seconds=time.perf_counter() - began,
            reason="closed_form",
        )
        return LinearSolution(*found, report)
