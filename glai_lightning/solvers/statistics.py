"""Statistics of features and targets that add up: over portions, sites and classes, and back without some samples."""

import copy
import os
import time
from collections.abc import Mapping, Sequence
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice
from glai_lightning.solvers.class_models import class_weights_of, discriminant, prototypes, weighted
from glai_lightning.solvers.feature_map import FeatureMap
from glai_lightning.solvers.forgetting import without
from glai_lightning.solvers.moments import Covariances, Moments, check_summable
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, check_strengths
from glai_lightning.solvers.ridge_path import RidgePath
from glai_lightning.solvers.statistics_file import FORMAT, VERSION, check_state, read_statistics
from glai_lightning.solvers.statistics_kind import Kind, Label, check_classes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Which linear model is made of statistics.
LinearHead = Literal["ridge", "lda", "prototypes"]
#: Rows whose features are held at once.
_ROWS = 4096


class PathStatistics:
    """Sums over samples that a linear model on fixed features is solved from, and that add up.

    Kept are the Gram matrix of the features, their products with the targets, and counts, sums and squares of the
    targets, in float64: what was added in portions, by several parties or in several processes has the solution of all
    samples together, and what is forgotten leaves no trace. The sums over float64 features have about 73 significant
    bits, see ``docs/statistics.md`` for what is exact.

    Integer targets are class labels. Without ``classes`` they are the labels themselves, and labels that are new are
    appended; with names they count the names. Lists of strings are labels too. Floating targets are numbers to regress
    on.

    Sums depend on the feature map. Its fingerprint, a hash of its modules, weights, running statistics and dtypes,
    travels along, and sums over other features are refused. What comes before the features, such as the
    standardisation of inputs, is to be part of the feature map.

    Args:
        feature_map: a ``GLAIHead`` with output or independent paths, or any module that returns features (n, F); it
            must not change. A head of which nothing but the last Linear requires gradients, such as
            ``random_feature_head`` makes, is frozen in place. ``None`` for statistics that are only loaded, merged and
            solved.
        classes: labels of the classes, all of them integers or all strings; ``None`` to take them from the targets. A
            ``GLAIHead`` has the classes 0 to C - 1.

    Raises:
        TypeError: if ``feature_map`` is not a module, or ``classes`` are of mixed types.
        ValueError: if the head is not linear in its path weights, or a class is named twice.

    Example:
        >>> features, labels = torch.randn(60, 4, dtype=torch.float64), torch.arange(60) % 3
        >>> first, second = PathStatistics(nn.Identity()), PathStatistics(nn.Identity())
        >>> first.update(features[:40], labels[:40]).samples
        40
        >>> merged = first + second.update(features[40:], labels[40:])
        >>> whole = PathStatistics(nn.Identity()).update(features, labels)
        >>> torch.allclose(merged.solve(l2=0.1).weight, whole.solve(l2=0.1).weight, rtol=1e-10)
        True
    """

    def __init__(self, feature_map: nn.Module | None, classes: Sequence[Label] | None = None) -> None:
        self._map = None if feature_map is None else FeatureMap(feature_map)
        self._kind = Kind() if classes is None else Kind(targets="labels", classes=check_classes(classes))
        self._moments: Moments | None = None

    @property
    def classes(self) -> list[Label] | None:
        """Labels of the classes, in the order of the outputs; ``None`` of a regression, or before there are any."""
        return None if self._kind.classes is None else list(self._kind.classes)

    @property
    def samples(self) -> int:
        """How many samples the sums are over."""
        return 0 if self._moments is None else self._moments.samples

    @property
    def counts(self) -> dict[Label, int]:
        """How many samples there are of each class."""
        classes = self._kind.classes or ()
        counts = [0.0] * len(classes) if self._moments is None else self._moments.targets_sum.tolist()
        return {label: round(count) for label, count in zip(classes, counts, strict=False)}

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        parts = () if self._moments is None else (self._moments.high, self._moments.low, self._moments.squares)
        return sum(part.nbytes for part in parts)

    def update(self, inputs: Any, targets: Any = None) -> Self:
        """Add samples.

        Args:
            inputs: a batch of inputs of the feature map, with as many targets; or an iterable of batches
                (inputs, targets), which is read once.
            targets: integer labels (n,), a list of n labels, or numbers (n,) or (n, C); ``None`` with batches.

        Returns:
            The statistics themselves.

        Raises:
            TypeError: if targets are not what they were before.
            ValueError: if there are no samples, shapes or dtypes disagree, a number is not finite, or the feature map
                has changed. Nothing is added then.
        """
        listed = isinstance(inputs, Tensor) and isinstance(targets, Tensor | list | tuple)
        rows = torch.split(inputs, _ROWS) if listed else ()
        if targets is not None and (len(rows) < 2 or len(inputs) != len(targets)):
            self._add(inputs, targets)
            return self
        fresh = self._empty()
        if targets is not None:
            for number, part in enumerate(rows):
                fresh._add(part, targets[number * _ROWS : (number + 1) * _ROWS], first_row=number * _ROWS)
        else:
            held: list[tuple[Tensor, Tensor]] = []
            for batch in inputs:
                if not isinstance(batch, tuple | list) or len(batch) != 2:
                    raise UserTypeError(
                        f"Expected every batch to be a pair (inputs, targets), but got `{type(batch).__name__}`."
                    )
                held.append(fresh._read(*batch))
                # Sums over few rows at a time cost more than the products.
                if sum(len(features) for features, _ in held) >= _ROWS:
                    fresh._sum(held)
                    held = []
            fresh._sum(held)
        if fresh._moments is None:
            raise UserValueError("Expected at least one sample, but got none.")
        together = self + fresh
        self._kind, self._moments = together._kind, together._moments
        return self

    def _add(self, inputs: Any, targets: Any, *, first_row: int = 0) -> None:
        self._sum([self._read(inputs, targets, first_row)])

    def _read(self, inputs: Any, targets: Any, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """Return features (n, F) and encoded targets (n, C) that can be summed, and take over their kind."""
        if self._map is None:
            raise UserValueError("Expected a feature map to make features of inputs, but got None.")
        features = self._map(inputs)
        if len(features) == 0:
            raise UserValueError("Expected at least one sample, but got none.")
        kind = self._kind
        if kind == Kind() and self._map.num_outputs is not None and not _are_numbers(targets):
            kind = Kind(targets="labels", classes=tuple(range(max(2, self._map.num_outputs))))
        of_targets, read = kind.read(targets, len(features))
        of_features = Kind(self._map.fingerprint(), str(features.dtype).removeprefix("torch."), features.shape[1])
        joined = kind.joined(of_features).joined(of_targets)
        encoded = joined.encode(read, of_targets).to(features.device)
        check_summable("features", features, first_row)
        check_summable("targets", encoded, first_row)
        self._kind = joined
        return features, encoded

    def _sum(self, read: list[tuple[Tensor, Tensor]]) -> None:
        """Add up what was read; classes that came later are new columns."""
        if not read:
            return
        features, count = torch.cat([part for part, _ in read]), self._kind.num_targets
        targets = torch.cat([F.pad(part, (0, count - part.shape[1])) for _, part in read])
        moments = Moments(features.shape[1], 0, features.device) if self._moments is None else self._moments
        if moments.num_targets != count:
            moments = moments.with_targets(count, list(range(moments.num_targets)))
        moments.add(features, targets)
        self._moments = moments

    def _empty(self) -> "PathStatistics":
        """Return statistics of the same feature map, targets and classes, of no samples."""
        empty = PathStatistics(None)
        empty._map, empty._kind = self._map, self._kind
        return empty

    def _aligned(self, kind: Kind) -> Moments:
        """Return the sums with the targets of a kind that includes the own one; the own sums where it is no other."""
        assert self._moments is not None
        if kind.num_targets == self._moments.num_targets and kind.classes == self._kind.classes:
            return self._moments
        return self._moments.with_targets(kind.num_targets, self._kind.places_in(kind))

    def forget(self, inputs: Any, targets: Any = None) -> Self:
        """Take samples away that were added before, as if they had never been.

        Samples that were never added cannot always be told. What can be told is a class with fewer samples, and sums
        that no samples have: their covariance within classes is not positive semidefinite.

        Args:
            inputs: as for ``update``.
            targets: as for ``update``.

        Returns:
            The statistics themselves; classes without samples keep their places.

        Raises:
            TypeError: as ``update``.
            ValueError: as ``update``, and for more samples than were added, or others. Nothing changes then.
        """
        given = self._empty().update(inputs, targets)
        new = [label for label, count in given.counts.items() if count and not self.counts.get(label)]
        if self._moments is None or new:
            what = f"samples of class {new[0]!r}" if new else "samples"
            raise UserValueError(f"Expected to forget samples that were added, but there are no {what}.")
        assert given._moments is not None
        self._moments = without(self._moments, given._moments, self._kind.classes)
        return self

    def __add__(self, other: "PathStatistics") -> "PathStatistics":
        """Return the statistics of the samples of both; classes are matched by their labels, and new ones appended.

        Raises:
            TypeError: if labels are of other types, or some targets are labels and others numbers.
            ValueError: if the features are not the same.
        """
        if not isinstance(other, PathStatistics):
            return NotImplemented
        merged = self._empty()
        merged._map = self._map or other._map
        merged._kind = self._kind.joined(other._kind)
        parts = [one._aligned(merged._kind) for one in (self, other) if one._moments is not None]
        if parts:
            empty = Moments(parts[0].num_features, parts[0].num_targets, parts[0].high.device)
            merged._moments = reduce(Moments.plus, parts if len(parts) > 1 else [*parts, empty])
        return merged

    def __radd__(self, other: object) -> "PathStatistics":
        """Let ``sum`` start from 0."""
        return self + self._empty() if other == 0 else NotImplemented

    def all_reduce(self, group: "ProcessGroup | None") -> Self:
        """Add up what the processes of a group hold, in one reduction, so that all hold the statistics of everything.

        Args:
            group: of ``torch.distributed``; ``None`` leaves everything as it is.

        Returns:
            The statistics themselves. Called twice, it counts all samples twice.

        Raises:
            TypeError: as ``a + b``, in all processes alike.
            ValueError: likewise. All are then as they were.
        """
        if group is None:
            return self
        processes, own = Processes(group), self._moments
        scales = None if own is None else own.scales().tolist()
        said = processes.all_objects((self._kind, scales, own is not None and own.low.ndim > 0))
        kind = reduce(Kind.joined, (kind for kind, _, _ in said))
        if kind.num_features is None:
            return self
        if own is None:
            moments = Moments(kind.num_features, kind.num_targets, _device_of(group))
        else:
            moments = copy.copy(self._aligned(kind))
        largest = torch.zeros(kind.num_features + 1 + kind.num_targets, dtype=torch.float64)
        for other, theirs, _ in said:
            if theirs is not None:
                places = [*range(kind.num_features + 1), *(kind.num_features + 1 + p for p in other.places_in(kind))]
                largest[places] = torch.maximum(largest[places], torch.tensor(theirs, dtype=torch.float64))
        moments.sum_over(processes, largest.to(moments.high.device), in_parts=any(parts for _, _, parts in said))
        self._kind, self._moments = kind, moments
        return self

    def covariances(self, *, centred: bool = True) -> Covariances:
        """Return means and covariances of features and targets, or second moments around zero, in float64.

        Raises:
            ValueError: if there are no samples.
        """
        if self._moments is None or not self._moments.samples:
            raise UserValueError("Expected at least one sample, but got none.")
        return self._moments.covariances(centred=centred)

    def solve(
        self,
        l2: float | list[float] | None = None,
        validation: Any = None,
        head: LinearHead = "ridge",
        class_weights: Literal["balanced"] | Sequence[float] | Mapping[Label, float] | None = None,
    ) -> LinearSolution:
        """Return the linear model on the features that the samples ask for.

        Args:
            l2: strength of the penalty, or several to choose from; ``None`` for 17 strengths relative to the mean
                variance of the features. All are solved from one eigendecomposition.
            validation: statistics of other samples, or (inputs, targets), or batches of them; the strength with the
                smallest squared error on them is taken. ``None`` chooses by generalised cross-validation, which needs
                no other samples. ``RidgeSolver`` keeps rows, and chooses by leaving each one out.
            head: ``"ridge"``; ``"lda"``, linear discriminant analysis, with ``l2`` added to the variances within
                classes; or ``"prototypes"``, the nearest mean of a class. The last two are for class labels.
            class_weights: how much the samples of each class count: one number a class, numbers by label, or
                ``"balanced"`` for all classes alike. For this every class is given the mean covariance of all classes,
                because only their sum is known; for ``"lda"``, which assumes just that, it changes the priors.

        Returns:
            ``weight`` (C, F) and ``bias`` (C,), float64 (``None`` for a head without), and the report. Outputs are in
            the order of ``classes``; ``set_last_layer`` puts them into a head.

        Raises:
            TypeError: if ``l2`` is not a number, or ``validation`` has other targets.
            ValueError: if there are no samples, an argument is not one of those above, or ``validation`` is of other
                features or has a class that these statistics lack.
        """
        began = time.perf_counter()
        expect_choice("head", head, get_args(LinearHead))
        strengths = check_strengths(l2)
        has_bias = self._map is None or self._map.has_bias
        if (head != "ridge" or class_weights is not None) and (self._kind.targets != "labels" or not has_bias):
            raise UserValueError("Expected class labels, and a head with a bias, to weigh classes or to compare means.")
        covariances = self.covariances(centred=has_bias)
        others = None if validation is None else self._validation(validation).covariances(centred=has_bias)
        if class_weights is not None:
            weights = class_weights_of(class_weights, self._kind.classes or (), covariances)
            covariances = weighted(covariances, weights)
            others = None if others is None else weighted(others, weights)
        path = RidgePath(covariances, has_bias=has_bias, strengths=strengths)
        per_output = self._kind.targets == "numbers"
        if others is not None:
            scores = -path.errors_on(others, per_output=per_output)
        else:
            scores = -path.cross_validated(per_output=per_output)
        outputs = len(covariances.targets_mean)
        # Of equal scores the first, for the strongest penalty.
        chosen = path.l2[scores.argmax(0)].expand(outputs)
        start = path.rotated.new_zeros(outputs, path.rotated.shape[0]), chosen.new_zeros(outputs)
        found: tuple[Tensor, Tensor | None] = start
        if head == "ridge":
            weight = path.weight(chosen)
            found = weight, path.bias(weight) if has_bias else None
        elif head == "lda":
            found = discriminant(covariances, float(chosen[0]))
        else:
            found = prototypes(covariances)
        return path.solution(
            found,
            start if has_bias else (start[0], None),
            chosen,
            scores=scores if per_output else scores / outputs,
            passes=0,
            began=began,
        )

    def _validation(self, given: Any) -> "PathStatistics":
        if not isinstance(given, PathStatistics):
            given = self._empty().update(*given if isinstance(given, tuple) else (given,))
        kind = self._kind.joined(given._kind)
        if kind.classes != self._kind.classes:
            new = next(label for label in kind.classes or () if label not in (self._kind.classes or ()))
            raise UserValueError(f"Expected validation with classes that there are samples of, but got {new!r}.")
        aligned = self._empty()
        aligned._moments = None if given._moments is None else given._aligned(kind)
        return aligned

    def state_dict(self) -> dict[str, Any]:
        """Return all that is known, in tensors and primitives, which ``weights_only=True`` reads.

        Raises:
            ValueError: if nothing was added yet.
        """
        if self._moments is None:
            raise UserValueError("Expected samples to have been added before statistics are kept, but got none.")
        parts = {name: getattr(self._moments, name).detach().cpu().clone() for name in ("high", "low", "squares")}
        kind = self._kind
        classes = None if kind.classes is None else list(kind.classes)
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": kind.fingerprint,
            "feature_dtype": kind.dtype,
            "targets": kind.targets,
            "classes": classes,
            **parts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over what ``state_dict`` returned, in place of what there was.

        Raises:
            TypeError: if it is not a mapping.
            ValueError: if it is not what ``state_dict`` returns, or of another feature map. Nothing changes then.
        """
        return self._load(check_state(state, "the state"))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the statistics to a file of tensors and primitives, whole or not at all.

        Raises:
            ValueError: if nothing was added yet.
        """
        part = Path(f"{os.fspath(path)}.part")
        torch.save(self.state_dict(), part)
        part.replace(path)

    def load(self, path: str | PathLike[str]) -> Self:
        """Read the statistics from a file, in place of what there was; nothing in it is executed.

        Returns:
            The statistics themselves.

        Raises:
            ValueError: if there is no such file, it is cut short or of another version, or its sums are over other
                features. Nothing changes then.
        """
        return self._load(read_statistics(path))

    def _load(self, state: Mapping[str, Any]) -> Self:
        num_features, num_targets = state["high"].shape[0] - 1, state["squares"].shape[1]
        labels = state["targets"] == "labels"
        kind = Kind(
            fingerprint=state["fingerprint"],
            dtype=state["feature_dtype"],
            num_features=num_features,
            targets=state["targets"],
            num_numbers=None if labels else num_targets,
            classes=check_classes(state["classes"]) if labels else None,
        )
        if self._map is not None:
            kind = Kind(fingerprint=self._map.fingerprint()).joined(kind)
        moments = Moments(num_features, 0)
        moments.high, moments.low, moments.squares = (state[name].clone() for name in ("high", "low", "squares"))
        self._kind, self._moments = kind, moments
        return self


def _are_numbers(targets: object) -> bool:
    first = targets[0] if isinstance(targets, list | tuple) and targets else targets
    return first.is_floating_point() if isinstance(first, Tensor) else isinstance(first, float | str | list | tuple)


def _device_of(group: "ProcessGroup") -> torch.device:
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
