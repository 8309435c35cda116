"""Reading features and targets in bounded memory, once for every pass over the data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError

#: Pairs of features (n, F) and targets, or triples with weights of samples (n,), that can be read again and again,
#: such as a DataLoader.
Batches = Iterable[tuple[Tensor, ...]]
#: Features, targets and, if there are any, weights of samples: tensors of all samples, or batches of them.
Data = tuple[Tensor, ...] | Batches

#: One row in so many is held out of training data that is to be validated on, too.
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class FeatureBatches:
    """Features, targets and weights in batches, read anew for every pass.

    Args:
        features: features (N, F) of a floating dtype, or a re-iterable of batches.
        targets: targets of N samples, or ``None`` where ``features`` yields them.
        weights: (N,), how much each sample counts, or ``None``.
        transform: what makes the features of a solve out of those that are read, applied batch by batch.
        rows: rows of a batch cut from features (N, F).
        keys: (N, ...), what decides the part of each row where it is not the features.
        part: which rows are read: ``"all"``, or one of the two parts that ``split`` makes.
    """

    features: Tensor | Batches
    targets: Tensor | None = None
    weights: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    rows: int = 1024
    keys: Tensor | None = None
    part: Literal["all", "kept", "held_out"] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.features, Tensor):
            if not isinstance(self.targets, Tensor):
                raise UserTypeError(f"Expected `targets` to be a tensor, but got `{type(self.targets).__name__}`.")
            _check_batch(self.features, self.targets, self.weights)
        elif self.targets is not None or self.weights is not None:
            raise UserTypeError(
                "Expected `targets` and weights of samples to be None where batches hold them, but got both."
            )
        elif not isinstance(self.features, Iterable):
            raise UserTypeError(
                f"Expected a tensor or an iterable of batches, but got `{type(self.features).__name__}`."
            )
        elif isinstance(self.features, Iterator):
            raise UserTypeError(
                "Expected batches that can be read several times, such as a list or a DataLoader, "
                f"but got `{type(self.features).__name__}`, which can be read once."
            )

    @property
    def samples(self) -> int | None:
        """Number of samples, or ``None`` where only reading them all would tell."""
        return len(self.features) if isinstance(self.features, Tensor) and self.part == "all" else None

    def split(self) -> tuple["FeatureBatches", "FeatureBatches"]:
        """Return the training part and the held-out part, a tenth, of the rows.

        What a row holds decides its part, so that rows that come in another order in every pass stay in theirs.
        """
        if isinstance(self.features, Tensor) and self.transform is None:
            held_out = _is_held_out(self.features if self.keys is None else self.keys)
            return self.selected(~held_out), self.selected(held_out)
        return replace(self, part="kept"), replace(self, part="held_out")

    def selected(self, rows: Tensor) -> "FeatureBatches":
        """Return some rows of tensors, by a mask or by indices, in their order."""
        assert isinstance(self.features, Tensor)
        assert self.targets is not None
        weights = None if self.weights is None else self.weights[rows]
        return replace(self, features=self.features[rows], targets=self.targets[rows], weights=weights, keys=None)

    def untransformed(self) -> "FeatureBatches":
        """Return the same rows as they are read."""
        return replace(self, transform=None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for features, targets, weights in self._triples():
            if self.part != "all":
                rows = _is_held_out(features) if self.part == "held_out" else ~_is_held_out(features)
                features, targets = features[rows], targets[rows]
                weights = None if weights is None else weights[rows]
            if len(features):
                yield (features if self.transform is None else self.transform(features)).detach(), targets, weights

    def _triples(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        if isinstance(self.features, Tensor):
            assert self.targets is not None
            for start in range(0, len(self.features), self.rows):
                rows = slice(start, start + self.rows)
                yield self.features[rows], self.targets[rows], None if self.weights is None else self.weights[rows]
            return
        for batch in self.features:
            if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                raise UserTypeError(
                    "Expected every batch to be a pair (features, targets), or a triple with weights of samples, "
                    f"but got `{type(batch).__name__}`."
                )
            features, targets, weights = (*batch, None)[:3]
            _check_batch(features, targets, weights)
            yield features, targets, weights


def _check_batch(features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    if not isinstance(features, Tensor) or not isinstance(targets, Tensor):
        raise UserTypeError(
            "Expected features and targets to be tensors, "
            f"but got `{type(features).__name__}` and `{type(targets).__name__}`."
        )
    if not features.is_floating_point():
        raise UserTypeError(f"Expected features of a floating dtype, but got {features.dtype}.")
    if features.ndim != 2:
        raise UserValueError(f"Expected features of shape (samples, features), but got {tuple(features.shape)}.")
    if len(features) != len(targets):
        raise UserValueError(f"Expected as many targets as features, but got {len(targets)} and {len(features)}.")
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise UserTypeError(f"Expected weights of samples to be a tensor, but got `{type(weights).__name__}`.")
    if weights.shape != (len(features),):
        raise UserValueError(
            f"Expected weights of samples of shape ({len(features)},), but got {tuple(weights.shape)}."
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise UserValueError("Expected weights of samples to be finite and at least 0, but got others.")


def _is_held_out(features: Tensor) -> Tensor:
    """Return which rows (n,) are held out, by their bits: the same whenever, wherever and beside whatever they come."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[features.element_size()]
    sums = features.detach().contiguous().view(integers).sum(1, dtype=torch.int64)
    # A large prime mixes high bits into low ones. Rows of zeros are never held out.
    return (sums % 1_000_003) % _HELD_OUT_ONE_IN == _HELD_OUT_ONE_IN - 1


