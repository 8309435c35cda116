"""Taking samples out of sums, and telling where they cannot have been among them."""

from collections.abc import Sequence

import torch

from glai_lightning.checks import UserValueError
from glai_lightning.solvers.class_models import within_classes
from glai_lightning.solvers.moments import Moments


def without(moments: Moments, forgotten: Moments, classes: Sequence[object] | None) -> Moments:
    """Return sums without those of some samples.

    Args:
        moments: of all samples.
        forgotten: of some of them.
        classes: labels of the classes, where the targets are one-hot; ``None`` for a regression.

    Raises:
        ValueError: if there are fewer samples than are forgotten, or the sums that are left are of no samples.
    """
    if classes is None:
        names, there, taken = [""], [float(moments.samples)], [float(forgotten.samples)]
    else:
        names = [f" of class {label!r}" for label in classes]
        there, taken = moments.targets_sum.tolist(), forgotten.targets_sum.tolist()
    for name, added, given in zip(names, there, taken, strict=True):
        if given > added:
            raise UserValueError(
                f"Expected to forget at most the {added:.0f} samples{name} that were added, but got {given:.0f}."
            )
    left = moments.plus(forgotten, -1.0)
    if not _may_be_of_samples(left, moments, of_classes=classes is not None):
        raise UserValueError(
            "Expected to forget samples that were added, but what would be left are sums of no samples: their "
            "covariance is not positive semidefinite."
        )
    if not left.samples:
        return Moments(moments.num_features, moments.num_targets, moments.high.device)
    return left.emptied_of(left.targets_sum == 0) if classes is not None else left


def _may_be_of_samples(left: Moments, before: Moments, *, of_classes: bool) -> bool:
    """Tell whether sums are zero where there are no samples, and their covariance is positive semidefinite."""
    size, scales = before.num_features + 1, before.scales()
    # What rounding may leave of sums that were added and taken away again.
    rounding = 8.0 * before.samples**0.5 * torch.finfo(torch.float64).eps
    bound = rounding * scales[:size].unsqueeze(1) * scales
    if not left.samples:
        return bool((left.high.triu().abs() <= bound).all())
    if of_classes:
        gone = torch.cat([torch.zeros_like(scales[:size], dtype=torch.bool), left.targets_sum == 0])
        if bool((left.high[:, gone].abs() > bound[:, gone]).any()):
            return False
    covariances = left.covariances()
    within = within_classes(covariances) if of_classes else covariances.features
    deviations = scales[: size - 1].where(scales[: size - 1] > 0, 1.0) / left.samples**0.5
    scaled = within / deviations / deviations.unsqueeze(1)
    scaled.diagonal().add_(size * rounding)
    return not bool(torch.linalg.cholesky_ex(scaled).info)
