"""Finding heads in a LightningModule: by one name, several, or patterns."""

import fnmatch
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError, as_misconfiguration
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.joined import head_at
from glai_lightning.heads.layout import read_head


@dataclass(frozen=True)
class HeadSlot:
    """The place of a head in a LightningModule.

    Args:
        pl_module: the LightningModule.
        name: qualified name of the head in it.

    Example:
        >>> from torch import nn
        >>> HeadSlot(nn.ModuleDict({"head": nn.Linear(2, 3)}), "head").module
        Linear(in_features=2, out_features=3, bias=True)
    """

    pl_module: Any
    name: str

    @property
    def module(self) -> nn.Module:
        """The head, frozen or not."""
        return head_at(self.pl_module, self.name)

    @property
    def is_frozen(self) -> bool:
        """Whether the structure of the head is frozen."""
        return isinstance(self.module, GLAIHead)


def is_pattern(name: str) -> bool:
    """Tell whether a name is a pattern, of the shell's kind, for qualified names."""
    return any(character in name for character in "*?[")


def as_names(argument: str, value: str | Sequence[str]) -> list[str]:
    """Return the names and patterns that an argument gives, as a list.

    Raises:
        MisconfigurationException: if it gives none, or something else.
    """
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserMisconfigurationError(
            f"Expected `{argument}` to be the name of a module, or a list of names, but got {value!r}."
        )
    for name in names:
        if any(not part or part != part.strip() for part in name.split("+")):
            raise UserMisconfigurationError(
                f"Expected the names in `{argument}` without blanks, joined by '+' as in 'a+b', but got {name!r}."
            )
    return names


def stands_alone(names: Sequence[str]) -> bool:
    """Tell whether names mean one module, whatever module they are looked up in."""
    return len(names) == 1 and not is_pattern(names[0])


def match_heads(pl_module: nn.Module, names: Sequence[str], argument: str = "head") -> list[str]:
    """Return the qualified names of the heads that names and patterns mean, in the order of these.

    A name means the module of that name, which is not looked at. A pattern means the modules whose qualified name it
    matches and in which an MLP head can be read, frozen or not; where one lies inside another, the outer one.

    Args:
        pl_module: the LightningModule.
        names: names and patterns.
        argument: where they come from, for messages.

    Raises:
        MisconfigurationException: if a pattern matches no head, a head is meant twice, or one lies inside another.
    """
    matched = [(name, given) for given in names for name in _match(pl_module, given, argument)]
    for (one, one_given), (other, other_given) in itertools.combinations(matched, 2):
        if one == other:
            given = repr(one_given) if one_given == other_given else f"{one_given!r} and {other_given!r}"
            raise UserMisconfigurationError(
                f"Expected `{argument}` to name every head once, but got {one!r} twice, by {given}."
            )
        for a, b in itertools.product(one.split("+"), other.split("+")):
            _check_apart(a, b, f"the heads in `{argument}`")
    return [name for name, _ in matched]


def _match(pl_module: nn.Module, given: str, argument: str) -> list[str]:
    if "+" in given:
        return _match_joined(pl_module, given.split("+"), argument)
    if not is_pattern(given):
        return [given]
    # Only what matches is called, to be read.
    matching = [
        name
        for name, module in pl_module.named_modules()
        if name and fnmatch.fnmatchcase(name, given) and why_no_head(module) is None
    ]
    heads = [name for name in matching if not any(name.startswith(f"{outer}.") for outer in matching)]
    if not heads:
        raise UserMisconfigurationError(
            f"Expected `{argument}` to match an MLP head of `{type(pl_module).__name__}`, but got {given!r}. "
            f"{name_heads(pl_module)} What `configure_model` makes can be named, and not matched."
        )
    return heads


