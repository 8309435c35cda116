"""Linear classifiers from covariances: weights of classes after the fact, discriminant analysis, prototypes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError, expect_number
from glai_lightning.solvers.moments import Covariances
from glai_lightning.solvers.ridge_path import RidgePath

#: Bias of a class without samples, beside those that have some.
_NEVER = -1e30


def within_classes(covariances: Covariances) -> Tensor:
    """Return the covariance of features around the means of their classes, (F, F), from one-hot targets."""
    shares = covariances.targets_mean.clamp(min=torch.finfo(torch.float64).tiny)
    return covariances.features - (covariances.cross / shares) @ covariances.cross.t()


def class_weights_of(given: object, classes: Sequence[object], covariances: Covariances) -> Tensor:
    """Return how much the samples of each class count, (C,).

    Args:
        given: 'balanced', a number for each class, or numbers by label.
        classes: labels of the classes.
        covariances: of one-hot targets, centred.

    Raises:
        TypeError: if a weight is not a number.
        ValueError: if there are not as many as classes, one is negative, or no class with samples has one above 0.
    """
    if given == "balanced":
        return balanced(covariances)
    if isinstance(given, Mapping):
        given = [given.get(label, 1.0) for label in classes]
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(classes):
        raise UserValueError(
            f"Expected `class_weights` to be 'balanced' or a number for each of {len(classes)} classes, "
            f"but got {given!r}."
        )
    for weight in given:
        expect_number("class_weights", weight, low=0.0)
    weights = covariances.targets_mean.new_tensor(list(given))
    if not bool((weights * covariances.targets_mean > 0).any()):
        raise UserValueError("Expected a class with samples to have a weight above 0, but got none.")
    return weights


def weighted(covariances: Covariances, weights: Tensor) -> Covariances:
    """Return what the covariances would be if the samples of each class counted with its weight.

    Means are exact. Every class is given the mean covariance of all of them, because only their sum is known.

    Args:
        covariances: of one-hot targets, centred.
        weights: of the classes, (C,); at least one class with samples has a positive one.
    """
    present = covariances.targets_mean > 0
    apart = _apart(covariances)
    shares = weights * covariances.targets_mean
    shares = shares / shares.sum()
    shift = apart @ shares
    apart = torch.where(present, apart - shift.unsqueeze(1), 0.0)
    return replace(
        covariances,
        features_mean=covariances.features_mean + shift,
        targets_mean=shares,
        features=within_classes(covariances) + (apart * shares) @ apart.t(),
        cross=apart * shares,
        targets=shares * (1.0 - shares),
    )


def balanced(covariances: Covariances) -> Tensor:
    """Return the weights (C,) with which all classes count the same."""
    shares = covariances.targets_mean
    return torch.where(shares > 0, 1.0 / shares, 0.0)


def discriminant(covariances: Covariances, l2: float) -> tuple[Tensor, Tensor]:
    """Return weight (C, F) and bias (C,) of linear discriminant analysis (Fisher 1936; Hastie et al. 2009, 4.3).

    Args:
        covariances: of one-hot targets, centred.
        l2: what is added to the variance of each feature within classes.
    """
    apart = _apart(covariances)
    path = RidgePath(
        replace(covariances, features=within_classes(covariances), cross=apart), has_bias=True, strengths=[l2]
    )
    weight = path.weight(path.l2.expand(len(covariances.targets_mean)))
    bias = covariances.targets_mean.log() - 0.5 * (weight * apart.t()).sum(1) - weight @ covariances.features_mean
    return weight, _where_present(bias, covariances)


def prototypes(covariances: Covariances) -> tuple[Tensor, Tensor]:
    """Return weight (C, F) and bias (C,) whose logits differ as half the negative squared distances to class means."""
    apart = _apart(covariances)
    bias = -0.5 * apart.square().sum(0) - apart.t() @ covariances.features_mean
    return apart.t().contiguous(), _where_present(bias, covariances)


def _apart(covariances: Covariances) -> Tensor:
    """Return the means of classes, minus that of all samples, (F, C)."""
    return torch.where(covariances.targets_mean > 0, covariances.cross / covariances.targets_mean, 0.0)


def _where_present(bias: Tensor, covariances: Covariances) -> Tensor:
    return torch.where(covariances.targets_mean > 0, bias, _NEVER)
