"""The check of what a callback finds under its name in a checkpoint, which may come from any file."""

from collections.abc import Mapping
from typing import Any

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


def check_state(state: object, kinds: Mapping[str, Any], holder: str) -> None:
    """Check that a restored state holds what was saved; entries that nobody asks for are left alone.

    ``weights_only=True`` has made sure that it holds tensors and primitives alone.

    Args:
        state: what the checkpoint holds.
        kinds: type or union of types of each entry, by its name.
        holder: whose state it is, in words.

    Raises:
        MisconfigurationException: if it is not a mapping, lacks an entry, or holds one of another type.

    Example:
        >>> check_state({"epochs": [], "best": None}, {"epochs": list, "best": float | None}, "the report")
    """
    if not isinstance(state, Mapping):
        raise UserMisconfigurationError(
            f"Expected the state of {holder} in the checkpoint to be a mapping, but got `{type(state).__name__}`."
        )
    for name, kind in kinds.items():
        if name not in state or not isinstance(state[name], kind):
            got = f"{state[name]!r:.80}" if name in state else "none"
            raise UserMisconfigurationError(
                f"Expected the state of {holder} in the checkpoint to hold `{name}`, "
                f"`{getattr(kind, '__name__', kind)}`, but got {got}."
            )
