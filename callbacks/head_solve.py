"""The solve of one head in a fit: from the look at its loss on the first batch to the solved path weights."""

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from glai_lightning.fitting.across_processes import processes_of
from glai_lightning.fitting.collection import Stage, watch_next_step, without_a_trace
from glai_lightning.fitting.loss_watching import LossCall
from glai_lightning.fitting.solving import (
    Solver,
    check_loss,
    follow_loss,
    has_validation,
    read_step,
    solve_in_fit,
    validates_by_loss,
    warn_of_moving_inputs,
)
from glai_lightning.heads.optimizers import forget_state
from glai_lightning.solvers import SolveReport

if TYPE_CHECKING:
    from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback


class HeadSolve:
    """Solves for the path weights of one head of a fit, once it is frozen.

    Args:
        head_name: qualified name of the head.
        callback: whose ``solver`` it is, and who says what the head is solved for.

    Attributes:
        solved: whether the head is solved.
        report: what the solve did, or ``None``.
    """

    def __init__(self, head_name: str, callback: "StructureFreezeCallback") -> None:
        self.head_name = head_name
        self.callback = callback
        self.solved = False
        self.report: SolveReport | None = None
        self._solver: Solver | None = None

    @property
    def pending(self) -> bool:
        """Whether there is a solve to come."""
        return self.callback.solver is not None and not self.solved

    def start(self) -> None:
        """Begin a fit: its loss has not been seen yet."""
        self._solver = None

    def start_over(self) -> None:
        """Forget the solve that was, as its head is an MLP again."""
        self.solved = False
        self.report = None

    def before_batch(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """See, on the first batch of a fit, that the loss can be solved."""
        if not self.pending or self._solver is not None:
            return
        self._solver = self.callback.solver
        head = pl_module.get_submodule(self.head_name)
        if self.callback.says_inputs_and_targets:
            with without_a_trace(pl_module):
                self.callback.inputs_and_targets(trainer, pl_module, batch, batch_idx, "training")
        else:
            watch_next_step(pl_module, head, partial(self._follow_loss, trainer))
        others = [pl_module.get_submodule(name) for name in self.callback.heads if name != self.head_name]
        warn_of_moving_inputs(pl_module, head, trainer.train_dataloader, others)

    def _follow_loss(self, trainer: Any, calls: list[LossCall]) -> None:
        assert self.callback.solver is not None
        with processes_of(trainer).failing_together():
            self._solver = follow_loss(self.callback.solver, check_loss(calls, self.callback.solver))

    def run(self, trainer: Any, pl_module: Any) -> None:
        """Solve for the path weights over the training data of the fit, and set them."""
        assert self._solver is not None
        head = pl_module.get_submodule(self.head_name)

        def read(stage: Stage) -> Any:
            return lambda batch, batch_idx: self._inputs_and_targets(trainer, pl_module, batch, batch_idx, stage)

        with processes_of(trainer).failing_together():
            validates = has_validation(trainer)
            if not self.callback.says_inputs_and_targets:
                validates = validates and validates_by_loss(trainer, pl_module, head)
        validates = trainer.strategy.reduce_boolean_decision(validates)
        report = solve_in_fit(trainer, head, self._solver, read, validate=validates)
        # What the optimizer remembers is about weights that are far away by now.
        forget_state(trainer.optimizers[0], (p for p in head.parameters() if p.requires_grad))
        self.solved = True
        self.report = report
        self._tell(report)

    def _inputs_and_targets(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, stage: Stage
    ) -> tuple[Tensor, Tensor]:
        if self.callback.says_inputs_and_targets:
            return self.callback.inputs_and_targets(trainer, pl_module, batch, batch_idx, stage)
        return read_step(trainer, pl_module, pl_module.get_submodule(self.head_name), batch, batch_idx, stage)

    def _tell(self, report: SolveReport) -> None:
        self.callback.say(
            f"Solved for the path weights of {self.head_name!r} in {report.passes} passes and {report.seconds:.2f} s "
            f"({report.reason}): loss {report.start_loss:.4g} before, {report.loss:.4g} now"
            + ("." if report.score is None else f"; validation score {report.start_score:.4f}, {report.score:.4f}.")
        )
        if report.best_step == 0 and report.steps > 0:
            rank_zero_warn(
                f"The solve of {self.head_name!r} found no path weights that are better than those it started from, "
                "and leaves these as they were. More passes or another `l2` may."
            )
