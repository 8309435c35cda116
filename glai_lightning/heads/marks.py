"""The mark of a frozen head: what the metadata of its state dict says of it, and how that is read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from glai_lightning.checks import UserValueError
from glai_lightning.heads.paths import Paths

#: Where the mark stands in the metadata of a state dict, which ``weights_only`` loading keeps.
MARK = "glai"


@dataclass(frozen=True)
class FreezeMark:
    """What a state dict says of a frozen head.

    Args:
        paths: what stayed trainable.
        freeze_epoch: the first epoch (0-based) that trained frozen, or ``None`` where it was not frozen in a fit.

    Example:
        >>> FreezeMark("output", 3).to_metadata()
        {'paths': 'output', 'epoch': 3}
    """

    paths: Paths
    freeze_epoch: int | None

    def to_metadata(self) -> dict[str, Any]:
        """Return the mark in primitives."""
        return {"paths": self.paths, "epoch": -1 if self.freeze_epoch is None else self.freeze_epoch}

    @classmethod
    def from_metadata(cls, mark: object) -> "FreezeMark":
        """Read a mark; it may come from any file.

        Raises:
            ValueError: if it is not a mark.
        """
        paths, epoch = (mark.get("paths"), mark.get("epoch")) if isinstance(mark, Mapping) else (None, None)
        if paths not in get_args(Paths) or not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < -1:
            raise UserValueError(
                "Expected the mark of a frozen head in the state dict to hold `paths`, one of 'output', 'tangent' and "
                f"'independent', and `epoch`, an integer of at least -1, but got {mark!r}."
            )
        return cls(cast(Paths, paths), None if epoch < 0 else epoch)
