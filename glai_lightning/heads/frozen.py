"""Heads: the MLP to start from, and the heads with a frozen structure that it becomes."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice, expect_integer, expect_number
from glai_lightning.heads.compilation import compile_like
from glai_lightning.heads.layout import HeadLayout, read_head
from glai_lightning.heads.loading import check_state_dict, unchanged_on_error
from glai_lightning.heads.marks import MARK, FreezeMark
from glai_lightning.heads.paths import (
    Paths as Paths,
)
from glai_lightning.heads.paths import (
    count_path_weights,
    independent_logits,
    joint_gates,
    multiply_along_paths,
    path_features,
    tangent_logits,
)
from glai_lightning.heads.patterns import HiddenUnits, apply_leading, evaluating, hidden_units, patterns_of

#: Independent path weights beyond which a head is refused: 40 MB of float32, and as much for each optimizer state.
MAX_PATHS = 10_000_000


def mlp_head(
    in_features: int,
    hidden_features: int | Sequence[int],
    out_features: int,
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build an MLP head: Linear, BatchNorm1d, ReLU, Dropout for every hidden layer, then a Linear.

    Args:
        in_features: width D of the inputs, at least 1.
        hidden_features: units of the hidden layer, or of each hidden layer from input to output, each at least 1.
        out_features: number C of outputs, at least 1.
        batch_norm: whether a BatchNorm1d stands between each hidden Linear and its ReLU.
        dropout: probability of dropping a hidden activation, in [0, 1); no Dropout modules at 0.

    Returns:
        A head from (batch, D) to (batch, C).

    Raises:
        TypeError: if a size is not an integer, or ``dropout`` not a number.
        ValueError: if a size is below 1, there is no hidden layer, or ``dropout`` is out of range.

    Example:
        >>> mlp_head(4, 8, 3)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=3, bias=True)
        )
    """
    hidden = list(hidden_features) if isinstance(hidden_features, Sequence) else [hidden_features]
    for name, size in (
        ("in_features", in_features),
        *(("hidden_features", width) for width in hidden),
        ("out_features", out_features),
    ):
        expect_integer(name, size)
    expect_number("dropout", dropout)
    if not hidden:
        raise UserValueError("Expected `hidden_features` to name at least one hidden layer, but got none.")
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise UserValueError(f"Expected `{name}` to be at least 1, but got {size}.")
    if min(hidden) < 1:
        raise UserValueError(f"Expected `hidden_features` to be at least 1, but got {hidden_features}.")
    if not 0.0 <= dropout < 1.0:
        raise UserValueError(f"Expected `dropout` to be in [0, 1), but got {dropout}.")
    modules: list[nn.Module] = []
    for before, width in itertools.pairwise([in_features, *hidden]):
        modules.append(nn.Linear(before, width))
        if batch_norm:
            modules.append(nn.BatchNorm1d(width))
        modules.append(nn.ReLU())
        if dropout > 0.0:
            modules.append(nn.Dropout(dropout))
    return nn.Sequential(*modules, nn.Linear(hidden[-1], out_features))


