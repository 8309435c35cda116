"""Reading off a user's own step what a head is given and what it is trained on.

A step is run in eval mode, with outputs of our choosing in place of the head's, and the loss that comes out says the
rest (``loss_reading``). Where the step makes a plain call of a known loss function, and the first batch shows that this
call is the whole loss, later batches are read up to that call only.

This is everything that is touched, here and nowhere else:

- ``log`` and ``log_dict`` of the module do nothing while a step is read.
- ``training_step`` of the module is replaced for one step of a fit, to see what it returns.
- ``forward`` of the head is replaced while a step is read or seen, and its gradient is asked for. No hook is used.
- Modes: all modules are in eval mode while a step is read, or as ``on_validation_model_eval`` of the module sets them.
- Attributes of modules: a step that is read may set any of them anew, and works on copies of lists, dictionaries, sets,
  buffers and the states of torchmetrics.
- ``requires_grad`` of parameters is off while a step is read, but for the head's on the first batch.
- Random number generators of Python, NumPy and PyTorch are as before.
- ``torch.compile``: what is compiled runs eagerly while a step is read or seen.
- Loaders: a copy is read (``loaders``); the position of the original, and its generators, stay.

Side effects on anything else are not undone: files, loggers that are called directly, objects that are no modules,
and tensors that are changed in place where they are neither buffers nor metric states.
"""

import copy
import functools
import inspect
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from glai_lightning.checks import listed
from glai_lightning.fitting.loaders import isolated_rng
from glai_lightning.fitting.loss_reading import (
    HeadBatch,
    LossKind,
    LossNotReadError,
    LossReading,
    as_rows,
    formed_targets,
    head_batch,
    label_smoothing_of,
    loss_gradient,
    outputs_of_layout,
    precision_of,
    read_loss,
    rows_of,
    shows_its_loss,
)
from glai_lightning.fitting.step_watch import LossCall, LossReached, StepWatch
from glai_lightning.heads.frozen import GLAIHead, frozen_parameters
from glai_lightning.heads.joined import head_at
from glai_lightning.heads.patterns import layout_of

Stage = Literal["training", "validation"]

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextmanager
def isolated_step(pl_module: Any) -> Iterator[None]:
    """Context for running steps of a module in eval mode, beside its fit; above is the list of what is undone."""
    kept = [(module, dict(vars(module))) for module in pl_module.modules()]
    trainable = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    try:
        for module, attributes in kept:
            vars(module).update(_copies(module, attributes))
        _set_eval(pl_module)
        vars(pl_module).update(log=_log_nothing, log_dict=_log_nothing)
        for parameter in trainable:
            parameter.requires_grad_(False)
        with isolated_rng(), torch.compiler.set_stance("force_eager"):
            _draw_otherwise()
            yield
    finally:
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _set_eval(pl_module: Any) -> None:
    """Put a module in eval mode, as it does so itself: some keep what scales their outputs in training mode."""
    pl_module.eval()
    own = getattr(type(pl_module), "on_validation_model_eval", None)
    # By name: the hook to override is that of `lightning` or of `pytorch_lightning`.
    if own is not None and not own.__module__.endswith("core.hooks"):
        pl_module.on_validation_model_eval()


