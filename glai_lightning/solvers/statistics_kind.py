"""What statistics are of: which features, and which targets. Only statistics of one kind add up."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError

Label = int | str
MIXED_TARGETS = "Expected all targets to be class labels (integers) or all to be numbers (floating), but got both."


@dataclass(frozen=True)
class Kind:
    """What statistics are of; ``None`` where it is not known yet.

    Args:
        fingerprint: of the feature map.
        dtype: of the features.
        num_features: F.
        targets: class labels, or numbers to regress on.
        num_numbers: C of a regression.
        classes: labels of the classes, in the order of the outputs.
    """

    fingerprint: str | None = None
    dtype: str | None = None
    num_features: int | None = None
    targets: Literal["labels", "numbers"] | None = None
    num_numbers: int | None = None
    classes: tuple[Label, ...] | None = None

    @property
    def num_targets(self) -> int:
        """Number of outputs C."""
        return len(self.classes or ()) if self.targets == "labels" else self.num_numbers or 0

    def joined(self, other: "Kind") -> "Kind":
        """Return the kind of the statistics of both; new classes are appended.

        Raises:
            TypeError: if labels are of other types, or some targets are labels and others numbers.
            ValueError: if the features are not the same, or there are other numbers of targets.
        """
        if None not in (self.targets, other.targets) and self.targets != other.targets:
            raise UserTypeError(MIXED_TARGETS)
        ours, theirs = ({field.name: getattr(kind, field.name) for field in fields(self)} for kind in (self, other))
        for name, message in _MISMATCHES.items():
            if ours[name] is not None and theirs[name] not in (None, ours[name]):
                raise UserValueError(message.format(ours[name], theirs[name]))
        joined = {name: theirs[name] if value is None else value for name, value in ours.items()}
        if self.classes is not None and other.classes is not None:
            known = set(self.classes)
            new = [label for label in other.classes if label not in known]
            joined["classes"] = check_classes((*self.classes, *new)) if new else self.classes
        return Kind(**joined)

    def places_in(self, other: "Kind") -> list[int]:
        """Return where the targets stand among those of a kind that this one was joined to."""
        if self.classes is None or other.classes is None:
            return list(range(self.num_targets))
        where = {label: place for place, label in enumerate(other.classes)}
        return [where[label] for label in self.classes]

    def read(self, targets: object, samples: int) -> tuple["Kind", Tensor]:
        """Return the kind of targets, and the targets: positions (n,) among the classes, or numbers (n, C).

        Raises:
            TypeError: if they are neither labels nor numbers.
            ValueError: if there are not as many as ``samples``, or a label is negative or has no name.
        """
        if isinstance(targets, list | tuple) and any(isinstance(label, str) for label in targets):
            labels = check_classes(tuple(dict.fromkeys(targets)))
            where = {label: place for place, label in enumerate(labels)}
            positions = torch.tensor([where[label] for label in targets])
        else:
            targets = torch.tensor(targets) if isinstance(targets, list | tuple) else targets
            if not isinstance(targets, Tensor) or targets.is_complex():
                raise UserTypeError(
                    f"Expected targets to be a tensor, or a list of labels, but got `{type(targets).__name__}`."
                )
            if targets.is_floating_point():
                return self._read_numbers(targets, samples)
            if targets.ndim == 2 and targets.shape[1] == 1:
                targets = targets.squeeze(1)
            if targets.ndim != 1:
                raise UserValueError(f"Expected class labels of shape (samples,), but got {tuple(targets.shape)}.")
            present, positions = torch.unique(targets.long(), return_inverse=True)
            labels = self._names(present.tolist())
        if len(positions) != samples:
            raise UserValueError(f"Expected as many targets as features, but got {len(positions)} and {samples}.")
        return Kind(targets="labels", classes=labels), positions

    def _names(self, numbers: list[int]) -> tuple[Label, ...]:
        named = self.classes is not None and isinstance(next(iter(self.classes), None), str)
        if numbers and (numbers[0] < 0 or (named and numbers[-1] >= len(self.classes or ()))):
            allowed = f"in [0, {len(self.classes or ()) - 1}]" if named else "of at least 0"
            raise UserValueError(f"Expected class labels {allowed}, but got {numbers[0]} to {numbers[-1]}.")
        return tuple((self.classes or ())[number] for number in numbers) if named else tuple(numbers)

    def _read_numbers(self, targets: Tensor, samples: int) -> tuple["Kind", Tensor]:
        targets = targets.unsqueeze(1) if targets.ndim == 1 else targets
        if targets.ndim != 2:
            raise UserValueError(f"Expected targets of shape (samples, outputs), but got {tuple(targets.shape)}.")
        if len(targets) != samples:
            raise UserValueError(f"Expected as many targets as features, but got {len(targets)} and {samples}.")
        return Kind(targets="numbers", num_numbers=targets.shape[1]), targets.detach().double()

    def encode(self, read: Tensor, kind: "Kind") -> Tensor:
        """Return targets of this kind, (n, C) in float64, one-hot for labels, from what ``read`` returned."""
        if kind.targets == "numbers":
            return read
        places = torch.tensor(kind.places_in(self), device=read.device)
        return F.one_hot(places[read], self.num_targets).double()


_MISMATCHES = {
    "num_features": "Expected {} features a sample, but got {}.",
    "dtype": "Expected features of {}, as before, but got {}.",
    "fingerprint": "Expected statistics of the same feature map, with the fingerprint {:.12}, but got {:.12}: its "
    "modules, weights or dtypes are others.",
    "num_numbers": "Expected targets of shape (samples, {}), but got (samples, {}).",
}


def check_classes(classes: Sequence[Label]) -> tuple[Label, ...]:
    """Check labels of classes, and return them.

    Raises:
        TypeError: if they are not all integers or all strings.
        ValueError: if one is there twice.
    """
    if not isinstance(classes, Sequence | range) or isinstance(classes, str):
        raise UserTypeError(f"Expected `classes` to be a list, all integers or all strings, but got {classes!r}.")
    kinds = {type(label) for label in classes}
    if kinds not in ({int}, {str}):
        got = " and ".join(sorted(f"`{kind.__name__}`" for kind in kinds)) or "none"
        raise UserTypeError(f"Expected labels of classes to be all integers or all strings, but got {got}.")
    if len(set(classes)) < len(classes):
        twice = next(label for place, label in enumerate(classes) if label in classes[:place])
        raise UserValueError(f"Expected every class once, but got {twice!r} twice.")
    return tuple(classes)
