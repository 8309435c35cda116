"""Reading what a loss is, as a function of a head's outputs, off its derivatives.

The losses that can be solved for are sums over samples of ``w l(z, y)``: weight w, outputs z, target y. Their
derivatives with respect to z, the second and the third of them along a direction v, are

====================  ==============  ==================================  =============================================
                      gradient        second, along v                     third, along v twice
====================  ==============  ==================================  =============================================
cross-entropy         w (p - y)       w q(v), q(u) = p u - p (p . u)      w (q(v v) - 2 (p . v) q(v)), p = softmax(z)
binary cross-entropy  w (s - y)       w s' v                              w s' (1 - 2 s) v v, s = sigmoid(z)
half a squared error  w (z - y)       w v                                 0
====================  ==============  ==================================  =============================================

So the second says w, the gradient then says y, and the third agrees only if the loss is of that family. How the user
wrote the loss down plays no part. Weighted, smoothed, with soft targets, or put together out of other functions: all of
these are read alike.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError, as_misconfiguration
from glai_lightning.heads.layout import HeadLayout
from glai_lightning.heads.patterns import sample_shape

LossKind = Literal["cross_entropy", "binary_cross_entropy", "mse"]

#: Weights below this part of the largest are those of samples that the loss passes over.
_NO_WEIGHT = 1e-6
#: Below this, a sample's outputs are so certain that its weight cannot be told from rounding.
_LEAST_SPREAD = 1e-2


class LossNotReadError(UserMisconfigurationError):
    """A loss that is not one that can be solved for."""


class HeadBatch(NamedTuple):
    """What a head is given and trained on in one batch.

    Args:
        inputs: (n, D).
        targets: class labels (n,), or probabilities or numbers (n, C).
        weights: (n,), what each sample counts, or ``None`` if all count the same.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None


class _Terms(NamedTuple):
    mean: Tensor
    second: Tensor
    third: Tensor
    spread: Tensor


@dataclass(frozen=True)
class LossReading:
    """What a loss is in the outputs of a head.

    Args:
        kind: which loss.
        targets: (n, C), where the loss of a sample is smallest: probabilities, or numbers for a squared error.
        weights: (n,), what each sample counts in the loss.
        known: (n,), whether the outputs of a sample were uncertain enough to tell.
    """

    kind: LossKind
    targets: Tensor
    weights: Tensor
    known: Tensor

    def gradient_at(self, outputs: Tensor) -> Tensor:
        """Return the gradient that the loss has at other outputs (n, C), if it is what was read."""
        mean = _TERMS[self.kind](outputs, torch.ones_like(outputs)).mean
        return self.weights.unsqueeze(1) * (mean - self.targets)


def precision_of(outputs: Iterable[Tensor]) -> float:
    """Return how far numbers that are computed from outputs of this dtype may be from what they are to be."""
    return max(1e-4 if tensor.dtype in (torch.float32, torch.float64) else 5e-2 for tensor in outputs)


def outputs_of_layout(layout: HeadLayout, inputs: Tensor) -> Tensor:
    """Return probing outputs, with a gradient, of the shape of those of a head for the inputs given.

    Raises:
        MisconfigurationException: for inputs whose outputs may have any shape.
    """
    with torch.no_grad(), as_misconfiguration():
        shape = sample_shape(layout, inputs)
    return probing_outputs((*shape, layout.num_outputs), layout.output.weight).requires_grad_()


