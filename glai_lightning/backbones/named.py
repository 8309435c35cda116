"""What backbones of other libraries have in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from glai_lightning.checks import UserTypeError, UserValueError


class NamedBackbone(nn.Module):
    """A model of another library, which a checkpoint can describe and make again without that library's hub.

    Attributes:
        model: the model of the other library.
        num_features: width D of the embeddings.
    """

    model: Any
    num_features: int

    def description(self) -> dict[str, Any]:
        """Return, in primitives and tensors, what ``from_description`` makes the same backbone of, weights apart."""
        raise NotImplementedError

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Make a backbone of random weights, which a state dict then replaces; nothing is downloaded."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        backbone._make(**description)
        return backbone

    def _make(self, **description: Any) -> None:
        raise NotImplementedError


def check_name(name: object) -> None:
    """Raise ``TypeError`` unless a name is a string."""
    if not isinstance(name, str) or not name:
        raise UserTypeError(f"Expected `name` to be the name of a model, but got {name!r}.")


@contextmanager
def sentence_for_the_hub(name: str) -> Iterator[None]:
    """Answer with a sentence where a model is not found, or cannot be downloaded."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise UserValueError(
            f"Expected {name!r} to be a model whose files are at hand or can be downloaded, but they cannot be read: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
