"""What a head is given and trained on over a whole data loader of a fit: held in memory once, or read in every pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from glai_lightning.fitting.loaders import iterate_copy, on_device
from glai_lightning.fitting.loss_reading import HeadBatch
from glai_lightning.fitting.step_reading import Stage, isolated_step

#: Bytes of head inputs kept in memory for a solve. Beyond it every pass of the solve reads the loader anew.
INPUTS_IN_MEMORY = 2**30


class HeadPass:
    """What a head is given and trained on, over the batches of a loader, to be read any number of times.

    Args:
        trainer: the Trainer in whose fit this happens.
        loader: where the batches come from; its position in the fit is left alone.
        num_batches: most batches to read.
        stage: whose batches they are.
        read: reads a batch, from itself and its index.

    Attributes:
        samples: how many were read the last time.
        weighted: whether their weights differed in a batch that was read.
    """

    def __init__(
        self,
        trainer: Any,
        loader: Any,
        num_batches: float,
        stage: Stage,
        read: Callable[[Any, int], HeadBatch | None],
    ) -> None:
        self._trainer = trainer
        self._loader = loader
        self._num_batches = num_batches
        self._stage = stage
        self._read = read
        self.samples = 0
        self.weighted = False

    def _batches(self) -> Iterator[HeadBatch]:
        self.samples = 0
        with _in_stage(self._trainer, self._stage), isolated_step(self._trainer.lightning_module):
            for batch_idx, batch in enumerate(iterate_copy(self._loader)):
                if batch_idx >= self._num_batches:
                    return
                read = self._read(on_device(self._trainer, batch), batch_idx)
                if read is not None:
                    self.samples += len(read.inputs)
                    self.weighted |= read.weights is not None
                    yield read

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for inputs, targets, weights in self._batches():
            yield (inputs, targets) if weights is None else (inputs, targets, weights)

    def held(self) -> HeadBatch | None:
        """Read all batches into memory; ``None`` if there are none, or they take too much of it."""
        rows: GrowingRows | None = None
        targets: list[Tensor] = []
        weights: list[Tensor | None] = []
        for batch in self._batches():
            if rows is None:
                most = INPUTS_IN_MEMORY // max(1, batch.inputs[:1].nbytes)
                rows = GrowingRows(min(len(batch.inputs) * self._num_batches, most))
            rows.add(batch.inputs)
            targets.append(batch.targets)
            weights.append(batch.weights)
            if rows.nbytes > INPUTS_IN_MEMORY:
                return None
        if rows is None:
            return None
        return HeadBatch(rows.together(), joined_targets(targets), joined_weights(weights, targets))


@contextmanager
def _in_stage(trainer: Any, stage: Stage) -> Iterator[None]:
    """Context in which a Trainer says that it is in a stage, by which hooks of batches may go."""
    before = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING if stage == "validation" else RunningStage.TRAINING
    try:
        yield
    finally:
        trainer.state.stage = before


def _in_memory(like: Tensor, rows: int) -> Tensor:
    return like.new_empty((rows, *like.shape[1:]))


class GrowingRows:
    """Rows of tensors put together in a place that is reserved once, so that none of it is held twice.

    Args:
        expected: how many rows there will be.
        reserve: reserves room for so many rows like those of a tensor.
    """

    def __init__(self, expected: float, reserve: Callable[[Tensor, int], Tensor] = _in_memory) -> None:
        self._expected = int(expected)
        self._reserve = reserve
        self._held: Tensor | None = None
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.together().nbytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the place that is reserved."""
        return 0 if self._held is None else self._held.nbytes

    def add(self, rows: Tensor) -> None:
        """Put rows after those that are there."""
        count = self._count + len(rows)
        if self._held is None or count > len(self._held):
            grown = self._reserve(rows, max(count + count // 4, self._expected))
            if self._held is not None:
                grown[: self._count] = self.together()
            self._held = grown
        self._held[self._count : count] = rows
        self._count = count

    def together(self) -> Tensor:
        """Return the rows, not copied."""
        assert self._held is not None
        return self._held[: self._count]


def joined_targets(targets: list[Tensor]) -> Tensor:
    """Put targets together; where some are labels and some are probabilities, all as probabilities."""
    wide = next((part for part in targets if part.ndim == 2), None)
    if wide is not None:
        classes = wide.shape[1]
        targets = [part if part.ndim == 2 else _as_probabilities(part, classes).to(wide.dtype) for part in targets]
    return torch.cat(targets)


def _as_probabilities(labels: Tensor, classes: int) -> Tensor:
    return labels.unsqueeze(1) if classes == 1 else F.one_hot(labels, classes)


def joined_weights(weights: list[Tensor | None], targets: list[Tensor]) -> Tensor | None:
    """Put weights together, 1 for each sample of a batch without; ``None`` if no batch has any."""
    given = next((part for part in weights if part is not None), None)
    if given is None:
        return None
    pairs = zip(weights, targets, strict=True)
    return torch.cat([given.new_ones(len(part)) if own is None else own for own, part in pairs])
