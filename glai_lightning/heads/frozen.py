"""Freezing the structure of a head in place: its class is swapped, and the module stays the same object."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice, expect_integer
from glai_lightning.heads.chain import Chain, FunctionStep, Step
from glai_lightning.heads.formula_check import unlike_formula
from glai_lightning.heads.layout import HeadLayout, copy_head, in_mode, read_head
from glai_lightning.heads.path_kinds import (
    count_paths,
    frozen_class,
    has_hidden_bias,
    reference_units,
)
from glai_lightning.heads.paths import joint_gates, path_features
from glai_lightning.heads.patterns import HiddenUnits, apply_leading, hidden_units, layout_of, patterns_of
from glai_lightning.heads.record import FreezeRecord, Paths, find_record, record_of, set_record

#: Independent path weights beyond which a head is refused: 40 MB of float32, and as much for each optimizer state.
MAX_PATHS = 10_000_000

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


class _Yields(Generic[_T]):
    """A property, or a method, that gives way to what the user's own head holds under the same name."""

    def __init__(self, function: Callable[[Any], _T], *, is_method: bool = False) -> None:
        self._function = function
        self._is_method = is_method
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, head: Any, owner: type | None = None) -> _T:
        if head is None:
            # ``GLAIHead.path_activations(head, x)`` asks for what the user's own names may hide.
            return cast(_T, self._function)
        for registry in (head._modules, head._parameters, head._buffers):
            if self._name in registry:
                return cast(_T, registry[self._name])
        return cast(_T, self._function.__get__(head)) if self._is_method else self._function(head)


def _yielding(function: _F) -> _F:
    return cast(_F, _Yields(function, is_method=True))


class GLAIHead(nn.Module):
    """A head whose structure is frozen: which units fire for which input no longer changes, only the weights do.

    ``freeze_structure`` makes one from a copy of an MLP head; a ``StructureFreezeCallback`` turns the head of a module
    into one, in place. It stays an object of its own class too: methods, hooks, children and their names, and the
    names of its attributes stay what they were. With output paths its own forward goes on running. BatchNorm inside
    counts with its running statistics whatever the mode, and Dropout modules inside are gone.

    The state dict describes itself: its metadata names the paths and the epoch of the freeze.

    Example:
        >>> head = freeze_structure(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> isinstance(head, GLAIHead), isinstance(head, nn.Sequential), head.paths
        (True, True, 'output')
    """

    @_Yields
    def paths(self) -> Paths:
        """What stays trainable: 'output', 'tangent' or 'independent'."""
        return record_of(self).paths

    @_Yields
    def freeze_epoch(self) -> int | None:
        """The first epoch (0-based) that trained frozen, or ``None`` where it was not frozen in a fit."""
        return record_of(self).freeze_epoch

    @_Yields
    def layout(self) -> HeadLayout:
        """The modules of the head, as they stand in it now, by the part that they play."""
        return layout_of(self)

    @_Yields
    def num_paths(self) -> int | None:
        """Number of paths from an input or a bias to an output: D H C + H C + C for one hidden layer.

        ``None`` for a head whose outputs are no sum over paths.
        """
        layout = layout_of(self)
        return count_paths(layout) if isinstance(layout.names.chain, Chain) else None

    @_Yields
    def structure(self) -> list[HiddenUnits]:
        """The hidden layers that decide the patterns, as they were at the freeze."""
        return _structure(self)

    @_yielding
    def patterns(self, x: Tensor) -> list[Tensor]:
        """Return which hidden units fire for which input, which no longer changes.

        Args:
            x: inputs (..., D).

        Returns:
            One bool tensor (..., width) for each hidden layer.
        """
        return patterns_of(layout_of(self), (x,), tensors=record_of(self).references)

    @_yielding
    def path_activations(self, x: Tensor) -> Tensor:
        """Return the features in which the outputs, before any module after the last Linear, are linear.

        Args:
            x: inputs (..., D).

        Returns:
            Features (..., F). Output paths: the inputs of the last Linear in eval mode, F = HL. The others: the input
            of every active path, materialised, F = P D + the number of paths that start at a hidden bias, where
            P = H1 * ... * HL.
        """
        layout = layout_of(self)
        if record_of(self).paths == "output":
            return _inputs_of_output(self, layout, x)
        x = apply_leading(layout, x)
        return path_features(joint_gates(_structure(self), x), x, has_hidden_bias(layout))

    @_yielding
    def to_mlp(self) -> nn.Module:
        """Return a plain head that computes the same outputs, for an MLP with BatchNorm inside folded.

        Returns:
            For an MLP of piecewise-linear layers an ``nn.Sequential``: Linear and activation for every hidden layer,
            the last Linear, and the modules before and after. For any other head one of its own class. Copies
            throughout. What was trainable before the freeze is trainable in it.

        Raises:
            ValueError: if the paths are not 'output'. The others have no MLP that equals them once they are trained.

        Example:
            >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> x = torch.randn(5, 4)
            >>> torch.equal(freeze_structure(mlp).to_mlp()(x), mlp(x))
            True
        """
        record = record_of(self)
        if record.paths != "output":
            raise UserValueError(
                f"Expected `paths` to be 'output' to make an MLP of the head, but got {record.paths!r}."
            )
        trainable = set(record.was_trainable)
        layout = layout_of(self)
        functions = any(isinstance(module, FunctionStep) for module in layout.trailing)
        if functions or isinstance(layout.names.chain, str):
            return unfreeze_in_place(copy.deepcopy(self))

        def copied(step: Step, module: nn.Module) -> nn.Module:
            twin = copy.deepcopy(module)
            for name, parameter in twin.named_parameters():
                parameter.requires_grad_(f"{step}.{name}" in trainable)
            return twin

        modules = list(map(copied, layout.chain.leading, layout.leading))
        for names, layer, units in zip(layout.chain.hidden, layout.hidden, hidden_units(layout), strict=True):
            modules += [_plain_linear(*units.folded()), copied(names.activation, layer.activation)]
        modules += [_plain_linear(layout.output.weight, layout.output.bias)]
        return nn.Sequential(*modules, *map(copied, layout.names.trailing, layout.trailing)).train(self.training)