def _copies(module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    copies = {name: copy.copy(value) for name, value in attributes.items() if type(value) in _CONTAINERS}
    copies["_buffers"] = {n: None if b is None else b.detach().clone() for n, b in attributes["_buffers"].items()}
    if isinstance(module, Metric):
        tensors = {name: value for name, value in attributes.items() if isinstance(value, Tensor)}
        copies |= {name: value.detach().clone() for name, value in tensors.items()}
    return copies


def _draw_otherwise() -> None:
    """Let what is drawn at random here differ from what the step of the fit itself will draw."""
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _log_nothing(*_: Any, **__: Any) -> None:
    return None


def call_step(step: Any, batch: Any, batch_idx: int) -> Any:
    """Call a step of a user with what it takes: the index of the batch may be left out."""
    takes_index = len(inspect.signature(step).parameters) > 1
    return step(batch, batch_idx) if takes_index else step(batch)


class StepReader:
    """Reads off the steps of a module what one of its heads is given, and what it is trained on.

    Args:
        trainer: the Trainer in whose fit this happens.
        pl_module: its module.
        name: qualified name of the head.

    Attributes:
        kind: which loss the head is trained on; ``None`` until a batch was read.
        label_smoothing: of a cross-entropy with labels, in [0, 1).
        scale: the sum of the weights of the samples of a training batch in its loss, 1 for a mean of cross-entropies.
    """

    def __init__(self, trainer: Any, pl_module: Any, name: str) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.name = name
        self.kind: LossKind | None = None
        self.label_smoothing = 0.0
        self.scale = 1.0
        self._stops: dict[Stage, bool] = {}
        self._seen: tuple[LossReading, Tensor] | None = None

    @property
    def module(self) -> nn.Module:
        """The head as it is now."""
        return head_at(self.pl_module, self.name)

    def look_anew(self) -> None:
        """Read the whole step of the next batch of each stage, to see that its loss is still what it was."""
        self._stops = {}

    def read(self, batch: Any, batch_idx: int, stage: Stage) -> HeadBatch | None:
        """Read one batch, within ``isolated_step``.

        Args:
            batch: a batch on the device of the module.
            batch_idx: its index.
            stage: whose step to run.

        Returns:
            Inputs, targets and weights of the samples that count, or ``None`` if the step does not call the head.

        Raises:
            MisconfigurationException: if the loss is none that can be solved for.
        """
        first = stage not in self._stops
        with self._head_alone_trainable(first) as parameters:
            watch, returned = self._run(batch, batch_idx, stage, stop=not first and self._stops[stage])
            if not watch.outputs:
                return None
            if not first and self._stops[stage] and watch.calls:
                return self._from_call(watch, watch.calls[0])
            reading = self._read_loss(watch, returned, stage, parameters)
        if reading is None:
            return None
        inputs = rows_of(watch.inputs, watch.outputs)
        smoothing = self.label_smoothing
        if first:
            smoothing = label_smoothing_of(reading)
        if first and stage == "training":
            # What the next step of the fit is compared with; the batches of a solve are none of its steps.
            self._seen = (reading, inputs) if self.kind is None else None
            self.label_smoothing = smoothing
            self.scale = float(reading.weights.sum())
        self.kind = reading.kind
        read = head_batch(reading, inputs, smoothing)
        if first:
            self._stops[stage] = bool(watch.calls) and _same(self._from_call(watch, watch.calls[0]), read)
        return read

    @property
    def stops_at_loss(self) -> bool:
        """Whether the first batch showed that one plain loss call in ``training_step`` is the whole loss."""
        return self._stops.get("training", False)

    def read_watched(self, watch: "StepWatch") -> HeadBatch | None:
        """Read the batch of a step of the fit that was watched; ``None`` if it does not call the head.

        Raises:
            MisconfigurationException: if the loss was not called as in the first batch.
        """
        if not watch.outputs:
            return None
        if not watch.calls:
            raise _unreadable(self.name, "training_step", "does not call the loss function of the first batch")
        return self._from_call(watch, watch.calls[0])

    def see_next_step(self, check: Callable[["SeenStep"], None]) -> None:
        """Let the next training step of the fit be seen while it runs as always.

        Args:
            check: is told what was seen, before the step returns.
        """
        pl_module = self.pl_module
        step, replaced = pl_module.training_step, pl_module.__dict__.get("training_step")

        @functools.wraps(step)
        def seen(*args: Any, **kwargs: Any) -> Any:
            del pl_module.__dict__["training_step"]
            if replaced is not None:
                pl_module.__dict__["training_step"] = replaced
            with torch.compiler.set_stance("force_eager"), StepWatch(self.module) as watch:
                returned = step(*args, **kwargs)
            check(SeenStep(watch.inputs, watch.outputs, _loss_of(returned)))
            return returned

        seen.is_seen = True  # type: ignore[attr-defined]
        pl_module.__dict__["training_step"] = seen

    def check(self, seen: "SeenStep") -> None:
        """Check that what a step of the fit returned is the loss that was read off the same batch, or one of its kind.

        Raises:
            MisconfigurationException: otherwise.
        """
        if not seen.outputs:
            return
        outputs = [z for z in seen.outputs if z.requires_grad]
        if seen.loss is None or not seen.loss.requires_grad or not outputs:
            raise _unreadable(self.name, "training_step", "returned no loss that depends on them")
        read, self._seen = self._seen, None
        rows = as_rows(outputs)
        if read is not None and read[0].targets.shape == rows.shape:
            gradient, expected = loss_gradient(seen.loss, outputs), read[0].gradient_at(rows)
            limit = 4 * precision_of(outputs) * read[0].weights.abs().max()
            if not bool(((gradient - expected).abs() <= limit).all()):
                raise LossNotReadError(
                    f"Expected `training_step` to return the same loss of the outputs of the head at {self.name!r} in "
                    "training and in eval mode, so that the head can be solved for it, but its gradient is another: "
                    "with more terms in training, targets that are drawn at random, or outputs that are changed."
                )
        elif self.kind is not None and not shows_its_loss(self.kind, outputs):
            return
        elif read_loss(seen.loss, outputs).kind != self.kind:
            raise LossNotReadError(f"Expected the {self.kind} of the first batch, but got another loss.")

    @property
    def inputs_read(self) -> Tensor | None:
        """What the head was given when the first batch was read, (n, D), until that batch is checked."""
        return None if self._seen is None else self._seen[1]

    @contextmanager
    def _head_alone_trainable(self, trainable: bool) -> Iterator[list[nn.Parameter]]:
        head = self.module
        frozen = {id(p) for p in frozen_parameters(head)} if isinstance(head, GLAIHead) else set()
        parameters = [p for p in head.parameters() if trainable and id(p) not in frozen and p.is_floating_point()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield parameters
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _run(self, batch: Any, batch_idx: int, stage: Stage, *, stop: bool) -> tuple[StepWatch, Any]:
        stand_in = functools.partial(outputs_of_layout, layout_of(self.module))
        step: Any = getattr(self.pl_module, f"{stage}_step")
        while getattr(step, "is_seen", False):
            # The next step is to be seen for another head.
            step = step.__wrapped__
        watch, returned = StepWatch(self.module, stand_in, stop=stop), None
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context(), suppress(LossReached), watch:
            returned = call_step(step, batch, batch_idx)
        return watch, returned

    def _read_loss(
        self, watch: StepWatch, returned: Any, stage: Stage, parameters: Sequence[nn.Parameter]
    ) -> LossReading | None:
        if stage == "validation":
            return self._read_any(watch)
        loss = _loss_of(returned)
        if loss is None or not loss.requires_grad:
            if self.kind is not None and loss is None:
                return None
            raise _unreadable(self.name, "training_step", "returned no loss that depends on them")
        if parameters:
            penalties = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
            if any(penalty is not None and bool(penalty.ne(0).any()) for penalty in penalties):
                raise _unreadable(
                    self.name, "training_step", "returned one that depends on the weights of the head beside them"
                )
        try:
            return read_loss(loss, watch.outputs)
        except LossNotReadError as error:
            if not watch.between:
                raise
            between = listed(f"`{name}`" for name in watch.between)
            raise LossNotReadError(f"{error} Between them and the loss the step calls {between}.") from error

    def _read_any(self, watch: StepWatch) -> LossReading:
        """Read the first number of a validation step that is a loss of the kind that the head is trained on."""
        for number in watch.numbers:
            with suppress(LossNotReadError):
                reading = read_loss(number, watch.outputs)
                if self.kind in (None, reading.kind):
                    return reading
        raise _unreadable(self.name, "validation_step", "computes none")

    def _from_call(self, watch: StepWatch, call: LossCall) -> HeadBatch:
        inputs = rows_of([watch.inputs[call.place]], [watch.outputs[call.place]])
        targets = call.targets
        if call.kind == "cross_entropy":
            targets = targets.reshape(len(inputs))
            counted = targets.ne(call.ignore_index)
            return HeadBatch(inputs, targets) if bool(counted.all()) else HeadBatch(inputs[counted], targets[counted])
        targets = targets.reshape(len(inputs), -1)
        return HeadBatch(inputs, formed_targets(call.kind, targets.to(watch.outputs[call.place].dtype)))


@dataclass(frozen=True)
class SeenStep:
    """What was seen of a training step of a fit: what the head was given and returned, and the loss."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    loss: Tensor | None


def _loss_of(returned: Any) -> Tensor | None:
    loss = returned.get("loss") if isinstance(returned, dict) else returned
    return loss if isinstance(loss, Tensor) else None


def _unreadable(name: str, step: str, what: str) -> LossNotReadError:
    return LossNotReadError(
        f"Expected `{step}` to compute a loss of the outputs of the head at {name!r} that can be solved for, but it "
        f"{what}. Override `inputs_and_targets` of the callback to say what the head is to be solved for."
    )


def _same(one: HeadBatch, other: HeadBatch) -> bool:
    return (
        other.weights is None
        and one.targets.dtype == other.targets.dtype
        and one.inputs.shape == other.inputs.shape
        and one.targets.shape == other.targets.shape
        and torch.equal(one.inputs, other.inputs)
        and torch.allclose(one.targets, other.targets, atol=1e-3)
    )
