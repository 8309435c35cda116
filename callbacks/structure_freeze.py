"""The callback that freezes the structure of a head in the middle of a fit."""

import math
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback
from torch import Tensor

from glai_lightning.callbacks.callback_state import MAPPING, check_entries
from glai_lightning.callbacks.revert_guard import monitored_score
from glai_lightning.callbacks.watched_head import WatchedHead, check_head_state
from glai_lightning.fitting.argument_checks import check_least, check_range
from glai_lightning.fitting.collection import Stage
from glai_lightning.fitting.conversion import check_order, check_trainer
from glai_lightning.fitting.heads_in_module import as_names, is_pattern, match_heads, stands_alone
from glai_lightning.fitting.messages import say
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.fitting.solving import read_step
from glai_lightning.heads.churn import structure_settled
from glai_lightning.heads.record import Paths
from glai_lightning.solvers import LogisticSolver, RidgeSolver, SolveReport


class StructureFreezeCallback(Callback):
    """Freezes the structure of an MLP head once its activation patterns settle, and converts the head in place.

    The callback works on any LightningModule, without a change to its code. It measures *churn*, the fraction of
    pattern bits that flipped since the last check on the inputs that the head was last trained on. Once churn is small,
    and small against the largest so far, the head is converted at the start of the next epoch into one that is
    linear in what it still trains. With output paths (the default) parameters, optimizer groups and keys stay
    what they were.

    The default thresholds were compared with other rules on six data sets, see "When to freeze" in
    ``benchmarks/README.md``. The best moment follows the learning rate: at a constant 3e-3 it came after two or three
    epochs, where churn often does not settle (then set ``freeze_at_epoch``), at 3e-4 much later than churn settles.

    It logs, once an epoch from the first on, ``structure/churn`` (0 once frozen), ``structure/frozen`` (0 or 1) and
    ``structure/freeze_epoch`` (-1 until then).

    Several heads of one module have a structure, a churn and a moment of freezing each, and ``/<name>`` behind the
    keys of what is logged. A solver solves for each head when it freezes, by the loss that is called on that head's
    outputs; a head without a loss of its own, because another head stands on it, is refused on the first batch. Heads
    that want different arguments can have a callback each.

    With ``monitor`` a freeze has to prove itself. The MLP and its optimizer state are kept until a validation of the
    frozen head is no worse, by more than ``revert_tolerance``, than the last one before the freeze (and before the
    solve). If ``revert_patience`` validations in a row are worse, the head goes back to that MLP, with that optimizer
    state, at the start of the next epoch (with ``check_every_n_steps`` after the next step), and structural training
    goes on; layers outside the head stay as they are. NaN is worse than any score, and so is a freeze before which
    there was no validation to hold it against. After it went back a head must settle anew, whatever
    ``freeze_at_epoch`` says, and may freeze again after ``revert_patience`` validations, twice as many after the second
    time, and so on. ``structure/reverts`` counts how often it went back; ``stop_after_solve`` waits for the proof.

    Args:
        head: qualified name of the MLP head in the LightningModule, or a pattern such as ``heads.*`` that stands for
            all MLP heads that it matches, or a list of either.
        paths: what stays trainable, see ``freeze_structure``: 'output', 'tangent' or 'independent'.
        churn_tolerance: largest churn that counts as settled, in [0, 1].
        relative_tolerance: largest churn that counts as settled, as a fraction of the largest so far, in (0, 1].
        patience: number of checks in a row that must pass.
        min_epochs: finished epochs before which the structure is not frozen by churn.
        freeze_at_epoch: first epoch (0-based) to train frozen, whatever the churn; ``None`` to let churn decide.
        check_every_n_steps: measure churn every so many optimizer steps instead of once an epoch, and convert between
            two steps. For data so large that the structure settles within the first epoch; ``min_epochs`` then wants
            to be 0.
        probe_size: number of inputs on which churn is measured.
        solver: minimises the training loss over the path weights once the structure is frozen, by one pass over the
            training data that leaves no trace in the fit. The freeze then is at the end of an epoch, so that validation
            and checkpoint of that epoch are those of the solved head. Of several processes each reads its own part.
        stop_after_solve: whether the fit stops after the validation of the solved head (of several: of the last one);
            else the optimizer goes on.
        monitor: metric of the validation by which a freeze is judged; ``None`` for no judge.
        mode: whether the largest ('max') or the smallest ('min') value of ``monitor`` is best.
        revert_tolerance: how much worse than before the freeze, in units of ``monitor``, still counts as good.
        revert_patience: number of validations in a row after which a head that was worse in all of them goes back.
        verbose: whether to say when and why the structure was frozen.

    Attributes:
        frozen: whether the head is frozen; of several heads, whether all are. Where a strategy starts the processes
            that fit (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``), this object is not told; ask the module.
        freeze_epoch: first epoch that trained frozen, of several heads with all of them; or ``None``.
        freeze_reason: why it was frozen, in a sentence, or ``None``.
        churn_history: churn at each check until the freeze; of several heads that of the first.
        solve_report: what the solve did, or ``None``; of several heads that of the first.
        heads: every head that is watched, by its name, with ``frozen``, ``freeze_epoch``, ``freeze_reason``,
            ``churn_history`` and ``solve.report`` of its own.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of a fit, if a head is not there,
            cannot be read or is not trained, a pattern matches none, one head lies inside another or has two names, or
            if strategy, optimizers or other callbacks rule a conversion out; after the first batch, if a head was not
            called.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from glai_lightning.callbacks import StructureFreezeCallback
        >>> trainer = Trainer(callbacks=[StructureFreezeCallback("head")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        head: str | Sequence[str] = "head",
        paths: Literal["output", "tangent", "independent"] = "output",
        churn_tolerance: float = 0.10,
        relative_tolerance: float = 0.25,
        patience: int = 1,
        min_epochs: int = 1,
        freeze_at_epoch: int | None = None,
        check_every_n_steps: int | None = None,
        probe_size: int = 1024,
        solver: LogisticSolver | RidgeSolver | None = None,
        stop_after_solve: bool = False,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        revert_tolerance: float = 0.005,
        revert_patience: int = 2,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._names = as_names("head", head)
        if not isinstance(paths, str) or paths not in ("output", "tangent", "independent"):
            raise UserMisconfigurationError(
                f"Expected `paths` to be 'output', 'tangent' or 'independent', but got {paths!r}."
            )
        check_range("churn_tolerance", churn_tolerance, 0.0, 1.0)
        check_range("relative_tolerance", relative_tolerance, 0.0, 1.0, above=True)
        check_least("patience", patience, 1)
        check_least("min_epochs", min_epochs, 0)
        if freeze_at_epoch is not None:
            check_least("freeze_at_epoch", freeze_at_epoch, 0)
        check_least("probe_size", probe_size, 1)
        if check_every_n_steps is not None:
            check_least("check_every_n_steps", check_every_n_steps, 1)
        if solver is not None and not isinstance(solver, LogisticSolver | RidgeSolver):
            raise UserMisconfigurationError(
                f"Expected `solver` to be a `LogisticSolver` or a `RidgeSolver`, but got {solver!r}."
            )
        if stop_after_solve and solver is None:
            raise UserMisconfigurationError("Expected `solver` to be given with `stop_after_solve`, but got None.")
        _check_monitor(monitor, mode, revert_tolerance, revert_patience)
        self.head = head if isinstance(head, str) else list(head)
        self.paths: Paths = paths
        self.churn_tolerance = churn_tolerance
        self.relative_tolerance = relative_tolerance
        self.patience = patience
        self.min_epochs = min_epochs
        self.freeze_at_epoch = freeze_at_epoch
        self.check_every_n_steps = check_every_n_steps
        self.probe_size = probe_size
        self.solver = solver
        self.stop_after_solve = stop_after_solve
        self.monitor = monitor
        self.mode = mode
        self.revert_tolerance = revert_tolerance
        self.revert_patience = revert_patience
        self.verbose = verbose

        #: By name; those that a pattern stands for from ``setup`` on.
        self.heads = {name: WatchedHead(name, self) for name in self._names if not is_pattern(name)}
        self._logs_names = not stands_alone(self._names)
        self._restored: dict[str, Any] | None = None
        self._module: weakref.ReferenceType[Any] | None = None
        self._fits = False
        self._alone = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: one for each head."""
        return self._generate_state_key(head=self.head)

    @property
    def frozen(self) -> bool:
        """Whether all heads are frozen."""
        return bool(self.heads) and all(head.frozen for head in self.heads.values())

    @property
    def freeze_epoch(self) -> int | None:
        """First epoch that trained with all heads frozen; ``None`` if there is none, or it is not known."""
        epochs = [head.freeze_epoch for head in self.heads.values() if head.frozen]
        known = [epoch for epoch in epochs if epoch is not None]
        return max(known) if self.frozen and len(known) == len(epochs) else None

    @property
    def freeze_reason(self) -> str | None:
        """Why the head was frozen, in a sentence; of several heads the reasons, once all are frozen."""
        if not self.frozen:
            return None
        if stands_alone(self._names):
            return self._first().freeze_reason
        return "; ".join(f"{head.name!r}: {head.freeze_reason}" for head in self.heads.values())

    @property
    def churn_history(self) -> list[float]:
        """Churn of the (first) head at each check until the freeze."""
        return self._first().churn_history

    @property
    def solve_report(self) -> SolveReport | None:
        """What the solve of the (first) head did, or ``None``."""
        return self._first().solve.report

    def _first(self) -> WatchedHead:
        # A pattern that was not looked up yet stands for nothing that was watched.
        return next(iter(self.heads.values()), WatchedHead(self._names[0], self))

    def should_freeze(self, head: WatchedHead) -> bool:
        """Tell, after a check, whether the structure of a head has settled; override to decide otherwise.

        Args:
            head: the head, with its ``name`` and its ``churn_history``, this check included.
        """
        return structure_settled(
            head.churn_history,
            churn_tolerance=self.churn_tolerance,
            relative_tolerance=self.relative_tolerance,
            patience=self.patience,
        )

    def inputs_and_targets(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, stage: Stage
    ) -> tuple[Tensor, Tensor]:
        """Return what the head is given for a batch, and what it is to be solved for; override where it cannot be seen.

        By default the step of the module is run up to its loss call, whose arguments say it. An override speaks of one
        head: of several, each that is to be solved so wants a callback of its own.

        Args:
            trainer: the Trainer of the fit.
            pl_module: the module, in eval mode.
            batch: a batch on the device of the module.
            batch_idx: index of the batch.
            stage: 'training' or 'validation'.

        Returns:
            Head inputs (batch, D), and targets (batch,).

        Raises:
            MisconfigurationException: if the step calls no known loss on the outputs of the head.
        """
        return read_step(trainer, pl_module, pl_module.get_submodule(self._first().name), batch, batch_idx, stage)

    @property
    def says_inputs_and_targets(self) -> bool:
        """Whether a subclass says what the head is to be solved for."""
        return type(self).inputs_and_targets is not StructureFreezeCallback.inputs_and_targets

    def freeze(self, name: str | None = None) -> None:
        """Freeze the structure of a head now, between fits.

        Args:
            name: which of several heads; ``None`` for all that are not frozen.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or no such head is left to freeze.
            ValueError: if a head cannot be read, or has too many independent paths. No head is changed then.
        """
        pl_module = self._fitted_module()
        chosen = self._choose(pl_module, name, frozen=False)
        for head in chosen:
            head.check_convertible(pl_module)
        for head in chosen:
            head.freeze(pl_module)

    def unfreeze(self, name: str | None = None) -> None:
        """Put the MLP back in the place of a head frozen with output paths, all of it trainable, between fits.

        The next fit trains and watches it anew, and may freeze it again.

        Args:
            name: which of several heads; ``None`` for all that are frozen.

        Raises:
            MisconfigurationException: if the callback has not been part of a fit, or no such head is frozen.
            ValueError: if a head is frozen with other than output paths, which no MLP equals once they are trained.
                No head is changed then.
        """
        pl_module = self._fitted_module()
        chosen = self._choose(pl_module, name, frozen=True)
        for head in chosen:
            head.check_thawable(pl_module)
        for head in chosen:
            head.unfreeze(pl_module)

    def _choose(self, pl_module: Any, name: str | None, *, frozen: bool) -> list[WatchedHead]:
        if name is not None and name not in self.heads:
            raise UserMisconfigurationError(f"Expected `name` to be one of {list(self.heads)}, but got {name!r}.")
        named = list(self.heads.values()) if name is None else [self.heads[name]]
        chosen = [head for head in named if head.is_frozen_in(pl_module) is frozen]
        if not chosen:
            names = " and ".join(repr(head.name) for head in named)
            expected, got = ("frozen", "it is an MLP") if frozen else ("an MLP", "it is frozen already")
            raise UserMisconfigurationError(f"Expected the head at {names} to be {expected}, but {got}.")
        return chosen

    def _fitted_module(self) -> Any:
        pl_module = None if self._module is None else self._module()
        if self._fits:
            raise UserMisconfigurationError(
                "Expected no fit to be running, but `freeze` or `unfreeze` was called in one."
            )
        if pl_module is None:
            raise UserMisconfigurationError("Expected the callback to have been part of a fit, but it was in none yet.")
        return pl_module

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check trainer and module, and prepare for a checkpoint from either side of the freeze."""
        if stage == "fit":
            check_trainer(trainer, pl_module)
            check_order(trainer, self, self.paths)
        self._find_heads(trainer, pl_module)
        for head in self.heads.values():
            head.prepare(trainer, pl_module, stage)
        self._restored = None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Judge what is frozen by the score of this validation."""
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        to_finish = not self._finished
        score = monitored_score(trainer, self.monitor)
        for head in self.heads.values():
            head.after_validation(trainer, score)
        if self.stop_after_solve and to_finish and self._finished:
            trainer.should_stop = True

    def _find_heads(self, trainer: Any, pl_module: Any) -> None:
        names = match_heads(pl_module, self._names)
        if len(names) > 1 and self.solver is not None and self.says_inputs_and_targets:
            raise UserMisconfigurationError(
                "Expected one head where `inputs_and_targets` is overridden, which speaks of one, but got "
                f"{names}. Give every head a callback of its own."
            )
        self.heads = {name: self.heads.get(name) or WatchedHead(name, self) for name in names}
        watching = [other for other in trainer.callbacks if isinstance(other, StructureFreezeCallback)]
        # Heads that have a callback each are told apart in the logs too.
        match_heads(pl_module, [name for other in watching for name in match_heads(pl_module, other._names)])
        self._logs_names = not stands_alone(self._names) or len(watching) > 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the heads, and freeze those again that were frozen where the fit resumes from."""
        # Weights are restored by now and optimizer state is not: the only place where both the user's
        # configure_optimizers has met the MLP and the optimizer can still follow a conversion before its state is read.
        for head in self.heads.values():
            head.check(trainer, pl_module)
        continues = self._module is not None and self._module() is pl_module
        self._module = weakref.ref(pl_module)
        self._fits = True
        self._alone = False
        for head in self.heads.values():
            head.enter_fit(trainer, pl_module, self._state_of(head), continues)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to watch."""
        if self.monitor is not None and not trainer.enable_validation:
            raise UserMisconfigurationError(
                f"Expected a fit with validation, so that a freeze can be judged by `monitor`, {self.monitor!r}, "
                "but there is none."
            )
        for head in self.heads.values():
            head.start(trainer, pl_module, self._state_of(head))
        if self._restored is not None and self.stop_after_solve and self._finished:
            names = " and ".join(repr(name) for name in self.heads)
            self.say(f"The head at {names} was solved before the checkpoint, after which the fit was to stop.")
            trainer.should_stop = True
        self._restored = None

    @property
    def _finished(self) -> bool:
        return all(head.finished for head in self.heads.values())

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert what settled in the epoch before, or was asked for this one."""
        for head in self.heads.values():
            head.start_epoch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the inputs of the last batches before a check; see, on the first batch, that the loss can be solved."""
        for head in self.heads.values():
            if batch_idx == 0:
                # Where a fit resumes from its save after an epoch's last batch, Lightning starts no new epoch.
                head.start_epoch(trainer, pl_module)
            head.before_batch(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch, before validation and its checkpoint, or every n steps."""
        to_finish = not self._finished
        for head in self.heads.values():
            head.after_batch(trainer, pl_module)
        if self.stop_after_solve and to_finish and self._finished:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log churn and whether the head is frozen."""
        for head in self.heads.values():
            for key, value in head.metrics().items():
                # All ranks have the same numbers, and Lightning warns of values that are not synchronised.
                pl_module.log(self.log_key(key, head.name), value, prog_bar=key == "churn", sync_dist=True)

    def log_key(self, key: str, head_name: str) -> str:
        """Return the name under which something is logged of a head: the head's is in it where there are several."""
        return f"structure/{key}/{head_name}" if self._logs_names else f"structure/{key}"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if a head is still an MLP, and go back to it if that was decided in the last epoch."""
        for head in self.heads.values():
            head.finish(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching; what was seen is kept for the checkpoint that other callbacks may save of the exception."""
        self._fits = False
        # A signal reaches all processes, and Lightning stops them together; anything else may have struck one alone.
        self._alone = type(exception).__name__ != "SIGTERMException"
        for head in self.heads.values():
            head.detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        self._fits = False
        for head in self.heads.values():
            head.close()

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference does not pickle.
        return {**vars(self), "_module": None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs; primitives and tensors only, so that ``weights_only`` loading reads it."""
        if stands_alone(self._names):
            return self._first().state_dict()
        return {"heads": {name: head.state_dict() for name, head in self.heads.items()}}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint, which one process writes, hold what every process saw in the middle of an epoch."""
        if trainer.world_size > 1 and not self._alone:
            for head in self.heads.values():
                head.complete_state(trainer, self._part_of(checkpoint["callbacks"][self.state_key], head))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the fit; a mere test or validation changes nothing.

        Raises:
            MisconfigurationException: if it is not what this callback saves for the same ``head``.
        """
        if stands_alone(self._names):
            check_head_state(state_dict, self._names[0])
        else:
            check_entries(state_dict, {"heads": MAPPING}, "the heads")
            for name, state in state_dict["heads"].items():
                check_head_state(state, name)
        self._restored = state_dict

    def _state_of(self, head: WatchedHead) -> dict[str, Any] | None:
        return None if self._restored is None else self._part_of(self._restored, head)

    def _part_of(self, state: dict[str, Any], head: WatchedHead) -> Any:
        return state if stands_alone(self._names) else state["heads"].get(head.name)

    def say(self, message: str) -> None:
        """Tell the user, once and not once a process, if the callback is verbose."""
        if self.verbose:
            say(message)


def _check_monitor(monitor: str | None, mode: str, revert_tolerance: float, revert_patience: int) -> None:
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise UserMisconfigurationError(f"Expected `monitor` to be the name of a metric, but got {monitor!r}.")
    if not isinstance(mode, str) or mode not in ("min", "max"):
        raise UserMisconfigurationError(f"Expected `mode` to be 'min' or 'max', but got {mode!r}.")
    check_range("revert_tolerance", revert_tolerance, 0.0, math.inf)
    check_least("revert_patience", revert_patience, 1)
    changed = {"mode": mode != "max", "revert_tolerance": revert_tolerance != 0.005}
    changed |= {"revert_patience": revert_patience != 2}
    for name in [name for name, differs in changed.items() if differs and monitor is None]:
        raise UserMisconfigurationError(f"Expected `monitor` to be given with `{name}`, but got None.")
