"""State dicts across the freeze: what they say of a frozen head, and loading them completely or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from glai_lightning.checks import UserError, UserTypeError, UserValueError
from glai_lightning.heads.patterns import hidden_units, layout_of
from glai_lightning.heads.record import REFERENCE, Paths, find_record

#: Where the metadata of a state dict, which ``weights_only`` loading keeps, says that a head is frozen.
FREEZE_METADATA = "glai"

Shapes = dict[str, torch.Size]


class StateDictError(UserError, RuntimeError):
    """A state dict whose keys or shapes are not those of the module; of the type that torch raises for it."""


@dataclass(frozen=True)
class FreezeMetadata:
    """What a state dict says of a frozen head.

    Args:
        paths: what stayed trainable.
        freeze_epoch: the first epoch (0-based) that trained frozen, or ``None`` where it was not frozen in a fit.

    Example:
        >>> FreezeMetadata("output", 3).to_primitives()
        {'paths': 'output', 'epoch': 3}
    """

    paths: Paths
    freeze_epoch: int | None

    def to_primitives(self) -> dict[str, Any]:
        """Return the metadata in primitives."""
        return {"paths": self.paths, "epoch": -1 if self.freeze_epoch is None else self.freeze_epoch}

    @classmethod
    def from_primitives(cls, entry: object) -> "FreezeMetadata":
        """Read the metadata, which may come from any file.

        Raises:
            ValueError: if it is not that of a frozen head.
        """
        paths, epoch = (entry.get("paths"), entry.get("epoch")) if isinstance(entry, Mapping) else (None, None)
        if paths not in get_args(Paths) or not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < -1:
            raise UserValueError(
                "Expected the metadata of a frozen head in the state dict to hold `paths`, one of 'output', 'tangent' "
                f"and 'independent', and `epoch`, an integer of at least -1, but got {entry!r}."
            )
        return cls(cast(Paths, paths), None if epoch < 0 else epoch)


def read_freeze(state_dict: Mapping[str, Any], head_name: str) -> FreezeMetadata | None:
    """Read from a state dict whether the head in it was frozen.

    Args:
        state_dict: the state dict of a module that holds the head, as ``state_dict()`` or ``torch.load`` return it.
        head_name: qualified name of the head in that module, '' if it is the module itself.

    Returns:
        What the state dict says of the freeze, or ``None`` for an MLP.

    Raises:
        TypeError: if ``state_dict`` is not a mapping.
        ValueError: if its keys or its metadata are not those of a state dict.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> read_freeze(freeze_structure(mlp_head(4, 8, 3)).state_dict(), "")
        FreezeMetadata(paths='output', freeze_epoch=None)
    """
    check_state_dict(state_dict)
    metadata = (getattr(state_dict, "_metadata", None) or {}).get(head_name, {})
    if FREEZE_METADATA in metadata:
        return FreezeMetadata.from_primitives(metadata[FREEZE_METADATA])
    # Metadata is lost where entries were copied into a plain dict; output paths then load as the MLP that they are.
    prefix = f"{head_name}." if head_name else ""
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    if any(name.split(".")[-1] == "path_weights" for name in names):
        return FreezeMetadata("independent", None)
    return FreezeMetadata("tangent", None) if any(name.startswith(REFERENCE) for name in names) else None


def check_state_dict(state_dict: object) -> None:
    """Check that something is built like a state dict; it may come from any file.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if its keys or its metadata are not those of a state dict.
    """
    if not isinstance(state_dict, Mapping):
        raise UserTypeError(f"Expected the state dict to be a mapping, but got `{type(state_dict).__name__}`.")
    wrong = [key for key in state_dict if not isinstance(key, str)]
    if wrong:
        raise UserValueError(f"Expected the keys of the state dict to be strings, but got {wrong}.")
    metadata: Any = getattr(state_dict, "_metadata", None)
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(isinstance(entry, Mapping) for entry in metadata.values()):
        raise UserValueError(
            f"Expected the metadata of the state dict to be a mapping for every module, but got {metadata!r}."
        )
    for name, entry in metadata.items():
        version = entry.get("version")
        if not isinstance(version, int | None):
            raise UserValueError(
                f"Expected the version of '{name}' in the metadata of the state dict to be an integer, "
                f"but got {version!r}."
            )


def check_fits(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
    heads: Mapping[str, nn.Module] | None = None,
) -> None:
    """Check that a module can load a state dict, from either side of the freeze, before any of it is read.

    Args:
        module: the module that is to load it.
        state_dict: entries and metadata.
        strict: whether every key must be there, and no other.
        heads: modules in ``module``, by their qualified names, that may be frozen in the state dict; by default the
            frozen heads in it.

    Raises:
        RuntimeError: if keys or shapes do not fit, or a head was frozen with other paths than the head in ``module``.
    """
    shapes = _shapes_of(module.state_dict())
    if heads is None:
        heads = {name: child for name, child in module.named_modules() if find_record(child) is not None}
    for name, head in heads.items():
        prefix = f"{name}." if name else ""
        own = _head_shapes(head, _read_paths(head, name, state_dict))
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}
        shapes |= {prefix + key: shape for key, shape in own.items()}
    _check_shapes(f"a `{type(module).__name__}` like this one", state_dict, shapes, strict=strict)


def check_head_fits(head: nn.Module, name: str, state_dict: Mapping[str, Any]) -> FreezeMetadata | None:
    """Check that a head can load its part of a state dict, all of it where it was frozen.

    Args:
        head: the head that is to load it.
        name: qualified name of the head in the state dict.
        state_dict: entries and metadata of a module that holds the head.

    Returns:
        What the state dict says of the freeze, or ``None`` for an MLP.

    Raises:
        RuntimeError: if keys or shapes do not fit, or it was frozen with other paths than ``head``.
    """
    paths = _read_paths(head, name, state_dict)
    part = {key.removeprefix(f"{name}."): value for key, value in state_dict.items() if key.startswith(f"{name}.")}
    _check_shapes(f"a head like that at '{name}'", part, _head_shapes(head, paths), strict=paths is not None)
    return read_freeze(state_dict, name)


def _read_paths(head: nn.Module, name: str, state_dict: Mapping[str, Any]) -> Paths | None:
    freeze, record = read_freeze(state_dict, name), find_record(head)
    if freeze is not None and record is not None and freeze.paths != record.paths:
        raise StateDictError(
            f"Expected the state dict of a head frozen with {record.paths!r} paths at '{name}', "
            f"but got one frozen with {freeze.paths!r} paths."
        )
    return None if freeze is None else freeze.paths


def _check_shapes(what: str, state_dict: Mapping[str, Any], shapes: Shapes, *, strict: bool) -> None:
    extra = [key for key in state_dict if key not in shapes and not key.endswith("_extra_state")]
    wrong = [f"it lacks `{key}`" for key in shapes if key not in state_dict] if strict else []
    wrong += [f"it also holds `{key}`" for key in extra] if strict else []
    wrong += [
        f"it holds {_describe(state_dict[key])} as `{key}` instead of a tensor of shape {tuple(shape)}"
        for key, shape in shapes.items()
        if key in state_dict and not (isinstance(state_dict[key], Tensor) and state_dict[key].shape == shape)
    ]
    if wrong:
        more = [f"there are {len(wrong) - 4} more such entries"] if len(wrong) > 4 else []
        raise StateDictError(f"Expected the state dict of {what}, but {', and '.join(wrong[:4] + more)}.")


def _head_shapes(head: nn.Module, paths: Paths | None) -> Shapes:
    """Return what the state dict of a head holds once it is frozen, or, for ``None``, while it is an MLP."""
    shapes = _shapes_of(head.state_dict())
    record = find_record(head)
    held = None if record is None else record.paths
    if held == paths or {held, paths} == {None, "output"}:
        return shapes
    layout = layout_of(head)
    output = layout.names.output
    if record is not None:
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith(REFERENCE)}
        if record.replaced_output is not None:
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith(f"{output}.")}
            replaced = _shapes_of(record.replaced_output.state_dict())
            shapes |= {f"{output}.{key}": shape for key, shape in replaced.items()}
        return shapes
    if paths == "tangent":
        return shapes | {f"{REFERENCE}{name}": shapes[name] for name in layout.linearised_parameters()}
    num_outputs, units = shapes[f"{output}.weight"][0], hidden_units(layout)
    del shapes[f"{output}.weight"]
    joint = 1
    for position in range(len(units) - 1, -1, -1):
        joint *= len(units[position].weight)
        if units[position].bias is not None or units[position].running_mean is not None:
            shapes[f"{output}.path_biases_{position}"] = torch.Size([num_outputs, joint])
    shapes[f"{output}.path_weights"] = torch.Size([num_outputs, joint, units[0].weight.shape[1]])
    return shapes


def _shapes_of(state: Mapping[str, Any]) -> Shapes:
    # What is lazy has no shape yet.
    return {key: value.shape for key, value in state.items() if isinstance(value, Tensor) and not is_lazy(value)}


def _describe(entry: object) -> str:
    return f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"`{type(entry).__name__}`"
