"""Loading a checkpoint of frozen heads into a module that knows nothing of them, without a Trainer."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.frozen import GLAIHead, check_freezable
from glai_lightning.heads.joined import JoinedHead, head_at
from glai_lightning.heads.restoring import HeadRestorer
from glai_lightning.heads.state_dicts import (
    FREEZE_METADATA,
    FreezeMetadata,
    check_fits,
    check_state_dict,
    read_freeze,
)
from glai_lightning.modules.checkpoint_file import check_checkpoint

_M = TypeVar("_M", bound=nn.Module)


def load_frozen(module: _M, path: str | PathLike[str], *, weights_only: bool = True) -> _M:
    """Load a checkpoint of a fit that froze heads into a module that was made anew, whatever its class.

    The checkpoint says which heads were frozen, with which paths. These are frozen in place before the weights are
    read, all of them as ``strict_loading`` of the module says. A checkpoint without a frozen head is loaded as it is.

    Args:
        module: a LightningModule, or any module, of the class and the sizes of the one that was fitted.
        path: a local checkpoint of Lightning.
        weights_only: ``False`` executes what a checkpoint holds; for files that you trust. Some projects keep objects
            of their own among the hyper-parameters, which nothing else can read.

    Returns:
        ``module``, whose frozen heads are ``GLAIHead``. It goes on to load checkpoints from either side of the freeze.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if there is no such file, it is not a checkpoint or holds more than tensors and primitives, or a
            head in it is none of the module's, or cannot be frozen there.
        RuntimeError: if keys or shapes are not those of the module. It is as it was after every error.

    Example:
        >>> import tempfile
        >>> from glai_lightning import SupervisedModule, load_frozen, mlp_head
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_frozen(SupervisedModule(mlp_head(4, 8, 3)), f"{folder}/last.ckpt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        glai_lightning.checks.UserValueError: Expected `path` to be a checkpoint, but there is no file '...last.ckpt'.
    """
    if not isinstance(module, nn.Module):
        raise UserTypeError(f"Expected `module` to be a module, but got {module!r}.")
    if not os.path.isfile(path):
        raise UserValueError(f"Expected `path` to be a checkpoint, but there is no file '{path}'.")
    checkpoint = check_checkpoint(path, weights_only=weights_only)
    check_state_dict(checkpoint["state_dict"])
    freezes = _freezes_in(checkpoint)
    heads = {name: _head_in(module, name) for name in freezes}
    on_load_checkpoint: Any = getattr(module, "on_load_checkpoint", None)
    if on_load_checkpoint is not None:
        on_load_checkpoint(checkpoint)
    state_dict, strict = _described(checkpoint["state_dict"], freezes), getattr(module, "strict_loading", True)
    alone = {name: head for name, head in heads.items() if not isinstance(head, JoinedHead)}
    check_fits(module, state_dict, strict=strict, heads=alone)
    for name, head in heads.items():
        if not isinstance(head, GLAIHead):
            check_freezable(head, paths=freezes[name].paths)
    for name in heads:
        HeadRestorer.of(module, name).deferred = False
    module.load_state_dict(state_dict, strict=strict)
    return module


def _freezes_in(checkpoint: Mapping[str, Any]) -> dict[str, FreezeMetadata]:
    """Return what a checkpoint says of the heads that are frozen in it, by their names."""
    state_dict = checkpoint["state_dict"]
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        read = {name: read_freeze(state_dict, name) for name, entry in metadata.items() if FREEZE_METADATA in entry}
        return {name: freeze for name, freeze in read.items() if freeze is not None}
    # Projects that save a part of their state dict copy the entries into a plain one. Output paths add none to it.
    freezes: dict[str, FreezeMetadata] = {}
    for state in checkpoint.get("callbacks", {}).values():
        heads = state.get("heads") if isinstance(state, Mapping) else None
        watched: Mapping[Any, Any] = heads if isinstance(heads, Mapping) else {}
        for name, watch in watched.items():
            if isinstance(watch, Mapping) and watch.get("frozen") is True:
                freezes[str(name)] = read_freeze(state_dict, name) or FreezeMetadata(
                    "output", watch.get("freeze_epoch")
                )
    return freezes


def _described(state_dict: Mapping[str, Any], freezes: Mapping[str, FreezeMetadata]) -> Mapping[str, Any]:
    """Return a state dict with the metadata that it would have had of frozen heads."""
    described: Any = OrderedDict(state_dict)
    metadata = getattr(state_dict, "_metadata", {})
    frozen = {name: {FREEZE_METADATA: freeze.to_primitives()} for name, freeze in freezes.items()}
    described._metadata = {**metadata, **{name: metadata.get(name, {}) | entry for name, entry in frozen.items()}}
    return described  # type: ignore[no-any-return]


def _head_in(module: nn.Module, name: str) -> nn.Module:
    try:
        return head_at(module, name)
    except AttributeError as error:
        raise UserValueError(
            f"Expected a module with the head {name!r} that is frozen in the checkpoint, but `{type(module).__name__}` "
            "has none of that name."
        ) from error
