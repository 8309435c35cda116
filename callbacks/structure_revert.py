"""The callback that takes back a freeze that validates worse."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from glai_lightning.callbacks.callback_state import check_state
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.checks import UserTypeError, expect_choice, expect_integer, expect_number
from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError, as_misconfiguration
from glai_lightning.heads.optimizers import copy_state


@dataclass
class _Trial:
    """A freeze that was not proven yet, and what it takes to take it back.

    Args:
        step: optimizer steps at the freeze.
        reference: score of the last validation before the freeze; ``None`` if there was none.
        weights: state dict of the MLP at the freeze.
        optimizer_state: what the optimizer remembered of its parameters, by their names.
        scores: scores of the validations since, all of them worse.
        lost: whether the freeze is to be taken back.
    """

    step: int
    reference: float | None
    weights: dict[str, Tensor]
    optimizer_state: dict[str, dict[str, Any]]
    scores: list[float] = field(default_factory=list)
    lost: bool = False


@dataclass
class _Record:
    """What is known of one head: how often it went back, its last score, how long it has to wait, its trial."""

    reverts: int = 0
    score: float | None = None
    validations_to_wait: int = 0
    trial: _Trial | None = None


@dataclass(frozen=True)
class Reverted:
    """A head went back to the MLP that it was at its freeze.

    Args:
        head: its name.
        step: optimizer steps by then.
        epoch: the epoch.
        verdict: how the freeze did, in words.
        validations_to_wait: validations before it may freeze again.
    """

    head: str
    step: int
    epoch: int
    verdict: str
    validations_to_wait: int

    def __str__(self) -> str:
        return (
            f"Took the head at {self.head!r} back to the MLP of the freeze at step {self.step}, epoch {self.epoch}: "
            f"{self.verdict}. It may freeze again after {self.validations_to_wait} validations."
        )


class StructureRevert(Callback):
    """Compares validations of a frozen head with the last before its freeze; cannot see what the MLP would score now.

    It stands beside a ``StructureFreezeCallback``, at any place in the list of callbacks, and judges the freezes of all
    of its heads. The MLP and its optimizer state are kept until a validation of the frozen head is no worse, by more
    than ``tolerance``, than the last one before the step of the freeze (and before the solve). If ``patience``
    validations in a row are worse, the head goes back to that MLP, with that optimizer state, at the end of the last of
    these validations or, where gradients are being accumulated, after the next optimizer step. Structural training then
    goes on, and layers outside the head stay as they are. A checkpoint that is saved after that validation holds the
    MLP, under the score of the frozen head. A head that the MLP would have overtaken by training on is not taken back.

    NaN is worse than any score. Without a validation before the freeze there is no baseline, so the head is reverted.
    After a revert a head must settle anew, whatever ``freeze_at_epoch`` says, and may freeze again after ``patience``
    validations, twice as many after the second time, and so on. ``stop_after_solve`` waits for the verdict.

    It logs ``structure/reverts``, how often the head went back.

    Args:
        monitor: metric of the validation by which a freeze is judged.
        mode: whether the largest ('max') or the smallest ('min') value of ``monitor`` is best.
        tolerance: how much worse than before the freeze, in units of ``monitor``, still counts as good.
        patience: number of validations in a row after which a head that was worse in all of them goes back.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of a fit, if the Trainer has no
            ``StructureFreezeCallback``, or no validation; in the first validation, if that does not log ``monitor``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning.callbacks import StructureFreezeCallback, StructureRevert
        >>> callbacks = [StructureFreezeCallback("head"), StructureRevert("val/accuracy")]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(
        self, monitor: str, mode: Literal["min", "max"] = "max", tolerance: float = 0.005, patience: int = 2
    ) -> None:
        super().__init__()
        with as_misconfiguration():
            if not isinstance(monitor, str) or not monitor:
                raise UserTypeError(f"Expected `monitor` to be the name of a metric, but got {monitor!r}.")
            expect_choice("mode", mode, ("min", "max"))
            expect_number("tolerance", tolerance, low=0.0)
            expect_integer("patience", patience, least=1)
        self.monitor = monitor
        self.mode = mode
        self.tolerance = tolerance
        self.patience = patience
        self._records: dict[str, _Record] = {}
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: one for each metric."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def reverts(self) -> dict[str, int]:
        """How often each head that was frozen in this fit went back, by its name."""
        return {name: record.reverts for name, record in self._records.items()}

    def allows_freeze(self, head_name: str) -> bool:
        """Tell whether a head has trained for long enough since it went back last."""
        return self._record(head_name).validations_to_wait == 0

    def before_freeze(self, trainer: Any, slot: HeadSlot) -> None:
        """Keep the MLP and its optimizer state, right before it is frozen."""
        record = self._record(slot.name)
        record.trial = _Trial(
            step=trainer.global_step,
            reference=record.score,
            weights={name: value.detach().clone() for name, value in slot.module.state_dict().items()},
            optimizer_state=copy_state(trainer.optimizers[0], slot.module),
        )

    def is_judging(self, head_name: str) -> bool:
        """Tell whether the freeze of a head still has to prove itself."""
        return self._record(head_name).trial is not None

    def _record(self, head_name: str) -> _Record:
        return self._records.setdefault(head_name, _Record())

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is a freeze to judge."""
        self._restored = None
        if stage == "fit" and not self._freezing(trainer):
            raise UserMisconfigurationError(
                "Expected the trainer to have a `StructureFreezeCallback` beside `StructureRevert`, but got none."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on from a checkpoint, or know nothing: what was kept is for the optimizer of another fit."""
        self._records = {}
        for name, state in (self._restored or {"heads": {}})["heads"].items():
            trial = state["trial"] and _Trial(**state["trial"])
            self._records[name] = _Record(**{**state, "trial": trial})
        self._restored = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that there is a validation to judge by."""
        if not trainer.enable_validation:
            raise UserMisconfigurationError(
                f"Expected a fit with validation, so that a freeze can be judged by `monitor`, {self.monitor!r}, "
                "but there is none."
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Judge what is frozen by the score of this validation, and take back what lost."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = self._score(trainer)
        for freeze in self._freezing(trainer):
            for name, watch in freeze.heads.items():
                self._judge(trainer, self._record(name), score, solved=watch.solve.solved)
        self._revert_lost(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take back what lost where gradients were being accumulated."""
        self._revert_lost(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how often heads went back."""
        for freeze in self._freezing(trainer):
            for name in freeze.heads:
                reverts = float(self._record(name).reverts)
                pl_module.log(freeze.log_key("reverts", name), reverts, sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if a fit ends before the verdict."""
        for freeze in self._freezing(trainer):
            for name in freeze.heads:
                trial = self._record(name).trial
                if trial is not None:
                    freeze.say(f"The fit ends before the freeze of {name!r} is proven: {self._describe(trial)}.")

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in primitives and tensors; the MLP and its optimizer state while a freeze is judged."""
        heads = {
            name: {**vars(record), "trial": record.trial and dict(vars(record.trial), scores=list(record.trial.scores))}
            for name, record in self._records.items()
        }
        return {"heads": heads}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the fit.

        Raises:
            MisconfigurationException: if it is not what this callback saves.
        """
        check_state(state_dict, {"heads": dict}, "`StructureRevert`")
        for name, state in state_dict["heads"].items():
            check_state(state, _kinds(_Record) | {"trial": dict | None}, f"the judge of the head at {name!r}")
            if state["trial"] is not None:
                check_state(state["trial"], _kinds(_Trial), f"the judged freeze of the head at {name!r}")
        self._restored = state_dict

    @staticmethod
    def _freezing(trainer: Any) -> list[StructureFreezeCallback]:
        return [other for other in trainer.callbacks if isinstance(other, StructureFreezeCallback)]

    def _score(self, trainer: Any) -> float:
        """Return the metric of the validation that just ended, averaged so that all processes decide alike."""
        score = trainer.callback_metrics.get(self.monitor)
        # All processes stop where one lacks it, for the others would wait for it for ever.
        if trainer.strategy.reduce_boolean_decision(score is None, all=False):
            raise UserMisconfigurationError(
                f"Expected `monitor` to name a metric that the validation logs, but got {self.monitor!r}. "
                f"Logged are: {sorted(trainer.callback_metrics) or 'none'}."
            )
        mean = trainer.strategy.reduce(
            torch.as_tensor(score, dtype=torch.float64, device=trainer.strategy.root_device), reduce_op="mean"
        )
        return float(mean)

    def _judge(self, trainer: Any, record: _Record, score: float, *, solved: bool) -> None:
        trial = record.trial
        if trial is not None and trainer.global_step == trial.step and not solved:
            # Nothing was trained since the freeze, which changes no output. A fit that is resumed from this step would
            # not validate here, so that nothing may follow from it.
            return
        record.score = score
        if trial is None:
            record.validations_to_wait = max(0, record.validations_to_wait - 1)
        elif not self._is_worse(score, trial.reference):
            record.trial = None
        else:
            trial.scores.append(score)
            trial.lost = len(trial.scores) >= self.patience

    def _is_worse(self, score: float, reference: float | None) -> bool:
        # What cannot be shown to be as good counts as worse.
        if math.isnan(score) or reference is None:
            return True
        gain = score - reference if self.mode == "max" else reference - score
        return gain < -self.tolerance

    def _revert_lost(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        for freeze in self._freezing(trainer):
            for event in self._reverted(trainer, pl_module, freeze):
                freeze.say(event)
            freeze.stop_if_finished(trainer)

    def _reverted(self, trainer: Any, pl_module: Any, freeze: StructureFreezeCallback) -> Iterator[Reverted]:
        for name, watch in freeze.heads.items():
            record = self._record(name)
            trial = record.trial
            if trial is None or not trial.lost:
                continue
            watch.revert(trainer, HeadSlot(pl_module, name), trial.weights, trial.optimizer_state)
            # Twice as long after every time: only so many freezes that are of no use fit into a fit.
            record.validations_to_wait = self.patience * 2**record.reverts
            record.reverts += 1
            record.trial = None
            yield Reverted(
                name, trainer.global_step, trainer.current_epoch, self._describe(trial), record.validations_to_wait
            )

    def _describe(self, trial: _Trial) -> str:
        scores = ", ".join(f"{score:.4g}" for score in trial.scores) or "not measured"
        before = "not measured before" if trial.reference is None else f"{trial.reference:.4g} before"
        return f"`{self.monitor}` is {scores} since it was frozen, and was {before}"


def _kinds(kind: Any) -> dict[str, Any]:
    generic = {"dict": dict, "list": list}
    return {
        one.name: generic.get(getattr(getattr(one.type, "__origin__", None), "__name__", ""), one.type)
        for one in fields(kind)
    }
