"""The one pass of a fit over its data: keeping what its heads are given, and training them further on that."""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm  # type: ignore[import-untyped]

from glai_lightning.callbacks.head_watch import HeadWatch
from glai_lightning.checks import UserError
from glai_lightning.fitting.across_processes import processes_of
from glai_lightning.fitting.fit_record import OnePassRecord
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.kept_inputs import KeptInputs
from glai_lightning.fitting.kept_passes import KeptHead, TrainerInPass, train_pass
from glai_lightning.fitting.loaders import WithoutRepeats, single_loader
from glai_lightning.fitting.loss_reading import HeadBatch
from glai_lightning.fitting.messages import say
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.replaying import FixedCalls
from glai_lightning.fitting.solving import ReadBatch, Validation
from glai_lightning.fitting.step_reading import isolated_step
from glai_lightning.fitting.step_watch import StepWatches

Heads = Sequence[tuple[HeadWatch, HeadSlot]]

#: With "auto", what the modules before the heads must take at least, as a multiple of the heads' own multiply-adds. A
#: step of a head takes three times its forward pass: from here on half of an epoch and more is spent before it.
WORTH_ONE_PASS = 3.0


def check_alone(judges: Sequence[object]) -> None:
    """Refuse callbacks that would judge the freeze by validations after it.

    Raises:
        MisconfigurationException: if there are any.
    """
    if judges:
        raise UserMisconfigurationError(
            f"Expected no `{type(judges[0]).__name__}` beside `one_pass=True`, after which the fit ends."
        )


def one_pass_if_possible(
    trainer: Any, pl_module: Any, heads: Heads, read: ReadBatch, **options: Any
) -> "OnePass | None":
    """Return one pass that is given up where it cannot be made, see ``OnePass``; ``None`` if that shows at once."""
    epochs = trainer.max_epochs
    ends = (epochs is not None and epochs > 1) or trainer.max_steps > 0
    timed = any(hasattr(callback, "time_remaining") for callback in trainer.callbacks)
    if epochs == 1 or not ends or timed:
        return None
    try:
        one_pass = OnePass(trainer, pl_module, heads, read, automatic=True, **options)
    except UserMisconfigurationError:
        return None
    # Of a part of the data another part may be drawn in every epoch.
    return one_pass if trainer.num_training_batches >= len(trainer.train_dataloader) else None


