"""Reading a checkpoint that may come from anywhere: nothing in it is executed, and what is wrong with it is said."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from glai_lightning.checks import UserValueError

#: What a checkpoint of Lightning holds, if it holds it, and of which type.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "state_dict": Mapping,
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": (Mapping, type(None)),
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": Mapping,
}
_REQUIRED = ("state_dict", "pytorch-lightning_version")

#: What Python's and torch's unpicklers raise on bytes that are no pickle.
_NO_PICKLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)


def check_checkpoint(path: str | PathLike[str]) -> None:
    """Check that a file is a checkpoint of Lightning, which ``weights_only=True`` can read.

    Args:
        path: a local file. Tensors in it are mapped, not read.

    Raises:
        ValueError: if it is no checkpoint, is cut short or damaged, holds anything but tensors and primitives, or lacks
            what every checkpoint holds.
    """
    if not zipfile.is_zipfile(path):
        raise UserValueError(f"Expected '{path}' to be a checkpoint, but it is none, or is cut short.")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _NO_PICKLE as error:
        raise UserValueError(
            f"Expected '{path}' to be a checkpoint of tensors and primitives, but it cannot be read as one: "
            f"{_first_sentence(error)}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UserValueError(f"Expected '{path}' to be a checkpoint, but it holds a `{type(checkpoint).__name__}`.")
    missing = [name for name in _REQUIRED if name not in checkpoint]
    if missing:
        raise UserValueError(
            f"Expected '{path}' to be a checkpoint of Lightning, but it lacks `{'` and `'.join(missing)}`."
        )
    for name, kind in _ENTRIES.items():
        if name in checkpoint and (not isinstance(checkpoint[name], kind) or isinstance(checkpoint[name], bool)):
            raise UserValueError(
                f"Expected `{name}` in '{path}' to be what Lightning saves under that name, "
                f"but got a `{type(checkpoint[name]).__name__}`."
            )


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
