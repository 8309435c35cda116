"""Reading a checkpoint that may come from anywhere: nothing in it is executed, and what is wrong with it is said."""

import pickle
import struct
import zipfile
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserValueError
from glai_lightning.modules.description import build

#: Under which name a checkpoint of our modules holds what they are made of.
DESCRIPTION = "glai_lightning"
#: Of that description; another version describes other things, or otherwise.
VERSION = 1

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
    DESCRIPTION: Mapping,
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


def check_checkpoint(path: str | PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Check that a file is a checkpoint of Lightning.

    Args:
        path: a local file. Tensors in it are mapped, not read.
        weights_only: ``False`` executes what the file holds, beside tensors and primitives.

    Returns:
        What it holds.

    Raises:
        ValueError: if it is no checkpoint, is cut short or damaged, holds anything but tensors and primitives, or lacks
            what every checkpoint holds.
    """
    if not zipfile.is_zipfile(path):
        raise UserValueError(f"Expected '{path}' to be a checkpoint, but it is none, or is cut short.")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except _NO_PICKLE as error:
        raise UserValueError(
            f"Expected '{path}' to be a checkpoint of tensors and primitives, but it cannot be read as one: "
            f"{_first_sentence(error)}"
        ) from error
    if not isinstance(checkpoint, dict):
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
    version = checkpoint.get(DESCRIPTION, {}).get("version", VERSION)
    if version != VERSION:
        raise UserValueError(
            f"Expected '{path}' to describe its module in version {VERSION}, but got version {version!r}: use the "
            "version of glai-lightning that wrote it, or a later one."
        )
    return checkpoint


def described_modules(path: str | PathLike[str], names: Collection[str]) -> dict[str, nn.Module | None]:
    """Make the head and the backbone that a checkpoint describes.

    Args:
        path: a local file that ``check_checkpoint`` has checked.
        names: which of the two are needed.

    Returns:
        The modules by name, with weights of their own; no ``backbone`` where there was none.

    Raises:
        ValueError: if one of them is not described, or takes more memory than its weights in the file.
    """
    checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    described = checkpoint.get(DESCRIPTION, {})
    numbers = sum(entry.numel() for entry in checkpoint["state_dict"].values() if isinstance(entry, Tensor))
    modules: dict[str, nn.Module | None] = {}
    for name in names:
        if name == "backbone" and not described.get("has_backbone", False):
            continue
        if described.get(name) is None:
            raise UserValueError(
                f"Expected `{name}` to be given for '{path}', which does not describe it, but got none. A checkpoint "
                "describes what is made of layers of `torch.nn`, and what comes from this package."
            )
        modules[name] = build(described[name], most_numbers=numbers)
    return modules


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