def freeze_structure(head: nn.Module, *, paths: Paths = "output", max_paths: int = MAX_PATHS) -> GLAIHead:
    """Freeze the structure of a copy of a head, which becomes linear in what stays trainable.

    In eval mode the result computes what ``head`` computes: bitwise with output paths, up to rounding with the others.

    Args:
        head: any module with an activation before its last Linear, however its forward is written; not changed.
        paths: what stays trainable. ``"output"``: the last Linear, H C + C numbers (last-layer training), for any
            activation. ``"tangent"``: every weight, to first order (linearisation), for activations with derivatives.
            ``"independent"``: a weight for every path, D H C + H C + C numbers (the estimator of arXiv 2510.00883), for
            chains of layers with ReLU, LeakyReLU or PReLU of a fixed slope; meant for narrow heads, see
            ``matched_hidden_features``.
        max_paths: most independent path weights allowed.

    Returns:
        The frozen head, from (..., D) to (..., C), with the dtype and device of ``head``.

    Raises:
        TypeError: if ``head`` is not a module or frozen already, or ``max_paths`` is not an integer.
        ValueError: if ``head`` cannot be read, ``paths`` is unknown, there are more than ``max_paths`` paths, the
            formula of independent paths would not compute what the forward of ``head`` computes, or that has no
            derivatives for tangent paths.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> head = freeze_structure(mlp)
        >>> x = torch.randn(5, 4)
        >>> torch.equal(head(x), mlp(x)), head.num_paths
        (True, 123)
    """
    names = check_freezable(head, paths=paths, max_paths=max_paths).names
    return freeze_in_place(copy_head(head, names), paths=paths, max_paths=max_paths)


def freeze_in_place(
    head: nn.Module, *, paths: Paths = "output", max_paths: int = MAX_PATHS, freeze_epoch: int | None = None
) -> GLAIHead:
    """Freeze the structure of an head: the module, its children and the parameters stay the same objects.

    Args:
        head: the head; its inner parameters stop requiring gradients.
        paths: what stays trainable, see ``freeze_structure``.
        max_paths: most independent path weights allowed.
        freeze_epoch: the first epoch (0-based) that trains frozen, kept in the metadata of the state dict.

    Returns:
        ``head``, which is a ``GLAIHead`` now.

    Raises:
        TypeError: if ``head`` is not a module or frozen already, or a number is not an integer.
        ValueError: as ``freeze_structure``. In either case ``head`` is as it was.

    Example:
        >>> head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> freeze_in_place(head) is head
        True
    """
    layout = check_freezable(head, paths=paths, max_paths=max_paths)
    if freeze_epoch is not None:
        expect_integer("freeze_epoch", freeze_epoch, least=0)
    trainable = tuple(name for name, parameter in head.named_parameters() if parameter.requires_grad)
    original = type(head)
    formula = paths != "output" and unlike_formula(head, layout) is None
    try:
        head.__class__ = frozen_class(original, paths)
    except TypeError as error:
        raise UserTypeError(
            f"Expected the head to be of a Python class that derives from nn.Module, but got `{original.__name__}`, "
            f"whose class cannot be changed ({error})."
        ) from error
    set_record(head, FreezeRecord(original, paths, layout.names, freeze_epoch, trainable, formula))
    frozen: Any = head
    try:
        frozen._glai_freeze(layout)
    except BaseException:
        set_record(head, None)
        head.__class__ = original
        raise
    frozen.train(head.training)
    return cast(GLAIHead, frozen)


