"""Freezing and unfreezing the head of a LightningModule, in the middle of a fit and between fits."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from glai_lightning.checks import UserError, UserValueError
from glai_lightning.fitting.heads_in_module import HeadSlot, find_head
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.frozen import GLAIHead, check_freezable, freeze_in_place, unfreeze_in_place
from glai_lightning.heads.joined import JoinedHead
from glai_lightning.heads.layout import CannotBeCalledError
from glai_lightning.heads.optimizers import replace_parameters, restore_parameters
from glai_lightning.heads.record import Paths
from glai_lightning.heads.restoring import HeadRestorer


def check_head(slot: HeadSlot, paths: str) -> bool:
    """Check that there is a head in a slot, and that it can be frozen or is frozen already.

    Returns:
        Whether it could be read; ``False`` for one that is to be read when a step calls it, see ``read_first_call``.

    Raises:
        MisconfigurationException: otherwise.
    """
    head = find_head(slot.pl_module, slot.name)
    if isinstance(head, GLAIHead):
        return True
    if isinstance(head, JoinedHead) and paths != "output":
        raise UserMisconfigurationError(
            f"Expected `paths` to be 'output' for the head {slot.name!r}, whose layers another module calls, but got "
            f"{paths!r}."
        )
    try:
        check_freezable(head, paths=paths)
    except CannotBeCalledError:
        return False
    except UserError as error:
        raise UserMisconfigurationError(f"The head at {slot.name!r} cannot be frozen. {error}") from error
    return True


def frozen_head(slot: HeadSlot) -> GLAIHead:
    """Return the head of a slot, which is frozen."""
    head = slot.module
    assert isinstance(head, GLAIHead)
    return head


def check_unfreezable(slot: HeadSlot) -> None:
    """Check that the frozen head in a slot equals an MLP.

    Raises:
        ValueError: if its paths are not 'output'.
    """
    paths = frozen_head(slot).paths
    if paths != "output":
        raise UserValueError(
            f"Expected the head at {slot.name!r} to be frozen with 'output' paths to be an MLP again, but got "
            f"{paths!r} paths, which no MLP equals once they are trained."
        )


def freeze_in_fit(trainer: Any, slot: HeadSlot, *, paths: Paths, freeze_epoch: int) -> None:
    """Freeze the head in a slot, and let the optimizers and the strategy of the fit follow."""
    follow_in_fit(trainer, freeze_in_place(slot.module, paths=paths, freeze_epoch=freeze_epoch))


def follow_in_fit(trainer: Any, head: GLAIHead) -> None:
    """Let the optimizers and the strategy of a fit follow a head that was just frozen."""
    for optimizer in trainer.optimizers:
        replace_parameters(optimizer, head)
    rewrap(trainer)


def unfreeze_in_fit(
    trainer: Any, slot: HeadSlot, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, dict[str, Any]]
) -> None:
    """Make the frozen head in a slot an MLP again, and let the optimizers and the strategy of the fit follow.

    Args:
        trainer: the Trainer of the fit.
        slot: the place of the frozen head.
        weights: state dict of the MLP to go back to.
        optimizer_state: what ``copy_state`` copied of it.
    """
    head = frozen_head(slot)
    for optimizer in trainer.optimizers:
        restore_parameters(optimizer, head, partial(unfreeze_in_place, head, weights), optimizer_state)
    rewrap(trainer)


def load_as_mlp(slot: HeadSlot, deferred: bool) -> None:
    """Let the module load a state dict from either side of the freeze.

    Args:
        slot: the place of the head.
        deferred: whether a frozen head is loaded as an MLP until ``restore_in_fit``, so that the module's own
            ``configure_optimizers`` meets the head that it was written for.
    """
    HeadRestorer.of(slot.pl_module, slot.name).deferred = deferred


def restore_in_fit(trainer: Any, slot: HeadSlot) -> None:
    """Freeze the head in a slot again, if it was loaded as an MLP from a checkpoint in which it is frozen."""
    restorer = HeadRestorer.of(slot.pl_module, slot.name)
    restorer.deferred = False
    if restorer.pending:
        follow_in_fit(trainer, restorer.restore(slot.pl_module))


def rewrap(trainer: Any) -> None:
    """Build the DistributedDataParallel wrapper again, if there is one.

    DDP reduces the gradients of the parameters that it found when it was built, and waits for all of them
    (pytorch#12603): without this, new parameters diverge between ranks in silence.
    """
    strategy = trainer.strategy
    if hasattr(strategy, "configure_ddp"):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
