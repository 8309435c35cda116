"""What a frozen head does otherwise than the head that it was: one mixin for each kind of paths.

A freeze swaps the class of a head for one that derives from a mixin of this file, from the head's own class and from
``GLAIHead``, in this order. The mixins override what ``nn.Module`` calls, and ``forward`` where a formula replaces it.
"""

import copyreg
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from glai_lightning.heads.chain import Chain
from glai_lightning.heads.layout import HeadLayout
from glai_lightning.heads.linearised import check_linearised, linearised_outputs
from glai_lightning.heads.paths import (
    count_path_weights,
    independent_logits,
    joint_gates,
    multiply_along_paths,
    tangent_logits,
)
from glai_lightning.heads.patterns import HiddenUnits, apply_leading, hidden_units, layout_of
from glai_lightning.heads.record import REFERENCE, Paths, find_record, record_of
from glai_lightning.heads.state_dicts import FREEZE_METADATA, FreezeMetadata, check_fits, check_state_dict


def frozen_class(original: type[nn.Module], paths: Paths) -> type[nn.Module]:
    """Return the class of a frozen head that was of another class before; the same object every time."""
    return _CLASSES.get((original, paths)) or _CLASSES.setdefault((original, paths), _make_class(original, paths))


_CLASSES: dict[tuple[type[nn.Module], Paths], type[nn.Module]] = {}