def unfreeze_in_place(head: nn.Module, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Make a frozen head the MLP again that it was, with all that was trainable before the freeze trainable again.

    Args:
        head: a frozen head; any other is left as it is.
        weights: state dict of the MLP to go back to; ``None`` for the weights as they are now.

    Returns:
        ``head``.

    Raises:
        TypeError: if ``head`` is not a module, or ``weights`` not a mapping.
        ValueError: if the paths are not 'output' and no weights are given: no MLP equals them once they are trained.

    Example:
        >>> head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> before = {name: value.clone() for name, value in head.state_dict().items()}
        >>> type(unfreeze_in_place(freeze_in_place(head, paths="tangent"), before)).__name__
        'Sequential'
    """
    for name, given, kind in (("head", head, nn.Module), ("weights", weights, Mapping)):
        if not isinstance(given, kind) and not (name == "weights" and given is None):
            raise UserTypeError(f"Expected `{name}` to be a `{kind.__name__}`, but got `{type(given).__name__}`.")
    record = find_record(head)
    if record is None:
        return head
    if weights is None and record.paths != "output":
        raise UserValueError(
            f"Expected `paths` to be 'output' to unfreeze a head with its weights as they are, but got "
            f"{record.paths!r}, which no MLP equals once they are trained."
        )
    frozen: Any = head
    frozen._glai_unfreeze()
    set_record(head, None)
    head.__class__ = record.original
    if weights is not None:
        head.load_state_dict(weights)
    for name, parameter in head.named_parameters():
        if name in record.was_trainable:
            parameter.requires_grad_(True)
        parameter.grad = None
    return head.train(head.training)


def check_freezable(head: nn.Module, *, paths: str = "output", max_paths: int = MAX_PATHS) -> HeadLayout:
    """Check that the structure of a head can be frozen, and change nothing.

    Args:
        head: the head to freeze.
        paths: what is to stay trainable, see ``freeze_structure``.
        max_paths: most independent path weights allowed.

    Returns:
        The layout of the head.

    Raises:
        TypeError: if ``head`` is not a module or frozen already, or ``max_paths`` is not an integer.
        ValueError: as ``freeze_structure``.
    """
    expect_choice("paths", paths, get_args(Paths))
    expect_integer("max_paths", max_paths)
    if not isinstance(head, nn.Module) or isinstance(head, torch.jit.ScriptModule):
        raise UserTypeError(f"Expected the head to be a module written in Python, but got `{type(head).__name__}`.")
    record = find_record(head)
    if record is not None:
        raise UserTypeError(
            f"Expected the head to be an MLP, but got one whose structure is frozen already ({record.paths} paths)."
        )
    layout = read_head(head)
    if paths != "independent":
        return layout
    wrong = unlike_formula(head, layout)
    if wrong is not None:
        raise UserValueError(f"{wrong} Output and tangent paths keep the forward.")
    num_paths = count_paths(layout)
    if num_paths > max_paths:
        raise UserValueError(
            f"Expected at most {max_paths:,} independent path weights (`max_paths`), but the head has {num_paths:,}. "
            "`matched_hidden_features` gives the width of a head that has as many as an MLP."
        )
    return layout


def frozen_parameters(head: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a frozen head has from the MLP and no longer trains."""
    layout, record = layout_of(head), record_of(head)
    if record.paths == "tangent":
        leading = layout.leading if record.formula else ()
        return [parameter for module in leading for parameter in module.parameters()]
    return layout.structure_parameters()


def replaced_parameters(head: nn.Module) -> dict[Tensor, list[tuple[str, nn.Parameter]]]:
    """Return which parameters of the MLP were replaced by which, with their names in the module in its place."""
    record = record_of(head)
    old = record.replaced_output
    if old is None:
        return {}
    new = list(head.get_submodule(record.names.output).named_parameters())
    return {old.weight: new} if old.bias is None else {old.weight: new[:1], old.bias: new[1:]}


def _structure(head: nn.Module) -> list[HiddenUnits]:
    layout = layout_of(head)
    return reference_units(layout, hidden_units(layout), record_of(head).references)


class _ReachedOutput(BaseException):
    """Ends a forward at the last Linear; not an error, and not for the user's code to catch."""


def _inputs_of_output(head: nn.Module, layout: HeadLayout, x: Tensor) -> Tensor:
    """Run the head's own forward in eval mode up to its last Linear, and return what that is given."""
    reached: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        reached.append(args[0] if args else next(iter(kwargs.values())))
        raise _ReachedOutput

    handle = layout.output.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with in_mode([head], training=False):
            head.forward(x)
    except _ReachedOutput:
        pass
    finally:
        handle.remove()
    return reached[0]


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
