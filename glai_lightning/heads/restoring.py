"""Loading across the freeze: a state dict of a frozen head into a module with an MLP, and the reverse."""

from typing import Any

from torch import Tensor, nn

from glai_lightning.checks import UserValueError
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.loading import Snapshot, check_state_dict
from glai_lightning.heads.marks import MARK, FreezeMark


def read_mark(state_dict: dict[str, Any], head_name: str) -> FreezeMark | None:
    """Read from a state dict whether the head in it was frozen.

    Args:
        state_dict: the state dict of a module that holds the head, as ``state_dict()`` or ``torch.load`` return it.
        head_name: qualified name of the head in that module, '' if it is the module itself.

    Returns:
        The mark, or ``None`` for an MLP.

    Raises:
        TypeError: if ``state_dict`` is not a mapping.
        ValueError: if its keys or its metadata are not those of a state dict, or the mark is not one.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> read_mark(freeze_structure(mlp_head(4, 8, 3)).state_dict(), "")
        FreezeMark(paths='output', freeze_epoch=None)
    """
    check_state_dict(state_dict)
    metadata = (getattr(state_dict, "_metadata", None) or {}).get(head_name, {})
    if MARK in metadata:
        return FreezeMark.from_metadata(metadata[MARK])
    # Metadata is lost where somebody copied the entries into a plain dict; output paths then load as the MLP they are.
    prefix = f"{head_name}." if head_name else ""
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    if any(name.split(".")[-1] == "path_weights" for name in names):
        return FreezeMark("independent", None)
    return FreezeMark("tangent", None) if "reference_output_weight" in names else None