class OnePass:
    """What heads are given and trained on in one epoch of a fit, and their training on it after that epoch.

    Every step of the epoch runs as always. What the modules before the heads return in the first is recorded, and then
    that step is read with this in their place. Where it shows that one plain loss call is the whole loss, the other
    steps are read as they run, otherwise as the first.

    Args:
        trainer: the Trainer of the fit.
        pl_module: its module.
        heads: its heads that are not solved yet.
        read: reads a batch.
        is_own: whether that reads the step of the module, and is not an override of the user.
        automatic: whether the epoch is kept only if that is worth it, and given up where it turns out impossible.
        tell: what says so.

    Raises:
        MisconfigurationException: if the data of the fit is not the same samples in every epoch.

    Attributes:
        calls: what the modules before the heads return.
        kept: what was kept, by the names of the heads.
        validation: the validation data, by the names of the heads, once it was read.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        heads: Heads,
        read: ReadBatch,
        *,
        is_own: bool,
        automatic: bool = False,
        tell: Callable[[str], None] = say,
    ) -> None:
        _check_data(trainer, pl_module)
        self.calls = FixedCalls(pl_module, [slot.module for _, slot in heads])
        self._heads = heads
        self._read = read
        # What is compiled would be compiled anew while it is watched.
        self._reads_live = is_own and not self.calls.compiled
        self.kept = {slot.name: KeptInputs(int(trainer.num_training_batches)) for _, slot in heads}
        self.validation: dict[str, Validation] = {}
        self._started: float | None = None
        self._is_whole = True
        self._reusing = ExitStack()
        self._problem: UserError | None = None
        self._automatic = automatic
        self._tell = tell
        self._announced = False

    @property
    def first_look(self) -> FixedCalls | None:
        """What modules return in the first step, for the look at it; ``None`` if it is to be seen beside the fit."""
        return None if self._automatic else self.calls

    def record_next_step(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> bool:
        """Record the next training step of the fit, and keep what it gives the heads.

        Args:
            trainer: the Trainer of the fit.
            pl_module: its module.
            batch: the batch, on the device of the module.
            batch_idx: its index.

        Returns:
            Whether the epoch is kept.
        """
        if self._automatic and not (self._is_worth_it(trainer) if self._started is None else self._may_go_on(trainer)):
            return False
        first = self._started is None
        if self._started is None:
            self._started = time.perf_counter()
            # A fit that resumes within an epoch has lost what was kept of its first batches.
            self._is_whole = batch_idx == 0
            if trainer.current_epoch > 0 and self._is_whole:
                say(f"The fit resumes without kept inputs: epoch {trainer.current_epoch} runs the backbone once more.")
        step, replaced = pl_module.training_step, pl_module.__dict__.get("training_step")
        readers = {slot.name: watch.solve.reader for watch, slot in self._heads}
        live = (
            self._reads_live
            and not first
            and all(reader is not None and reader.stops_at_loss for reader in readers.values())
        )

        @functools.wraps(step)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            del pl_module.__dict__["training_step"]
            if replaced is not None:
                pl_module.__dict__["training_step"] = replaced
            if live and self._is_whole:
                return self._keep_live(trainer, readers, partial(step, *args, **kwargs))
            with self.calls.recording():
                returned = step(*args, **kwargs)
                for watch, _ in self._heads:
                    watch.solve.after_step()
                with self._raising(trainer):
                    if first and self._automatic:
                        self._check_fixed()
                    if self._is_whole:
                        self._keep_replayed(pl_module, batch, batch_idx)
                    if first and self._automatic:
                        self._announce()
            return returned

        recorded.is_seen = True  # type: ignore[attr-defined]
        pl_module.__dict__["training_step"] = recorded
        return True

    def _is_worth_it(self, trainer: Any) -> bool:
        solves = [watch.solve for watch, _ in self._heads]
        least = min(solve.work_before_head if solve.pending else 0.0 for solve in solves)
        return bool(trainer.strategy.reduce_boolean_decision(least >= WORTH_ONE_PASS))

    def _check_fixed(self) -> None:
        if self.calls.random or not all(watch.solve.pending and watch.solve.inputs_fixed for watch, _ in self._heads):
            raise UserMisconfigurationError("The inputs of the head are not fixed.")

    def _announce(self) -> None:
        self._announced = True
        times = min(watch.solve.work_before_head for watch, _ in self._heads)
        self._tell(
            f"This fit reads the data once: what stands before the head takes {times:,.0f} times the multiply-adds of "
            "the head, and gives it the same inputs in every epoch. `one_pass=False` trains by epochs."
        )

    def _may_go_on(self, trainer: Any) -> bool:
        if self._problem is None or trainer.world_size > 1:
            return True
        self._give_up()
        return False

    def _give_up(self) -> None:
        self.kept = {}
        if self._announced:
            self._tell(f"This fit reads the data in every epoch after all: {self._problem}")

    def _keep_live(self, trainer: Any, readers: Mapping[str, Any], step: Callable[[], Any]) -> Any:
        """Read a step as it runs: nothing is run again where one plain loss call is the whole loss."""
        with StepWatches({name: reader.module for name, reader in readers.items()}) as seen:
            returned = step()
        with self._raising(trainer):
            self._keep({name: readers[name].read_watched(watch) for name, watch in seen.watches.items()})
        return returned

    def _keep_replayed(self, pl_module: Any, batch: Any, batch_idx: int) -> None:
        given = {}
        for watch, slot in self._heads:
            # None as long as no batch has called the head.
            if watch.solve.reader is not None:
                with self.calls.replaying(), isolated_step(pl_module):
                    given[slot.name] = self._read(batch, batch_idx, "training", watch.solve.reader)
        self._keep(given)

    def _keep(self, given: Mapping[str, HeadBatch | tuple[Tensor, ...] | None]) -> None:
        """Keep what the heads are given; once for all heads that have been given the same from the first batch on."""
        batches = {name: HeadBatch(*batch) for name, batch in given.items() if batch is not None}
        added: list[tuple[KeptInputs, KeptInputs, HeadBatch]] = []
        for name, batch in batches.items():
            kept = self.kept[name]
            for before, now, other in added:
                if (kept is before or kept.samples == before.samples == 0) and _same(batch, other):
                    self.kept[name] = now
                    break
            else:
                # Others that share it are given something else from here on.
                now = copy.deepcopy(kept) if any(kept is before for before, *_ in added) else kept
                self.kept[name] = now
                added.append((kept, now, batch))
        for name in self.kept.keys() - batches.keys():
            if any(self.kept[name] is before for before, *_ in added):
                self.kept[name] = copy.deepcopy(self.kept[name])
        for _, now, batch in added:
            now.add(batch)

    @contextmanager
    def _raising(self, trainer: Any) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if trainer.world_size == 1 and not self._automatic:
                raise
            # The other processes wait for the gradients of this step: all raise at the end of the epoch.
            self._problem = self._problem or error

    def complete(self, trainer: Any) -> bool:
        """End the epoch that is kept; all processes must call this together.

        Returns:
            Whether it was kept; what was not asked for is given up where there is an obstacle.
        """
        with processes_of(trainer).failing_together():
            try:
                self._complete(trainer)
            except UserError as error:
                if not self._automatic:
                    raise
                self._problem = error
        self._ended = time.perf_counter()
        if self._automatic and not trainer.strategy.reduce_boolean_decision(self._problem is None):
            self._give_up()
            return False
        return True

    def _complete(self, trainer: Any) -> None:
        if self._problem is not None:
            raise self._problem
        if not self._is_whole:
            say("The fit resumed within an epoch: its inputs are collected by a further pass over the data.")
            for watch, slot in self._heads:
                for batch in watch.solve.collect(trainer, self._read):
                    self.kept[slot.name].add(HeadBatch(*batch))
        else:
            for kept in {id(kept): kept for kept in self.kept.values()}.values():
                _leave_out_repeats(trainer, kept)
        counts = {name: kept.samples for name, kept in self.kept.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            expected = "every sample to be given to all heads" if any(counts.values()) else "samples in every process"
            raise UserMisconfigurationError(f"Expected {expected} with `one_pass=True`, but got {counts} samples.")

    def train(
        self,
        trainer: Any,
        after: Callable[[TrainerInPass, Tensor], None],
        between: Callable[[TrainerInPass, float | None], None],
    ) -> None:
        """Train the heads that are not frozen in passes over what was kept, as long as the fit may go on.

        Args:
            trainer: the Trainer of the fit.
            after: is called after each step, with the Trainer as it is in the pass and the loss; may freeze heads.
            between: is called before each pass, with the score of the heads on the validation data, if there is one.
        """
        view = TrainerInPass(trainer)
        self._passes = 0
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with tqdm(desc="Passes over kept inputs", unit="batch", leave=False, disable=not shown) as bar:
            while view.passes_left > 0 and view.steps_left and (heads := self._left()):
                between(view, self._score(trainer, heads))
                self._passes += 1
                view.current_epoch += 1
                for batch_idx, step in train_pass(view, heads):
                    for watch, slot in self._heads:
                        watch.before_batch(view, slot, batch_idx)
                    after(view, step.run())
                    bar.update()
                    if not view.steps_left:
                        break

    def _left(self) -> list[KeptHead]:
        return [KeptHead(slot, watch.solve, self.kept[slot.name]) for watch, slot in self._heads if not watch.frozen]

    def _score(self, trainer: Any, heads: list[KeptHead]) -> float | None:
        """Return the mean score of heads on the validation data; ``None`` where it is not held in memory."""
        scores = []
        for head in heads:
            held = head.solve.validation(trainer, self._read, self)
            if not isinstance(held, tuple):
                return None
            with trainer.precision_plugin.val_step_context():
                score = head.score(*held)
            total, count = processes_of(trainer).sum_numbers(*score)
            scores.append(total / count)
        return sum(scores) / len(scores)

    def finish(self) -> OnePassRecord:
        """Let the kept inputs go, and return what it took."""
        assert self._started is not None
        samples = next(iter(self.kept.values())).samples
        record = OnePassRecord(
            samples=samples * (1 if self._is_whole else 2),
            passes=self._passes,
            backbone_seconds=self._ended - self._started,
            head_seconds=time.perf_counter() - self._ended,
        )
        self.kept, self.validation = {}, {}
        return record

    def before_validation(self) -> None:
        """Let the next validation use what the modules before the heads returned for the solve."""
        self._reusing.enter_context(self.calls.reusing())

    def after_validation(self) -> None:
        """End what ``before_validation`` began."""
        self._reusing.close()


def _same(one: HeadBatch, other: HeadBatch) -> bool:
    return all(
        x is y or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(one, other, strict=True)
    )


def _check_data(trainer: Any, pl_module: Any) -> None:
    loader = single_loader(trainer.train_dataloader, "training")
    sampler = _sampler_of(loader)
    problem = None
    if isinstance(getattr(loader, "dataset", None), IterableDataset) or trainer.num_training_batches == float("inf"):
        problem = "an iterable, which may yield other samples every time"
    elif getattr(sampler, "replacement", False):
        problem = f"samples that `{type(sampler).__name__}` draws with replacement"
    if problem is not None:
        raise UserMisconfigurationError(
            f"Expected a training data loader with the same samples in every epoch with `one_pass=True`, but got "
            f"{problem}."
        )
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise UserMisconfigurationError(
            "Expected a module that is not compiled as a whole with `one_pass=True`, but got one. Compile its backbone."
        )


def _leave_out_repeats(trainer: Any, kept: KeptInputs) -> None:
    """Leave out what a sampler repeated so that all processes have as many samples.

    Where a step gives a head other than one row for each sample, it cannot be told which rows those are.
    """
    loader = single_loader(trainer.train_dataloader, "training")
    sampler = _sampler_of(loader)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler):
        return
    rows = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    seen = min(len(sampler), int(trainer.num_training_batches) * rows)
    if kept.samples == seen:
        kept.leave_out_last(max(0, seen - len(WithoutRepeats(sampler))))


def _sampler_of(loader: Any) -> Any:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)
