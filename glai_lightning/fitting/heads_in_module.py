"""Which heads of a LightningModule are meant: one name, several, or patterns."""

import fnmatch
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from glai_lightning.fitting.conversion import list_heads
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.frozen import GLAIHead
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
        module: nn.Module = self.pl_module.get_submodule(self.name)
        return module


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
    return names


def stands_alone(names: Sequence[str]) -> bool:
    """Tell whether names mean one module, whatever module they are looked up in."""
    return len(names) == 1 and not is_pattern(names[0])


def match_heads(pl_module: nn.Module, names: Sequence[str], argument: str = "head") -> list[str]:
    """Return the qualified names of the heads that names and patterns mean, in the order of these.

    A name means the module of that name, which is not looked at. A pattern means the modules whose qualified name it
    matches and in which an MLP head can be read, frozen or not; of one inside another the outer.

    Args:
        pl_module: the LightningModule.
        names: names and patterns.
        argument: where they come from, for messages.

    Raises:
        MisconfigurationException: if a pattern matches no head, or a head is meant twice or lies inside another.
    """
    matched = [(name, given) for given in names for name in (_match(pl_module, given, argument))]
    for (one, one_given), (other, other_given) in itertools.combinations(matched, 2):
        inner, outer = sorted((one, other), key=len, reverse=True)
        if one == other:
            given = repr(one_given) if one_given == other_given else f"{one_given!r} and {other_given!r}"
            raise UserMisconfigurationError(
                f"Expected `{argument}` to name every head once, but got {one!r} twice, by {given}."
            )
        if inner.startswith(f"{outer}."):
            raise UserMisconfigurationError(
                f"Expected the heads in `{argument}` to lie apart, but got {inner!r} inside {outer!r}."
            )
    return [name for name, _ in matched]


def _match(pl_module: nn.Module, given: str, argument: str) -> list[str]:
    if not is_pattern(given):
        return [given]
    heads: list[str] = []
    for name, module in pl_module.named_modules():
        inside = any(name.startswith(f"{head}.") for head in heads)
        if name and not inside and fnmatch.fnmatchcase(name, given) and _is_head(module):
            heads.append(name)
    if not heads:
        raise UserMisconfigurationError(
            f"Expected `{argument}` to match an MLP head of `{type(pl_module).__name__}`, but got {given!r}. "
            f"Modules that look like heads: {list_heads(pl_module) or 'none'}. What `configure_model` makes can be "
            "named, and not matched."
        )
    return heads


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, GLAIHead):
        return True
    try:
        read_head(module)
    except ValueError:
        return False
    return True