class HeadRestorer:
    """Hook that lets a module load a state dict from the other side of the freeze.

    Registered with ``register_load_state_dict_pre_hook``. It converts the head to what the state dict holds before the
    weights are read. While ``deferred`` (at the start of a fit that resumes) the head loads as the MLP that it is, so
    that the user's ``configure_optimizers`` meets the head that it was written for; ``restore`` then converts it.

    Args:
        head_name: qualified name of the head in the module that the hook is registered on.
    """

    def __init__(self, head_name: str) -> None:
        self.head_name = head_name
        self.deferred = False
        self._mark: FreezeMark | None = None
        self._entries: dict[str, Tensor] = {}

    @classmethod
    def of(cls, module: nn.Module, head_name: str) -> "HeadRestorer":
        """Return the restorer of a head in a module, registered now if there was none."""
        registered = cls._find(module, head_name)
        if registered is not None:
            return registered
        restorer = cls(head_name)
        module.register_load_state_dict_pre_hook(restorer)  # type: ignore[no-untyped-call]
        return restorer

    @classmethod
    def is_registered(cls, module: nn.Module, head_name: str) -> bool:
        """Tell whether a module converts a head by itself when it loads a state dict."""
        return cls._find(module, head_name) is not None

    @staticmethod
    def _all(module: nn.Module) -> "list[HeadRestorer]":
        hooks = (getattr(wrapped, "hook", None) for wrapped in module._load_state_dict_pre_hooks.values())
        return [hook for hook in hooks if isinstance(hook, HeadRestorer)]

    @classmethod
    def _find(cls, module: nn.Module, head_name: str) -> "HeadRestorer | None":
        return next((restorer for restorer in cls._all(module) if restorer.head_name == head_name), None)

    @property
    def pending(self) -> bool:
        """Whether a frozen head was loaded as an MLP and waits for ``restore``."""
        return self._mark is not None

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Prepare the module, or the state dict, before the weights are read."""
        self.forget()
        head = dict(module.named_modules()).get(self.head_name)
        if head is None:
            return
        mark = read_mark(state_dict, f"{prefix}{self.head_name}")
        # Those of all heads that come after this one too, before this one is converted.
        restorers = self._all(module)
        for restorer in restorers[restorers.index(self) :]:
            restorer._check(module, state_dict, prefix)
        if mark is None or isinstance(head, GLAIHead):
            return
        if self.deferred:
            self._mark = mark
            self._set_aside(head, state_dict, f"{prefix}{self.head_name}.")
        else:
            frozen = GLAIHead.adopt(head, paths=mark.paths, freeze_epoch=mark.freeze_epoch)
            module.set_submodule(self.head_name, frozen)

    def forget(self) -> None:
        """Let go of a frozen head that waits: the state dict that held it could not be loaded, or is outdated."""
        self._mark, self._entries = None, {}

    def restore(self, module: nn.Module) -> GLAIHead:
        """Convert the head that was loaded as an MLP, and give it the entries that were set aside.

        Args:
            module: the module that loaded the state dict.

        Returns:
            The frozen head, in its place in the module.

        Raises:
            RuntimeError: if no head is waiting.
        """
        if self._mark is None:
            raise RuntimeError(f"Expected a frozen head to wait at '{self.head_name}', but none was loaded.")
        head = GLAIHead.adopt(
            module.get_submodule(self.head_name), paths=self._mark.paths, freeze_epoch=self._mark.freeze_epoch
        )
        head.load_state_dict({**head.state_dict(), **self._entries})
        head.freeze_epoch = self._mark.freeze_epoch
        module.set_submodule(self.head_name, head)
        self.forget()
        return head

    def _set_aside(self, head: nn.Module, state_dict: dict[str, Any], head_prefix: str) -> None:
        own = head.state_dict(prefix=head_prefix)
        for key in [key for key in state_dict if key.startswith(head_prefix) and key not in own]:
            self._entries[key.removeprefix(head_prefix)] = state_dict.pop(key)
        for key, value in own.items():
            state_dict.setdefault(key, value)

    def _check(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Check that a state dict can be loaded into the head, which is as before in any case."""
        head = dict(module.named_modules()).get(self.head_name)
        if head is None:
            return
        head_prefix = f"{prefix}{self.head_name}."
        self._check_sizes(head, state_dict, head_prefix)
        mark = read_mark(state_dict, f"{prefix}{self.head_name}")
        if mark is None or isinstance(head, GLAIHead):
            return
        before = Snapshot(head)
        try:
            frozen = GLAIHead.adopt(head, paths=mark.paths, freeze_epoch=mark.freeze_epoch)
            self._check_entries(frozen, state_dict, head_prefix)
        finally:
            before.put_back()

    def _check_entries(self, frozen: GLAIHead, state_dict: dict[str, Any], head_prefix: str) -> None:
        """Check that the frozen head in a state dict is whole, before any of it is read."""
        expected = frozen.state_dict(prefix=head_prefix)
        held = {key: value for key, value in state_dict.items() if key.startswith(head_prefix)}
        wrong = [
            *(f"it lacks `{key}`" for key in expected if key not in held),
            *(f"it also holds `{key}`" for key in held if key not in expected),
            *(
                f"got {_describe(held[key])} for `{key}` of shape {tuple(own.shape)}"
                for key, own in expected.items()
                if key in held and not (isinstance(held[key], Tensor) and held[key].shape == own.shape)
            ),
        ]
        if wrong:
            raise UserValueError(
                f"Expected the state dict to hold a head frozen with {frozen.paths!r} paths at '{self.head_name}', "
                f"but {', and '.join(wrong)}."
            )

    def _check_sizes(self, head: nn.Module, state_dict: dict[str, Any], head_prefix: str) -> None:
        for key, own in head.state_dict(prefix=head_prefix).items():
            loaded = state_dict.get(key)
            if isinstance(loaded, Tensor) and isinstance(own, Tensor) and loaded.shape != own.shape:
                raise UserValueError(
                    f"Expected the checkpoint to hold a head of the same sizes at '{self.head_name}', but got "
                    f"`{key}` of shape {tuple(loaded.shape)} for {tuple(own.shape)}."
                )


def _describe(entry: object) -> str:
    return f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"`{type(entry).__name__}`"