def _make_class(original: type[nn.Module], paths: Paths) -> type[nn.Module]:
    from glai_lightning.heads.frozen import GLAIHead

    def make(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        # A slice of a Sequential is made by its class, and is no frozen head.
        return original(*args, **kwargs)

    namespace = {"__new__": make, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Frozen{original.__name__}", (_KINDS[paths], original, GLAIHead), namespace)


def _new_frozen(original: type[nn.Module], paths: Paths) -> nn.Module:
    """Return an empty frozen head, for ``pickle`` and ``copy`` to fill."""
    head: nn.Module = object.__new__(frozen_class(original, paths))
    return head


class FrozenHead(nn.Module):
    """What the frozen heads of all kinds of paths have in common."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode of everything but the frozen structure, which stays in eval mode."""
        super().train(mode)
        # Modules are made from copies of others before their record is there.
        if find_record(self) is not None:
            for module in layout_of(self).frozen_modules():
                module.eval()
        return self

    def extra_repr(self) -> str:
        """Name the paths in the printed module."""
        own, layout = super().extra_repr(), layout_of(self)
        frozen = f"paths={record_of(self).paths!r}"
        if isinstance(layout.names.chain, Chain):
            frozen += f", num_paths={count_paths(layout)}"
        return f"{own}, {frozen}" if own else frozen

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (function, arguments, *rest)
        record = record_of(self)
        return (_new_frozen, (record.original, record.paths), *rest)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this head, or of the MLP that it was, completely or not at all.

        Args:
            state_dict: entries and, unless it was copied into a plain dict, the metadata of the freeze.
            strict: whether every key must be there, and no other.
            assign: whether to take over the tensors instead of copying them.

        Returns:
            The missing and the unexpected keys.

        Raises:
            TypeError: if ``state_dict`` is not a mapping.
            ValueError: if its keys or metadata are not those of a state dict.
            RuntimeError: if keys or shapes are not those of this head, or it was frozen with other paths.
            In either case the head is as it was.
        """
        check_state_dict(state_dict)
        check_fits(self, state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        record = record_of(self)
        for name, value in record.references.items():
            destination[prefix + REFERENCE + name] = value if keep_vars else value.detach()
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]][FREEZE_METADATA] = FreezeMetadata(record.paths, record.freeze_epoch).to_primitives()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        record = record_of(self)
        if FREEZE_METADATA in local_metadata:
            loaded = FreezeMetadata.from_primitives(local_metadata[FREEZE_METADATA])
            if loaded.paths != record.paths:
                error_msgs.append(
                    f"Expected the state dict of a head frozen with {record.paths!r} paths at '{prefix[:-1]}', "
                    f"but got one frozen with {loaded.paths!r} paths."
                )
                return
            record.freeze_epoch = loaded.freeze_epoch
        else:
            self._glai_expect_mlp(state_dict, prefix)
        for name, own in record.references.items():
            value = state_dict.pop(prefix + REFERENCE + name, None)
            if _fits(value, own):
                own.copy_(value)
            elif strict:
                missing_keys.append(prefix + REFERENCE + name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        record = find_record(self)
        if record is not None:
            record.references = {name: fn(value) for name, value in record.references.items()}
            if record.replaced_output is not None:
                record.replaced_output._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def _glai_freeze(self, layout: HeadLayout) -> None:
        """Stop the gradients of the structure, and make what the paths need."""
        _stop_gradients(layout.structure_parameters())

    def _glai_unfreeze(self) -> None:
        """Undo what ``_glai_freeze`` made."""

    def _glai_expect_mlp(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Turn the entries of a never-frozen MLP into those of this head, where they differ."""


class OutputPaths(FrozenHead):
    """The MLP with its inner layers frozen: its own forward goes on running, and the last Linear training."""


class TangentPaths(FrozenHead):
    """The first-order expansion of the MLP around its weights at the freeze: every weight goes on training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs: (..., D) -> (..., C)."""
        layout, record = layout_of(self), record_of(self)
        if not record.formula:
            return linearised_outputs(layout, record.original.forward.__get__(self), record.references, args, kwargs)
        units, x = hidden_units(layout), apply_leading(layout, *args, **kwargs)
        output = layout.output
        reference = record.references[f"{layout.names.output}.weight"]
        logits = tangent_logits(
            units, reference_units(layout, units, record.references), x, output.weight, reference, output.bias
        )
        return apply_trailing(layout, logits)

    def _glai_freeze(self, layout: HeadLayout) -> None:
        record = record_of(self)
        record.references = {name: self.get_parameter(name).detach().clone() for name in layout.linearised_parameters()}
        if record.formula:
            _stop_gradients([parameter for module in layout.leading for parameter in module.parameters()])
        else:
            check_linearised(self)

    def _glai_expect_mlp(self, state_dict: dict[str, Any], prefix: str) -> None:
        for name in record_of(self).references:
            if prefix + name in state_dict:
                state_dict.setdefault(prefix + REFERENCE + name, state_dict[prefix + name])


class IndependentPathWeights(nn.Module):
    """The trainable part of a head with independent paths, in the place of the MLP's last Linear.

    Args:
        path_weights: weights of the paths that start at an input, (C, P, D).
        path_biases: for each hidden layer the weights of the paths that start at its bias, (C, Hl * ... * HL), or
            ``None``.
        bias: bias of the outputs, (C,), or ``None``.
    """

    def __init__(self, path_weights: Tensor, path_biases: Sequence[Tensor | None], bias: Tensor | None) -> None:
        super().__init__()
        self.path_weights = nn.Parameter(path_weights)
        self.bias: nn.Parameter | None
        for position, path_bias in enumerate(path_biases):
            parameter = None if path_bias is None else nn.Parameter(path_bias)
            self.register_parameter(f"path_biases_{position}", parameter)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.out_features, _, self.in_features = path_weights.shape
        self._num_hidden = len(path_biases)

    @property
    def weight(self) -> nn.Parameter:
        """The path weights, under the name that those of a Linear have."""
        return self.path_weights

    def path_biases(self) -> list[nn.Parameter | None]:
        """Return, for each hidden layer, the weights of the paths that start at its bias."""
        return [getattr(self, f"path_biases_{position}") for position in range(self._num_hidden)]

    def forward(self, joint: Sequence[Tensor], x: Tensor) -> Tensor:
        """Sum the active paths: gates of whole paths and inputs (..., D) -> (..., C)."""
        return independent_logits(joint, x, self.path_weights, self.path_biases(), self.bias)


class IndependentPaths(FrozenHead):
    """The paper's estimator: every path has a weight of its own; the MLP's inner layers only select."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        layout = layout_of(self)
        x = apply_leading(layout, x)
        return apply_trailing(layout, layout.output(joint_gates(hidden_units(layout), x), x))

    def _glai_freeze(self, layout: HeadLayout) -> None:
        output = layout.output
        weights, biases = multiply_along_paths(hidden_units(layout), output.weight)
        bias = None if output.bias is None else output.bias.detach().clone()
        self.set_submodule(layout.names.output, IndependentPathWeights(weights, biases, bias))
        record_of(self).replaced_output = output
        super()._glai_freeze(layout)

    def _glai_unfreeze(self) -> None:
        record = record_of(self)
        assert record.replaced_output is not None
        self.set_submodule(record.names.output, record.replaced_output)

    def _glai_expect_mlp(self, state_dict: dict[str, Any], prefix: str) -> None:
        record = record_of(self)
        output = f"{prefix}{record.names.output}"
        assert record.replaced_output is not None
        if not _fits(state_dict.get(f"{output}.weight"), record.replaced_output.weight):
            return
        weight = state_dict.pop(f"{output}.weight")
        weights, biases = multiply_along_paths(_units_from(layout_of(self), state_dict, prefix), weight)
        state_dict[f"{output}.path_weights"] = weights
        for position, bias in enumerate(biases):
            if bias is not None:
                state_dict[f"{output}.path_biases_{position}"] = bias


_KINDS: dict[Paths, type[FrozenHead]] = {
    "output": OutputPaths,
    "tangent": TangentPaths,
    "independent": IndependentPaths,
}


def apply_trailing(layout: HeadLayout, logits: Tensor) -> Tensor:
    """Apply what comes after the last Linear: (..., C) -> (..., C)."""
    for module in layout.trailing:
        logits = module(logits)
    return logits


def count_paths(layout: HeadLayout) -> int:
    """Count the paths of a head, those that start at a bias included."""
    return count_path_weights(layout.widths, has_hidden_bias(layout), layout.output.bias is not None)


def has_hidden_bias(layout: HeadLayout) -> list[bool]:
    """Tell for each hidden layer whether paths start at its bias, or at that of its BatchNorm."""
    return [units.bias is not None or units.running_mean is not None for units in hidden_units(layout)]


def reference_units(
    layout: HeadLayout, units: Sequence[HiddenUnits], references: Mapping[str, Tensor]
) -> list[HiddenUnits]:
    """Return hidden layers with the weights that they had at the freeze."""
    return [
        layer.with_tensors({field: references[name] for field, name in names.items() if name in references})
        for layer, names in zip(units, _unit_names(layout), strict=True)
    ]


def _unit_names(layout: HeadLayout) -> list[dict[str, str]]:
    """Return for each hidden layer the names of the tensors that tangent paths train, by the fields of its units."""
    names = []
    for layer in layout.chain.hidden:
        names.append({"weight": f"{layer.linear}.weight", "bias": f"{layer.linear}.bias"})
        if layer.norm is not None:
            names[-1] |= {"norm_weight": f"{layer.norm}.weight", "norm_bias": f"{layer.norm}.bias"}
    return names


def _stop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def _units_from(layout: HeadLayout, state_dict: Mapping[str, Any], prefix: str) -> list[HiddenUnits]:
    """Return the hidden layers with the numbers of a state dict; entries of other shapes are left to torch."""
    units = []
    for layer, entries, current in zip(layout.chain.hidden, _unit_names(layout), hidden_units(layout), strict=True):
        if layer.norm is not None:
            entries |= {"running_mean": f"{layer.norm}.running_mean", "running_var": f"{layer.norm}.running_var"}
        found = {field: state_dict.get(prefix + key) for field, key in entries.items()}
        own = current.tensors()
        units.append(
            current.with_tensors({field: value for field, value in found.items() if _fits(value, own.get(field))})
        )
    return units


def _fits(entry: object, own: Tensor | None) -> TypeGuard[Tensor]:
    return isinstance(entry, Tensor) and isinstance(own, Tensor) and entry.shape == own.shape
