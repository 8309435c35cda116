"""Freezing in projects that build their own Trainer: Lightning asks here for callbacks whenever one is built."""

import os
from typing import Any

#: Environment variable that names heads as the argument ``head`` of ``StructureFreezeCallback`` does, split by commas.
VARIABLE = "GLAI_FREEZE"


def callbacks_from_environment() -> list[Any]:
    """Return the callback for the heads that ``GLAI_FREEZE`` names; none where it is unset or empty.

    Lightning calls it for every Trainer, by the entry points ``lightning.pytorch.callbacks_factory`` and
    ``pytorch_lightning.callbacks_factory``.

    Returns:
        A list of one callback, or of none.

    Raises:
        MisconfigurationException: if the variable names no head between two commas.

    Example:
        >>> callbacks_from_environment()
        []
    """
    value = os.environ.get(VARIABLE, "")
    if not value:
        return []
    # Callbacks are imported only where they are asked for.
    from glai_lightning.callbacks.freeze_by_name import FreezeByName

    return [FreezeByName(VARIABLE, value)]
