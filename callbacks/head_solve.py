"""The solve of one head in a fit: from the look at its loss on the first batch to the solved path weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from glai_lightning.fitting.across_processes import processes_of
from glai_lightning.fitting.collection import Stage, watch_next_step, without_a_trace
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.loss_watching import LossCall
from glai_lightning.fitting.solving import (
    Solver,
    check_loss,
    follow_loss,
    has_validation,
    solve_in_fit,
    validates_by_loss,
    warn_of_moving_inputs,
)
from glai_lightning.heads.optimizers import forget_state
from glai_lightning.solvers import SolveReport

#: Returns head inputs and targets of a batch, from (batch, batch_idx, stage, slot).
ReadHead = Callable[[Any, int, Stage, HeadSlot], tuple[Tensor, Tensor]]


class HeadSolve:
    """Solves for the path weights of one head of a fit, once it is frozen.

    Args:
        solver: what to solve with, if there is a solve.

    Attributes:
        solved: whether the head is solved.
        report: what the solve did, or ``None``.
    """

    def __init__(self, solver: Solver | None) -> None:
        self.solver = solver
        self.solved = False
        self.report: SolveReport | None = None
        self._solver: Solver | None = None
        self._reads_loss = True

    @property
    def pending(self) -> bool:
        """Whether there is a solve to come."""
        return self.solver is not None and not self.solved

    def start(self) -> None:
        """Begin a fit: its loss has not been seen yet."""
        self._solver = None

    def start_over(self) -> None:
        """Forget the solve that was, as its head is an MLP again."""
        self.solved = False
        self.report = None

    def before_batch(
        self,
        trainer: Any,
        slot: HeadSlot,
        batch: Any,
        batch_idx: int,
        read: ReadHead,
        *,
        reads_loss: bool,
        others: Sequence[nn.Module],
    ) -> None:
        """See, on the first batch of a fit, that the loss can be solved.

        Args:
            trainer: the Trainer of the fit.
            slot: the place of the head.
            batch: the batch.
            batch_idx: its index.
            read: what says head inputs and targets of a batch.
            reads_loss: whether ``read`` reads them off the loss call of the step.
            others: other heads with a loss of their own.
        """
        if not self.pending or self._solver is not None:
            return
        self._solver = self.solver
        self._reads_loss = reads_loss
        if reads_loss:
            watch_next_step(slot.pl_module, slot.module, partial(self._follow_loss, trainer))
        else:
            with without_a_trace(slot.pl_module):
                read(batch, batch_idx, "training", slot)
        warn_of_moving_inputs(slot.pl_module, slot.module, trainer.train_dataloader, others)

    def _follow_loss(self, trainer: Any, calls: list[LossCall]) -> None:
        assert self.solver is not None
        with processes_of(trainer).failing_together():
            self._solver = follow_loss(self.solver, check_loss(calls, self.solver))

    def run(self, trainer: Any, slot: HeadSlot, read: ReadHead) -> SolveReport:
        """Solve for the path weights over the training data of the fit, set them, and return what was done."""
        assert self._solver is not None
        head: Any = slot.module

        def read_in(stage: Stage) -> Any:
            return lambda batch, batch_idx: read(batch, batch_idx, stage, slot)

        with processes_of(trainer).failing_together():
            validates = has_validation(trainer)
            if self._reads_loss:
                validates = validates and validates_by_loss(trainer, slot.pl_module, head)
        validates = trainer.strategy.reduce_boolean_decision(validates)
        report = solve_in_fit(trainer, head, self._solver, read_in, validate=validates)
        # What the optimizer remembers is about weights that are far away by now.
        forget_state(trainer.optimizers[0], (p for p in head.parameters() if p.requires_grad))
        self.solved = True
        self.report = report
        if report.best_step == 0 and report.steps > 0:
            rank_zero_warn(
                f"The solve of {slot.name!r} found no path weights that are better than those it started from, "
                "and leaves these as they were. More passes or another `center` or `l2` may."
            )
        return report
