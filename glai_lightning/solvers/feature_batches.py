"""Reading features and targets in bounded memory, once for every pass over the data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError

#: Pairs of features (n, F) and targets (n,) that can be read again and again, such as a DataLoader.
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FeatureBatches:
    """Features and targets in batches, read anew for every pass.

    Args:
        features: features (N, F) of a floating dtype, or a re-iterable of (features, targets) batches.
        targets: targets of N samples, or ``None`` where ``features`` yields them.
        transform: what makes the features of a solve out of those that are read, applied batch by batch.
        rows: rows of a batch cut from features (N, F).
    """

    features: Tensor | Batches
    targets: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    rows: int = 1024

    def __post_init__(self) -> None:
        if isinstance(self.features, Tensor):
            if not isinstance(self.targets, Tensor):
                raise UserTypeError(f"Expected `targets` to be a tensor, but got `{type(self.targets).__name__}`.")
            _check_batch(self.features, self.targets)
        elif self.targets is not None:
            raise UserTypeError("Expected `targets` to be None where batches hold the targets, but got both.")
        elif not isinstance(self.features, Iterable):
            raise UserTypeError(
                "Expected a tensor or an iterable of (features, targets) batches, "
                f"but got `{type(self.features).__name__}`."
            )
        elif isinstance(self.features, Iterator):
            raise UserTypeError(
                "Expected batches that can be read several times, such as a list or a DataLoader, "
                f"but got `{type(self.features).__name__}`, which can be read once."
            )

    @property
    def in_memory(self) -> bool:
        """Whether the batches are slices of one tensor: the same rows in the same order in every pass."""
        return isinstance(self.features, Tensor)

    @property
    def samples(self) -> int | None:
        """Number of samples, or ``None`` where only reading them all would tell."""
        return len(self.features) if isinstance(self.features, Tensor) else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in self._pairs():
            if len(features):
                yield (features if self.transform is None else self.transform(features)).detach(), targets

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.features, Tensor):
            assert self.targets is not None
            rows = self.rows
            yield from zip(torch.split(self.features, rows), torch.split(self.targets, rows), strict=True)
            return
        for batch in self.features:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise UserTypeError(
                    f"Expected every batch to be a pair (features, targets), but got `{type(batch).__name__}`."
                )
            features, targets = batch
            _check_batch(features, targets)
            yield features, targets


def _check_batch(features: Tensor, targets: Tensor) -> None:
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


def as_batches(features: Tensor | Batches | FeatureBatches, targets: Tensor | None, *, outputs: int) -> FeatureBatches:
    """Return features and targets as batches to be read once a pass.

    Args:
        features: (N, F), or a re-iterable of (features, targets) batches.
        targets: of N samples, or ``None`` where ``features`` yields them.
        outputs: how many outputs C are computed for each sample; it decides how many rows are cut at a time.
    """
    if isinstance(features, FeatureBatches):
        return features
    # The outputs of a batch are to stay in the processor's cache.
    return FeatureBatches(features, targets, rows=max(1024, min(4096, 160_000 // outputs)))


def held_out_batches(
    validation: tuple[Tensor, Tensor] | Batches | FeatureBatches | None, *, outputs: int
) -> FeatureBatches | None:
    """Return validation data, a pair of tensors or a re-iterable of batches, as batches."""
    if validation is None or isinstance(validation, FeatureBatches):
        return validation
    if isinstance(validation, tuple | list) and len(validation) == 2 and isinstance(validation[0], Tensor):
        features, targets = validation
        return as_batches(features, targets, outputs=outputs)
    return as_batches(cast(Batches, validation), None, outputs=outputs)


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
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._held = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take the rows (n, F) that are due, and their targets (n,)."""
        due = slice(-self._seen % self._stride, None, self._stride)
        self._seen += len(features)
        taken = features[due].clone(), targets[due].clone()
        self._kept.append(taken)
        self._held += len(taken[0])
        while self._held > 2 * self.rows:
            features, targets = self.collect()
            self._kept = [(features[::2].clone(), targets[::2].clone())]
            self._held = len(self._kept[0][0])
            self._stride *= 2

    def collect(self) -> tuple[Tensor, Tensor]:
        """Return the features (n, F) and the targets (n,) that are held."""
        features, targets = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        self._kept = [(features, targets)]
        return features, targets