def _lies_inside(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _match_joined(pl_module: nn.Module, parts: list[str], argument: str) -> list[str]:
    """Return the joined heads that a chain of names means: the later ones may be relative to where the first lies."""
    modules = dict(pl_module.named_modules())
    firsts = [name for name in modules if name and fnmatch.fnmatchcase(name, parts[0])]
    if not firsts:
        raise UserMisconfigurationError(
            f"Expected `{argument}` to name modules of `{type(pl_module).__name__}`, but got {parts[0]!r}. "
            f"{name_heads(pl_module)}"
        )
    beside = [first.rpartition(".")[0] for first in firsts]
    joined = [
        [first, *(part if part in modules else f"{parent}.{part}".lstrip(".") for part in parts[1:])]
        for first, parent in zip(firsts, beside, strict=True)
    ]
    for own in joined:
        for one, other in itertools.combinations(own, 2):
            _check_apart(one, other, f"the layers of the head {'+'.join(own)!r}")
    return ["+".join(own) for own in joined]


def _check_apart(one: str, other: str, what: str) -> None:
    outer, inner = sorted((one, other), key=len)
    if _lies_inside(outer, inner):
        raise UserMisconfigurationError(f"Expected {what} to lie apart, but got {inner!r} inside {outer!r}.")


def find_head(pl_module: nn.Module, head_name: str) -> nn.Module:
    """Return the module at a qualified name, whose parameters must be there under that name only.

    Args:
        pl_module: the LightningModule.
        head_name: qualified name of the head.

    Raises:
        MisconfigurationException: if there is no such module (the message names those that can be used), if it is
            wrapped by ``torch.compile``, or if a parameter of it has a second name, there or elsewhere.
    """
    named: dict[str, nn.Module] = dict(pl_module.named_modules(remove_duplicate=False))
    head = named.get(head_name)
    if head_name and all(part in named for part in head_name.split("+")):
        with as_misconfiguration():
            head = head_at(pl_module, head_name)
    if head is None or not head_name:
        raise UserMisconfigurationError(
            f"Expected `head` to name a module of `{type(pl_module).__name__}`, but got {head_name!r}. "
            f"{name_heads(pl_module)}"
        )
    if hasattr(head, "_orig_mod"):
        raise UserMisconfigurationError(
            f"Expected the head at {head_name!r} to be a plain module, but got one wrapped by `torch.compile(head)`. "
            f"Call `head.compile()` instead, which compiles in place."
        )
    own = {id(parameter) for parameter in head.parameters()}
    names: dict[int, str] = {}
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name and id(parameter) in own:
            raise UserMisconfigurationError(
                f"Expected every parameter of the head at {head_name!r} to have one name, but got {first!r} "
                f"under {name!r} as well, where a freeze or a solve would change it too."
            )
    return head


def list_heads(pl_module: nn.Module) -> list[str]:
    """List the qualified names of the modules in which an MLP head can be read, frozen or not, in their order."""
    return [name for name, module in pl_module.named_modules() if name and why_no_head(module) is None]


def why_no_head(module: nn.Module) -> str | None:
    """Say why no MLP head can be read in a module; ``None`` where one can, or is frozen."""
    if isinstance(module, GLAIHead):
        return None
    try:
        read_head(module)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def name_heads(pl_module: nn.Module) -> str:
    """Name, in a sentence, the modules that can be used as a head; if there are none, the closest and what it lacks."""
    heads = list_heads(pl_module)
    # A wrapper and the head in it are one and the same, and the forward of the head is called in any case.
    linears = {name: _linears(pl_module.get_submodule(name)) for name in heads}
    heads = [
        name
        for name in heads
        if not any(name != i and linears[i] == linears[name] and i.startswith(f"{name}.") for i in heads)
    ]
    if heads:
        return f"Modules that can be used as a head: {heads}."
    candidates = [(name, module) for name, module in pl_module.named_modules() if name and len(_linears(module)) > 1]
    if not candidates:
        return "No module of it holds two Linear layers, and so none can be used as a head."
    # The innermost of the last: heads stand at the end.
    name, module = candidates[-1]
    return f"No module of it can be used as a head. The closest is {name!r}: {why_no_head(module)}"


def _linears(module: nn.Module) -> list[int]:
    return [id(child) for child in module.modules() if isinstance(child, nn.Linear)]
