"""Adding a ``StructureFreezeCallback`` to Trainers that a program builds itself, for heads named outside of it."""

from typing import Any

from lightning.pytorch import Callback

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.fitting.messages import say
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


class FreezeByName(Callback):
    """Adds a ``StructureFreezeCallback`` to a Trainer that has none, at the start of what it runs.

    It has no state, so that a Trainer may hold several: Lightning adds to the very list that a program gave to one
    Trainer, and may give to the next.

    Args:
        variable: where the names come from, for messages.
        value: names of heads, or patterns, split by commas.

    Raises:
        MisconfigurationException: if one is empty.
    """

    def __init__(self, variable: str, value: str) -> None:
        super().__init__()
        names = [name.strip() for name in value.split(",")]
        if not all(names):
            raise UserMisconfigurationError(
                f"Expected `{variable}` to name heads, split by commas, such as 'head' or 'heads.*', but got {value!r}."
            )
        self.variable = variable
        self.head: str | list[str] = names[0] if len(names) == 1 else names

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the callback in the place of this one, and of others like it."""
        if self not in trainer.callbacks:
            return
        others = [one for one in trainer.callbacks if not isinstance(one, FreezeByName)]
        own = next((one for one in others if isinstance(one, StructureFreezeCallback)), None)
        freeze = own or StructureFreezeCallback(self.head)
        # A new list: Lightning goes through the old one meanwhile.
        place = trainer.callbacks.index(self)
        trainer.callbacks = others
        if own is not None:
            say(f"`{self.variable}` is not heeded: the Trainer has a `StructureFreezeCallback` of its own.")
            return
        say(f"`{self.variable}` adds `StructureFreezeCallback({self.head!r})` to the Trainer.")
        trainer.callbacks.insert(place, freeze)
        freeze.setup(trainer, pl_module, stage)