def probing_outputs(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return outputs between -2 and 2, the same for the same shape, at which a loss shows what it is."""
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    count = torch.Size(shape).numel()
    return (4 * _spread_evenly(count, like.device, dtype) - 2).reshape(tuple(shape))


def loss_gradient(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a loss, whose graph is kept, with respect to all outputs, as rows (n, C)."""
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    return as_rows(torch.zeros_like(z) if g is None else g for g, z in zip(gradients, outputs, strict=True))


def as_rows(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors (..., C) as one of rows (n, C), in at least float32, detached."""
    rows = torch.cat([tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors])
    return rows if rows.dtype is torch.float64 else rows.float()


def read_loss(loss: Tensor, outputs: Sequence[Tensor]) -> LossReading:
    """Read off a loss what it is in the outputs of a head. Its graph is kept.

    Args:
        loss: a number.
        outputs: what the head returned, call by call: (..., C), each a part of the graph of the loss.

    Returns:
        Targets and weights of all samples, in the order of the outputs.

    Raises:
        LossNotReadError: if the loss is no sum over samples of one of the losses that can be solved for.

    Example:
        >>> z, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
        >>> loss = -(z.log_softmax(1)[torch.arange(4), y] * torch.tensor([1.0, 1.0, 2.0, 0.0])).sum()
        >>> reading = read_loss(loss, [z])
        >>> reading.kind, reading.weights.round(decimals=3).tolist()
        ('cross_entropy', [1.0, 1.0, 2.0, 0.0])
    """
    tolerance = precision_of(outputs)
    gradient, second, third, direction = _differentiate(loss, outputs)
    at = as_rows(outputs)
    for kind, terms_of in _TERMS.items():
        terms = terms_of(at, direction)
        square = terms.second.square().sum(1)
        known = (terms.spread > _LEAST_SPREAD) & (square > 0)
        if not bool(known.any()):
            continue
        weights = torch.where(known, (second * terms.second).sum(1) / square.where(known, 1.0), 0.0)
        largest = weights.abs().max()
        weights = torch.where(weights.abs() > _NO_WEIGHT * largest, weights, 0.0)
        of_rows = weights.unsqueeze(1)
        targets = torch.where(of_rows > 0, terms.mean - gradient / of_rows.where(of_rows > 0, 1.0), 0.0)
        scale = tolerance * largest
        rows = known.unsqueeze(1)
        fits = (
            bool(largest > 0)
            and bool((weights >= -scale).all())
            and _is_small((second - of_rows * terms.second) * rows, scale * terms.second.abs().max())
            and _is_small((third - of_rows * terms.third) * rows, scale * direction.square().max())
            and _is_small(torch.where((of_rows == 0) & rows, gradient, 0.0), scale)
        )
        if fits and kind != "mse":
            fits = bool(((targets > -tolerance) & (targets < 1 + tolerance)).all())
        if fits:
            return LossReading(kind, targets, weights, known)
    raise LossNotReadError(
        "Expected a loss that is a sum over samples of the cross-entropy, the binary cross-entropy or the squared "
        "error of the outputs of the head, each with a weight, so that it can be solved for, but got another: with "
        "several terms, of outputs that were scaled or shifted, or weighted by the outputs themselves."
    )


def shows_its_loss(kind: LossKind, outputs: Sequence[Tensor]) -> bool:
    """Tell whether any sample's outputs are uncertain enough that a loss of them shows what it is.

    Example:
        >>> shows_its_loss("cross_entropy", [torch.tensor([[0.3, 0.0]])])
        True
        >>> shows_its_loss("cross_entropy", [torch.tensor([[9.0, 0.0]])])
        False
    """
    rows = as_rows(outputs)
    return bool((_TERMS[kind](rows, torch.ones_like(rows)).spread > _LEAST_SPREAD).any())


def label_smoothing_of(reading: LossReading) -> float:
    """Return the smoothing that turns labels into the targets of a cross-entropy, 0 if there is no such."""
    targets = reading.targets[reading.weights > 0]
    if reading.kind != "cross_entropy" or not len(targets):
        return 0.0
    smoothing = round(float(targets.min() * targets.shape[1]), 5)
    smoothed = 0 < smoothing < 1 and _labels(targets, smoothing) is not None
    return smoothing if smoothed else 0.0


def _labels(targets: Tensor, label_smoothing: float) -> Tensor | None:
    """Return the labels (n,) of which distributions (n, C) are the smoothed ones, ``None`` if there are none."""
    labels = targets.argmax(1)
    smoothed = F.one_hot(labels, targets.shape[1]) * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return labels if bool(((targets - smoothed).abs() < 1e-3).all()) else None


def formed_targets(kind: LossKind, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return targets (n, C) as a solver wants them: labels (n,) where they are, probabilities or numbers otherwise."""
    if kind == "mse":
        return targets
    if kind == "cross_entropy":
        labels = _labels(targets, label_smoothing)
        probabilities = targets.clamp(0, 1)
        return probabilities / probabilities.sum(1, keepdim=True) if labels is None else labels
    rounded = targets.round()
    hard = bool(((targets - rounded).abs() < 1e-3).all())
    if targets.shape[1] == 1 and hard:
        return rounded.long().squeeze(1)
    return rounded if hard else targets.clamp(0, 1)


def head_batch(reading: LossReading, inputs: Tensor, label_smoothing: float) -> HeadBatch:
    """Return what a reading says of the samples that the loss does not pass over, and of their inputs (n, D)."""
    counted = reading.weights > 0
    weights = reading.weights[counted] * counted.sum()
    varied = len(weights) > 0 and bool(((weights - weights.mean()).abs() > 1e-3 * weights.mean()).any())
    targets = formed_targets(reading.kind, reading.targets[counted], label_smoothing)
    return HeadBatch(inputs[counted], targets, weights if varied else None)


def _differentiate(loss: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    directions = [0.5 + _spread_evenly(z.numel(), z.device, z.dtype).reshape(z.shape) for z in outputs]
    try:
        derivatives: list[Tensor] = []
        value = loss
        for order in range(3):
            gradients = _gradients(value, outputs, create_graph=order < 2)
            derivatives.append(as_rows(gradients))
            value = torch.stack([(g * v).sum() for g, v in zip(gradients, directions, strict=True)]).sum()
    except RuntimeError as error:
        raise LossNotReadError(
            "Expected a loss that can be differentiated three times with respect to the outputs of the head, so that "
            f"it can be read, but got one whose derivatives fail: {error}"
        ) from error
    return derivatives[0], derivatives[1], derivatives[2], as_rows(directions)


def _gradients(value: Tensor, outputs: Sequence[Tensor], *, create_graph: bool) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(z) for z in outputs]
    gradients = torch.autograd.grad(value, outputs, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(z) if g is None else g for g, z in zip(gradients, outputs, strict=True)]


def _is_small(residual: Tensor, limit: Tensor) -> bool:
    # NaN is not.
    return bool((residual.abs() <= limit).all())


def _spread_evenly(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers in [0, 1), no two neighbours alike: multiples of the golden ratio (Weyl's sequence)."""
    numbers = torch.arange(1, count + 1, device=device, dtype=torch.float64) * 0.6180339887498949
    return (numbers % 1.0).to(dtype)


def _cross_entropy(z: Tensor, v: Tensor) -> _Terms:
    p = z.softmax(1)

    def along(u: Tensor) -> Tensor:
        return p * (u - (p * u).sum(1, keepdim=True))

    second = along(v)
    third = along(v * v) - 2 * (p * v).sum(1, keepdim=True) * second
    return _Terms(p, second, third, 1 - p.max(1).values)


def _binary_cross_entropy(z: Tensor, v: Tensor) -> _Terms:
    s = z.sigmoid()
    slope = s * (1 - s)
    return _Terms(s, slope * v, slope * (1 - 2 * s) * v * v, 4 * slope.min(1).values)


def _squared_error(z: Tensor, v: Tensor) -> _Terms:
    return _Terms(z, v, torch.zeros_like(z), torch.ones_like(z[:, 0]))


_TERMS: dict[LossKind, Callable[[Tensor, Tensor], _Terms]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _squared_error,
}


def rows_of(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Return what a head was given as rows (n, D), one for each row of its outputs (..., C)."""
    return torch.cat([x.detach().reshape(z[..., 0].numel(), -1) for x, z in zip(inputs, outputs, strict=True)])