class GLAIHead(nn.Module):
    """A head whose structure is frozen: which units fire for which input no longer changes, only the numbers do.

    Made by ``freeze_structure`` (from a copy) or ``GLAIHead.adopt`` (from the very modules of an MLP head). It answers
    to the names and indices of the head that it was: ``head[0]``, ``head.layers``. BatchNorm inside counts with its
    running statistics whatever the mode, and Dropout inside is gone.

    Its state dict describes itself: a mark in the metadata names the paths and the epoch of the freeze.
    """

    paths: ClassVar[Paths]

    freeze_epoch: int | None

    def __init__(self, mlp: nn.Module, layout: HeadLayout, freeze_epoch: int | None) -> None:
        super().__init__()
        # The head takes the MLP's place in the user's module, so it takes its attributes and hooks too. Hook
        # dictionaries are shared, because the handles that users hold point to them.
        kept = {name: value for name, value in vars(mlp).items() if name not in ("forward", "_compiled_call_impl")}
        self.__dict__.update(kept)
        for registry in ("_parameters", "_buffers", "_modules"):
            self.__dict__[registry] = dict(kept[registry])
        self.__dict__["_layout"] = layout
        self.__dict__["_norms"] = []
        self.__dict__["freeze_epoch"] = freeze_epoch
        self.__dict__["_mlp"] = mlp
        self.__dict__["_was_trainable"] = [p for p in layout.structure_parameters() if p.requires_grad]

    @staticmethod
    def adopt(
        mlp: nn.Module,
        *,
        paths: Paths = "output",
        max_paths: int = MAX_PATHS,
        freeze_epoch: int | None = None,
    ) -> "GLAIHead":
        """Freeze the structure of an MLP head in place: the result holds the very modules and parameters of the MLP.

        Args:
            mlp: the head to convert. Its inner parameters stop requiring gradients; use the result in its place.
            paths: what stays trainable, see ``freeze_structure``.
            max_paths: most independent path weights allowed.
            freeze_epoch: the first epoch (0-based) that trains frozen, kept in the mark of the state dict.

        Returns:
            The frozen head, which computes the same function as ``mlp`` in eval mode.

        Raises:
            TypeError: if ``mlp`` is not a module or frozen already, or a number is not an integer.
            ValueError: if ``mlp`` cannot be read, ``paths`` is unknown, or there are more than ``max_paths`` paths.
            In either case ``mlp`` is as it was.

        Example:
            >>> mlp = mlp_head(4, 8, 3)
            >>> head = GLAIHead.adopt(mlp)
            >>> head[2].weight is mlp[2].weight
            True
        """
        layout = check_convertible(mlp, paths=paths, max_paths=max_paths)
        if freeze_epoch is not None:
            expect_integer("freeze_epoch", freeze_epoch)
            if freeze_epoch < 0:
                raise UserValueError(f"Expected `freeze_epoch` to be at least 0, but got {freeze_epoch}.")
        head = _HEADS[paths](mlp, layout, freeze_epoch)
        head.__dict__["_norms"] = [
            (parent, name, child)
            for parent in head.modules()
            for name, child in parent.named_children()
            if isinstance(child, _BatchNorm) and child in layout.norms()
        ]
        head.train(mlp.training)
        compile_like(head, mlp)
        return head

    @property
    def layout(self) -> HeadLayout:
        """The modules of the head, by the part that they play."""
        # Trainers put SyncBatchNorm in the place of BatchNorm when a fit starts, and new BatchNorm when it ends.
        found = {norm: parent._modules.get(name) for parent, name, norm in self.__dict__["_norms"]}
        replaced = {norm: now for norm, now in found.items() if now is not norm and isinstance(now, _BatchNorm)}
        if replaced:
            self._follow_norms(replaced)
        layout: HeadLayout = self.__dict__["_layout"]
        return layout

    def _follow_norms(self, replaced: dict[_BatchNorm, _BatchNorm]) -> None:
        layout = self.__dict__["_layout"].with_norms(replaced)
        self.__dict__["_layout"] = layout
        for place, (parent, name, norm) in enumerate(self.__dict__["_norms"]):
            self.__dict__["_norms"][place] = (parent, name, replaced.get(norm, norm))
            if parent is self:
                self.__dict__["_mlp"]._modules[name] = replaced.get(norm, norm)
        for module in layout.frozen_modules():
            module.eval()

    @property
    def num_paths(self) -> int:
        """Number of paths from an input or a bias to an output: D H C + H C + C for one hidden layer."""
        return _count_paths(self.layout)

    @property
    def structure(self) -> list[HiddenUnits]:
        """The hidden layers that decide the patterns, as they were at the freeze."""
        return hidden_units(self.layout)

    def patterns(self, x: Tensor) -> list[Tensor]:
        """Return which hidden units fire for which input: the same for ever.

        Args:
            x: inputs (..., D).

        Returns:
            One bool tensor (..., width) for each hidden layer.
        """
        with torch.no_grad(), evaluating(self.layout.leading):
            return patterns_of(self.structure, self._lead(x))

    def path_activations(self, x: Tensor) -> Tensor:
        """Return the features in which the outputs, before any trailing module, are linear.

        Args:
            x: inputs (..., D).

        Returns:
            Features (..., F). Output paths: the last hidden activations, F = HL. The others: the input of every active
            path, materialised, F = P D + the number of paths that start at a hidden bias, where P = H1 * ... * HL.
        """
        x = self._lead(x)
        return path_features(joint_gates(self.structure, x), x, _hidden_bias(self.layout))

    def to_mlp(self) -> nn.Sequential:
        """Return a plain MLP that computes the same outputs, with BatchNorm inside folded.

        Returns:
            Linear and activation for every hidden layer, the last Linear, and copies of the modules before and after;
            copies throughout, all of them trainable.

        Raises:
            ValueError: if the paths are not 'output'. The others have no MLP that equals them once they are trained.

        Example:
            >>> mlp = mlp_head(4, 8, 3)
            >>> x = torch.randn(5, 4)
            >>> torch.equal(freeze_structure(mlp).to_mlp()(x), mlp(x))
            True
        """
        raise UserValueError(f"Expected `paths` to be 'output' to convert back to an MLP, but got {self.paths!r}.")

    def thaw(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return the MLP that was adopted, its inner parameters trainable again, in the place of this head.

        Args:
            weights: state dict of the MLP to go back to; ``None`` for the weights as they are now.

        Returns:
            The very module that was given to ``adopt``.

        Raises:
            ValueError: if the paths are not 'output', see ``to_mlp``, and no weights are given.

        Example:
            >>> mlp = mlp_head(4, 8, 3)
            >>> before = {name: value.clone() for name, value in mlp.state_dict().items()}
            >>> GLAIHead.adopt(mlp, paths="tangent").thaw(before) is mlp
            True
        """
        if weights is None and self.paths != "output":
            raise UserValueError(f"Expected `paths` to be 'output' to thaw the structure, but got {self.paths!r}.")
        mlp: nn.Module = self.__dict__["_mlp"]
        if weights is not None:
            # What independent paths replaced is no part of this head, and was not moved along with it.
            own = next(self.parameters())
            mlp.to(own.device, own.dtype).load_state_dict(weights)
        for parameter in self.__dict__["_was_trainable"]:
            parameter.requires_grad_(True)
        for parameter in mlp.parameters():
            parameter.grad = None
        return mlp.train(self.training)

    def train(self, mode: bool = True) -> "GLAIHead":
        """Set the mode of everything but the frozen structure, which stays in eval mode."""
        super().train(mode)
        for module in self.layout.frozen_modules():
            module.eval()
        return self

    def replaced_parameters(self) -> dict[Tensor, list[nn.Parameter]]:
        """Return which parameters of the MLP were replaced by which new ones, for the optimizer that held them."""
        return {}

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters as an optimizer that held the MLP's goes on to hold them, frozen ones included."""
        frozen = {id(parameter) for parameter in self.frozen_parameters()}
        return [p for p in self.parameters() if p.requires_grad or id(p) in frozen]

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the MLP that are still here and no longer trained."""
        return self.layout.structure_parameters()

    def __getitem__(self, index: int | slice) -> nn.Module:
        children = list(self._modules.values())
        if isinstance(index, slice):
            return nn.Sequential(*(child for child in children[index] if child is not None))
        child = children[index]
        assert child is not None
        return child

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(child for child in self._modules.values() if child is not None)

    def extra_repr(self) -> str:
        """Name the paths in the printed module."""
        return f"paths={self.paths!r}, num_paths={self.num_paths}"

    def _lead(self, x: Tensor) -> Tensor:
        return apply_leading(self.layout, x)

    def _trail(self, logits: Tensor) -> Tensor:
        for module in self.layout.trailing:
            logits = module(logits)
        return logits

    def _freeze(self) -> None:
        for parameter in self.layout.structure_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]][MARK] = FreezeMark(self.paths, self.freeze_epoch).to_metadata()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this head, or of the MLP that it was, as torch does, but completely or not at all.

        Args:
            state_dict: entries and, unless it was copied into a plain dict, the metadata with the mark.
            strict: whether every key must be there, and no other.
            assign: whether to take over the tensors instead of copying them.

        Returns:
            The missing and the unexpected keys.

        Raises:
            TypeError: if ``state_dict`` is not a mapping.
            ValueError: if its keys or metadata are not those of a state dict, or its mark is not one.
            RuntimeError: if keys or shapes are not those of this head, or the mark names other paths.
            In either case the head is as it was.
        """
        check_state_dict(state_dict)
        with unchanged_on_error(self):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

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
        if MARK not in local_metadata:
            self._expect_mlp(state_dict, prefix)
        else:
            mark = FreezeMark.from_metadata(local_metadata[MARK])
            if mark.paths != self.paths:
                error_msgs.append(
                    f"Expected the state dict of a head frozen with {self.paths!r} paths at '{prefix[:-1]}', "
                    f"but got one frozen with {mark.paths!r} paths."
                )
                return
            self.freeze_epoch = mark.freeze_epoch
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _expect_mlp(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Turn the entries of a never-frozen MLP into those of this head, where they differ."""

    def _units_from(self, state_dict: dict[str, Any], prefix: str) -> list[HiddenUnits]:
        names = {module: name for name, module in self.named_modules()}
        units = []
        for layer, current in zip(self.layout.hidden, hidden_units(self.layout), strict=True):
            entries = {"weight": f"{names[layer.linear]}.weight", "bias": f"{names[layer.linear]}.bias"}
            if layer.norm is not None:
                norm = names[layer.norm]
                entries |= {"running_mean": f"{norm}.running_mean", "running_var": f"{norm}.running_var"}
                entries |= {"norm_weight": f"{norm}.weight", "norm_bias": f"{norm}.bias"}
            found = {field: state_dict.get(prefix + key) for field, key in entries.items()}
            own = current.tensors()
            # Entries of other shapes are left to torch, which names them.
            units.append(
                current.with_tensors({field: value for field, value in found.items() if _fits(value, own.get(field))})
            )
        return units


class OutputPathsHead(GLAIHead):
    """The MLP with its inner layers frozen: the same function, keys and indices; the last Linear goes on training."""

    paths = "output"

    def __init__(self, mlp: nn.Module, layout: HeadLayout, freeze_epoch: int | None) -> None:
        super().__init__(mlp, layout, freeze_epoch)
        self._freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        return self._trail(self.layout.output(self.path_activations(x)))

    def path_activations(self, x: Tensor) -> Tensor:
        """Return the activations of the last hidden layer: (..., D) -> (..., HL)."""
        x = self._lead(x)
        for layer, units in zip(self.layout.hidden, hidden_units(self.layout), strict=True):
            x = layer.activation(units.normalise(layer.linear(x)))
        return x

    def to_mlp(self) -> nn.Sequential:
        """Return a plain MLP that computes the same outputs, see ``GLAIHead.to_mlp``."""
        modules = [copy.deepcopy(module) for module in self.layout.leading]
        for layer, units in zip(self.layout.hidden, hidden_units(self.layout), strict=True):
            modules += [_plain_linear(*units.folded()), copy.deepcopy(layer.activation)]
        output = self.layout.output
        modules += [_plain_linear(output.weight, output.bias)]
        mlp = nn.Sequential(*modules, *(copy.deepcopy(module) for module in self.layout.trailing))
        return mlp.train(self.training)


class TangentPathsHead(GLAIHead):
    """The first-order expansion of the MLP around its weights at the freeze: every weight goes on training."""

    paths = "tangent"

    def __init__(self, mlp: nn.Module, layout: HeadLayout, freeze_epoch: int | None) -> None:
        super().__init__(mlp, layout, freeze_epoch)
        # Parameters without gradient, not buffers: DDP broadcasts buffers at every forward.
        for position, units in enumerate(hidden_units(layout)):
            for name, value in _moving_tensors(units).items():
                reference = nn.Parameter(value.detach().clone(), requires_grad=False)
                self.register_parameter(f"reference_{position}_{name}", reference)
        reference = nn.Parameter(layout.output.weight.detach().clone(), requires_grad=False)
        self.register_parameter("reference_output_weight", reference)
        for module in layout.leading:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    @property
    def structure(self) -> list[HiddenUnits]:
        """The hidden layers that decide the patterns, as they were at the freeze."""
        return [
            units.with_tensors(
                {name: self.get_parameter(f"reference_{position}_{name}") for name in _moving_tensors(units)}
            )
            for position, units in enumerate(hidden_units(self.layout))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        output = self.layout.output
        reference = self.get_parameter("reference_output_weight")
        units = hidden_units(self.layout)
        return self._trail(tangent_logits(units, self.structure, self._lead(x), output.weight, reference, output.bias))

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the MLP that are no longer trained: those of leading modules."""
        return [parameter for module in self.layout.leading for parameter in module.parameters()]

    def _expect_mlp(self, state_dict: dict[str, Any], prefix: str) -> None:
        for position, units in enumerate(self._units_from(state_dict, prefix)):
            for name, value in _moving_tensors(units).items():
                state_dict.setdefault(f"{prefix}reference_{position}_{name}", value)
        output = state_dict.get(f"{prefix}{self.layout.output_name}.weight")
        if output is not None:
            state_dict.setdefault(f"{prefix}reference_output_weight", output)


class IndependentPaths(nn.Module):
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
        self.num_hidden = len(path_biases)

    def path_biases(self) -> list[nn.Parameter | None]:
        """Return, for each hidden layer, the weights of the paths that start at its bias."""
        return [getattr(self, f"path_biases_{position}") for position in range(self.num_hidden)]

    def forward(self, joint: Sequence[Tensor], x: Tensor) -> Tensor:
        """Sum the active paths: gates of whole paths and inputs (..., D) -> (..., C)."""
        return independent_logits(joint, x, self.path_weights, self.path_biases(), self.bias)


class IndependentPathsHead(GLAIHead):
    """The paper's estimator: every path has a weight of its own; the MLP's inner layers only select."""

    paths = "independent"

    def __init__(self, mlp: nn.Module, layout: HeadLayout, freeze_epoch: int | None) -> None:
        super().__init__(mlp, layout, freeze_epoch)
        weights, biases = multiply_along_paths(hidden_units(layout), layout.output.weight)
        output_bias = layout.output.bias
        self.__dict__["_paths"] = IndependentPaths(
            weights, biases, None if output_bias is None else output_bias.detach().clone()
        )
        _set_child(self, layout.output_name, self.__dict__["_paths"])
        self._freeze()

    @property
    def independent_paths(self) -> IndependentPaths:
        """The module that holds the path weights, in the place of the MLP's last Linear."""
        module = self.get_submodule(self.layout.output_name)
        assert isinstance(module, IndependentPaths)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        x = self._lead(x)
        return self._trail(self.independent_paths(joint_gates(self.structure, x), x))

    def replaced_parameters(self) -> dict[Tensor, list[nn.Parameter]]:
        """Return what took the place of the last Linear's weight and bias: paths from inputs, paths from biases."""
        paths, output = self.independent_paths, self.layout.output
        biases = [bias for bias in (*paths.path_biases(), paths.bias) if bias is not None]
        if output.bias is None:
            return {output.weight: [paths.path_weights, *biases]}
        return {output.weight: [paths.path_weights], output.bias: biases}

    def _expect_mlp(self, state_dict: dict[str, Any], prefix: str) -> None:
        output = f"{prefix}{self.layout.output_name}"
        if not _fits(state_dict.get(f"{output}.weight"), self.layout.output.weight):
            return
        weight = state_dict.pop(f"{output}.weight")
        weights, biases = multiply_along_paths(self._units_from(state_dict, prefix), weight)
        state_dict[f"{output}.path_weights"] = weights
        for position, bias in enumerate(biases):
            if bias is not None:
                state_dict[f"{output}.path_biases_{position}"] = bias


_HEADS: dict[str, type[GLAIHead]] = {
    "output": OutputPathsHead,
    "tangent": TangentPathsHead,
    "independent": IndependentPathsHead,
}


def freeze_structure(head: nn.Module, *, paths: Paths = "output", max_paths: int = MAX_PATHS) -> GLAIHead:
    """Freeze the structure of an MLP head and return it as an estimator that is linear in what stays trainable.

    In eval mode the result computes what ``head`` computes: bitwise with output paths, up to rounding with the others.

    Args:
        head: an MLP head of any depth with ReLU, LeakyReLU or PReLU of a fixed slope, as ``nn.Sequential`` or as any
            class whose forward is a chain of modules; it is not changed.
        paths: what stays trainable. ``"output"``: the last Linear, H C + C numbers. ``"tangent"``: every weight, to
            first order. ``"independent"``: a weight for every path, D H C + H C + C numbers (the estimator of
            arXiv 2510.00883), meant for narrow heads, see ``matched_hidden_features``.
        max_paths: most independent path weights allowed.

    Returns:
        The frozen head, from (..., D) to (..., C), with the dtype and device of ``head``.

    Raises:
        TypeError: if ``head`` is not a module or frozen already, or ``max_paths`` is not an integer.
        ValueError: if ``head`` cannot be read, ``paths`` is unknown, or there are more than ``max_paths`` paths.

    Example:
        >>> mlp = mlp_head(4, 8, 3)
        >>> head = freeze_structure(mlp)
        >>> x = torch.randn(5, 4)
        >>> torch.equal(head(x), mlp(x)), head.num_paths
        (True, 123)
    """
    return GLAIHead.adopt(copy.deepcopy(head), paths=paths, max_paths=max_paths)


def check_convertible(head: nn.Module, *, paths: str = "output", max_paths: int = MAX_PATHS) -> HeadLayout:
    """Check that the structure of a head can be frozen, and change nothing.

    Args:
        head: the head to convert.
        paths: what is to stay trainable, see ``freeze_structure``.
        max_paths: most independent path weights allowed.

    Returns:
        The layout of the head.

    Raises:
        TypeError: if ``head`` is not a module or frozen already, or ``max_paths`` is not an integer.
        ValueError: if ``head`` cannot be read, ``paths`` is unknown, or there are more than ``max_paths`` paths.
    """
    expect_choice("paths", paths, tuple(_HEADS))
    expect_integer("max_paths", max_paths)
    if not isinstance(head, nn.Module):
        raise UserTypeError(f"Expected the head to be a module, but got {head!r}.")
    if isinstance(head, GLAIHead):
        raise UserTypeError(
            f"Expected the head to be an MLP, but got one whose structure is frozen already ({head.paths} paths)."
        )
    layout = read_head(head)
    num_paths = _count_paths(layout)
    if paths == "independent" and num_paths > max_paths:
        raise UserValueError(
            f"Expected at most {max_paths:,} independent path weights (`max_paths`), but the head has {num_paths:,}. "
            "`matched_hidden_features` gives the width of a head that has as many as an MLP."
        )
    return layout


def _count_paths(layout: HeadLayout) -> int:
    return count_path_weights(layout.widths, _hidden_bias(layout), layout.output.bias is not None)


def _hidden_bias(layout: HeadLayout) -> list[bool]:
    return [layer.linear.bias is not None or layer.norm is not None for layer in layout.hidden]


def _fits(entry: object, own: Tensor | float | None) -> TypeGuard[Tensor]:
    return isinstance(entry, Tensor) and isinstance(own, Tensor) and entry.shape == own.shape


def _moving_tensors(units: HiddenUnits) -> dict[str, Tensor]:
    """Return the tensors that tangent paths train: all but running statistics and fixed slopes."""
    trained = ("weight", "bias", "norm_weight", "norm_bias")
    return {name: value for name, value in units.tensors().items() if name in trained}


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _set_child(root: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module at a qualified name; containers on the way are copied, so that no other owner of them notices."""
    *containers, last = name.split(".")
    parent = root
    for container in containers:
        copied = copy.copy(parent._modules[container])
        assert copied is not None
        copied.__dict__["_modules"] = dict(copied._modules)
        parent._modules[container] = copied
        parent = copied
    parent._modules[last] = child
