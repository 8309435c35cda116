"""The record that a frozen head carries: what it was, and what is frozen."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from glai_lightning.heads.layout import HeadNames

#: What stays trainable of a head once its structure is frozen.
Paths = Literal["output", "tangent", "independent"]

#: What stands before the names of the weights at the freeze in a state dict.
REFERENCE = "freeze_reference."

#: Name of the record among the attributes of a frozen head; a user's own class has no such name.
_ATTRIBUTE = "_glai_record"


@dataclass
class FreezeRecord:
    """What is remembered of a head from its freeze on.

    Args:
        original: the class of the head before the freeze.
        paths: what stays trainable.
        names: where the steps of its forward stand in it.
        freeze_epoch: the first epoch (0-based) that trained frozen, or ``None`` where it was not frozen in a fit.
        was_trainable: names of the parameters that required gradients before the freeze.
        formula: whether a formula takes the place of the head's forward: that of an MLP's tangent or independent paths.
        references: the weights at the freeze, by the names of those that are trained; tangent paths only. They are
            neither parameters, so that a module with a frozen head has the parameters of one without, nor buffers,
            which DistributedDataParallel broadcasts before every forward.
        replaced_output: the last Linear; independent paths only, which stand in its place.
    """

    original: type[nn.Module]
    paths: Paths
    names: HeadNames
    freeze_epoch: int | None
    was_trainable: tuple[str, ...]
    formula: bool = False
    references: dict[str, Tensor] = field(default_factory=dict)
    replaced_output: nn.Linear | None = None


def find_record(head: nn.Module) -> FreezeRecord | None:
    """Return the record of a frozen head, ``None`` for any other module."""
    # Whatever a user takes for a head is asked.
    record = getattr(head, "__dict__", {}).get(_ATTRIBUTE)
    return record if isinstance(record, FreezeRecord) else None


def record_of(head: nn.Module) -> FreezeRecord:
    """Return the record of a head that is known to be frozen."""
    record: FreezeRecord = head.__dict__[_ATTRIBUTE]
    return record


def set_record(head: nn.Module, record: FreezeRecord | None) -> None:
    """Give a head its record, or take it away."""
    if record is None:
        head.__dict__.pop(_ATTRIBUTE, None)
    else:
        head.__dict__[_ATTRIBUTE] = record