def as_batches(
    features: Tensor | Batches | FeatureBatches, targets: Tensor | None, weights: Tensor | None, *, outputs: int
) -> FeatureBatches:
    """Return features, targets and weights as batches to be read once a pass.

    Args:
        features: (N, F), or a re-iterable of batches.
        targets: of N samples, or ``None`` where ``features`` yields them.
        weights: of N samples, or ``None``.
        outputs: how many outputs C are computed for each sample; it decides how many rows are cut at a time.
    """
    if isinstance(features, FeatureBatches):
        return features
    # The outputs of a batch are to stay in the processor's cache.
    return FeatureBatches(features, targets, weights, rows=max(1024, min(4096, 160_000 // outputs)))


def held_out_batches(validation: Data | FeatureBatches | None, *, outputs: int) -> FeatureBatches | None:
    """Return validation data, a tuple of tensors or a re-iterable of batches, as batches."""
    if validation is None or isinstance(validation, FeatureBatches):
        return validation
    return as_batches(*as_tensors(validation), outputs=outputs)


def as_tensors(data: Data) -> tuple[Tensor | Batches, Tensor | None, Tensor | None]:
    """Return the tensors of features, targets and weights, or the batches of them and nothing."""
    if isinstance(data, tuple | list) and len(data) in (2, 3) and isinstance(data[0], Tensor):
        features, targets, weights = (*data, None)[:3]
        return features, targets, weights
    return cast(Batches, data), None, None


class SystematicSample:
    """A bounded, evenly spaced sample of the rows of a stream whose length is not known beforehand.

    Every row is kept until there are too many; then every second one is dropped, and only every second one taken from
    there on. Deterministic, so that a solve is.

    Args:
        rows: at least so many rows are handed out if there are as many, and less than twice as many.
        samples: length of the stream where it is known; then no row is taken in vain.
    """

    def __init__(self, rows: int, samples: int | None = None) -> None:
        self.rows = rows
        self._stride = 1 if samples is None else max(1, samples // rows)
        self._seen = 0
        self._kept: list[Tensor] = []
        self._held = 0

    def add(self, features: Tensor) -> None:
        """Take the rows (n, F) that are due."""
        taken = features[-self._seen % self._stride :: self._stride].clone()
        self._seen += len(features)
        self._kept.append(taken)
        self._held += len(taken)
        while self._held > 2 * self.rows:
            kept = self.collect()[::2].clone()
            self._kept, self._held = [kept], len(kept)
            self._stride *= 2

    def collect(self) -> Tensor:
        """Return the rows (n, F) that are held."""
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]
