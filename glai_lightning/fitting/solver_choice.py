"""What the first step of a fit shows of a head: whether its inputs are fixed, and what a freeze can save at most."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.flop_counter import FlopCounterMode

from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.loss_reading import HeadBatch, LossKind, rows_of
from glai_lightning.fitting.replaying import FixedCalls
from glai_lightning.fitting.step_reading import SeenStep
from glai_lightning.heads.patterns import layout_of
from glai_lightning.solvers import LogisticSolver, RidgeSolver


def choose_solver(kind: LossKind | None, targets: Tensor) -> LogisticSolver | RidgeSolver:
    """Return the solver for a loss, with the defaults of its class.

    Args:
        kind: the loss that a head is trained on; ``None`` if only its targets are known.
        targets: class labels (n,), or numbers.

    Example:
        >>> choose_solver("mse", torch.zeros(4, 1))
        RidgeSolver(l2=None)
    """
    numbers = kind == "mse" or (kind is None and targets.is_floating_point())
    return RidgeSolver() if numbers else LogisticSolver()


class FirstLook:
    """What the first step of a fit that calls a head shows of it.

    Args:
        slot: the place of the head.
        others: other heads with a loss of their own, which are beside this one and not before it.

    Attributes:
        batch: what was read of the first batch, in eval mode.
        random: whether the data loader draws at random.
        calls: what modules before the head returned in the first step, where that is not run again.
    """

    def __init__(self, slot: HeadSlot, others: Sequence[nn.Module]) -> None:
        self.batch: HeadBatch | None = None
        self.random = False
        self.calls: FixedCalls | None = None
        self._slot = slot
        self._others = others
        self._differs = False
        self._multiply_adds_outside: float | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context in which a step is read, in which the head does not run: its multiply-adds are counted."""
        counter = FlopCounterMode(display=False)
        with counter:
            yield
        self._multiply_adds_outside = counter.get_total_flops() / 2

    @property
    def work_before_head(self) -> float:
        """Multiply-adds of what is outside of the heads over those of the heads, in a forward pass of the first batch.

        Of heads beside this one the products of their layers are taken out of the count, for the same rows.
        """
        assert self.batch is not None
        assert self._multiply_adds_outside is not None
        own, *others = (
            len(self.batch.inputs) * sum(layout_of(head).names.products) for head in (self._slot.module, *self._others)
        )
        return (self._multiply_adds_outside - sum(others)) / (own + sum(others))

    @property
    def normalises_by_batch(self) -> bool:
        """Whether anything outside of the head normalises by the batch."""
        inside = {id(module) for module in self._slot.module.modules()}
        return any(_normalises_by_batch(m) for m in self._slot.pl_module.modules() if id(m) not in inside)

    def compare(self, seen: SeenStep, inputs: Tensor | None) -> None:
        """Compare what the step of the fit gave the head with what it was given when the batch was read, (n, D)."""
        if inputs is None or not seen.inputs:
            return
        rows = rows_of(seen.inputs, seen.outputs)
        near = 1e-4 * float(inputs.abs().max())
        self._differs = rows.shape != inputs.shape or not torch.allclose(rows, inputs, rtol=1e-3, atol=near)

    def moving_inputs(self) -> list[tuple[str, str]]:
        """List why what the head is given is not fixed, and what a solve then means."""
        pl_module, head = self._slot.pl_module, self._slot.module
        inside = {id(module) for module in head.modules()}
        own = {id(parameter) for one in (head, *self._others) for parameter in one.parameters()}
        outside = [module for module in pl_module.modules() if id(module) not in inside]
        reasons = []
        if any(id(parameter) not in own for parameter in self._trained()):
            reasons.append(
                ("layers outside the head are trained", "the solve is for their embeddings as they are by then")
            )
        if any(isinstance(module, _DropoutNd) and module.p > 0 and module.training for module in outside):
            reasons.append(("there is dropout outside the head", "the solve is for embeddings without it"))
        elif self.calls is not None and self.normalises_by_batch:
            reasons.append(
                ("there is normalisation by the batch outside the head", "the solve is for embeddings of one reading")
            )
        elif self.calls is not None and self.calls.random:
            reasons.append(("a module outside the head draws at random", "the solve is for one draw"))
        elif self._differs:
            reasons.append(
                (
                    "a batch gives the head other inputs when it is read again in eval mode (augmentation in "
                    "`training_step`, or normalisation by the batch)",
                    "the solve is for those of one reading",
                )
            )
        if self.random:
            reasons.append(("the training data is drawn at random", "the solve is for one draw of it"))
        return reasons

    def _trained(self) -> list[nn.Parameter]:
        """List the parameters that the fit trains; of others that require gradients no optimizer knows."""
        groups = [group for optimizer in self._slot.pl_module.trainer.optimizers for group in optimizer.param_groups]
        known = {id(parameter) for group in groups for parameter in group["params"]}
        return [p for p in self._slot.pl_module.parameters() if p.requires_grad and id(p) in known]

    def describe_freeze(self, obstacle: str, paths: str) -> str:
        """Say in one line why the head is not solved, and what a freeze alone can save.

        Args:
            obstacle: why there is no solve.
            paths: what stays trainable.
        """
        saved = ""
        if paths == "output" and self.batch is not None and self._multiply_adds_outside is not None:
            multiply_adds, memory = self._savings(len(self.batch.inputs), self._multiply_adds_outside)
            saved = (
                f"saves at most {multiply_adds:.1%} of a step's multiply-adds and {memory:.1%} of the optimizer's "
                "memory, and "
            )
        return (
            f"The head at {self._slot.name!r} will be frozen and not solved: {obstacle.rstrip('.')}. Freezing alone "
            f"{saved}usually costs accuracy; pass a solver to solve all the same."
        )

    def _savings(self, rows: int, multiply_adds_outside: float) -> tuple[float, float]:
        """Return which part of a step's multiply-adds and of the optimizer's memory output paths save at most.

        The backward pass of a layer takes one matrix product for its weights and one for its inputs. Frozen, the inner
        layers need none for their weights, and none at all where nothing before the head is trained. Of what is
        outside of the head the part of its parameters that is trained is taken to have a backward pass.
        """
        pl_module, head = self._slot.pl_module, self._slot.module
        products = [rows * product for product in layout_of(head).names.products]
        inner, last = sum(products[:-1]), products[-1]
        own = {id(parameter) for parameter in head.parameters()}
        outside = [parameter for parameter in pl_module.parameters() if id(parameter) not in own]
        trained = sum(parameter.numel() for parameter in self._trained() if id(parameter) not in own)
        part = trained / sum(parameter.numel() for parameter in outside) if trained else 0.0
        saved = inner if trained else 2 * inner - products[0] + last
        step = 3 * (inner + last) - (0 if trained else products[0]) + multiply_adds_outside * (1 + 2 * part)
        frozen = sum(parameter.numel() for parameter in layout_of(head).structure_parameters())
        return saved / step, frozen / (trained + sum(parameter.numel() for parameter in head.parameters()))


def _normalises_by_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
