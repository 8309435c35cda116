"""Loading across the freeze: a state dict of a frozen head into a module with an MLP, and the reverse."""

from typing import Any

from torch import Tensor, nn

from glai_lightning.heads.frozen import GLAIHead, check_freezable, freeze_in_place
from glai_lightning.heads.joined import JoinedHead, head_at, known_joined
from glai_lightning.heads.layout import is_readable
from glai_lightning.heads.record import find_record
from glai_lightning.heads.state_dicts import FREEZE_METADATA, FreezeMetadata, check_head_fits, read_freeze


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
        self._freeze: FreezeMetadata | None = None
        self._entries: dict[str, Tensor] = {}

    @classmethod
    def of(cls, module: nn.Module, head_name: str) -> "HeadRestorer":
        """Return the restorer of a head in a module, registered now if there was none."""
        registered = cls._find(module, head_name)
        if registered is not None:
            return registered
        restorer = cls(head_name)
        module.register_load_state_dict_pre_hook(restorer)  # type: ignore[no-untyped-call]
        if "+" in head_name:
            module.register_state_dict_post_hook(_FreezeNote(head_name))  # type: ignore[no-untyped-call]
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
        return self._freeze is not None

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Prepare the module, or the state dict, before the weights are read."""
        self.forget()
        head = self._find_head(module)
        if head is None:
            return
        # Those of all heads that come after this one too, before this one is frozen.
        restorers = self._all(module)
        for restorer in restorers[restorers.index(self) :]:
            restorer._check(module, state_dict, prefix)
        freeze = read_freeze(state_dict, f"{prefix}{self.head_name}")
        if freeze is None or isinstance(head, GLAIHead):
            return
        if self.deferred or self._waits(head, freeze):
            self._freeze = freeze
            if not isinstance(head, JoinedHead):
                self._set_aside(head, state_dict, f"{prefix}{self.head_name}.")
        else:
            freeze_in_place(head, paths=freeze.paths, freeze_epoch=freeze.freeze_epoch)

    def _find_head(self, module: nn.Module) -> nn.Module | None:
        if all(part in dict(module.named_modules()) for part in self.head_name.split("+")):
            return head_at(module, self.head_name)
        return None

    def _waits(self, head: nn.Module, freeze: FreezeMetadata) -> bool:
        """Tell whether a head is to be frozen when it is read from a real call."""
        return (self.deferred or freeze.paths == "output") and not is_readable(head)

    def forget(self) -> None:
        """Forget a frozen head that waits: the state dict that held it could not be loaded, or is outdated."""
        self._freeze, self._entries = None, {}

    def restore(self, module: nn.Module) -> GLAIHead:
        """Freeze the head that was loaded as an MLP, and give it the entries that were set aside.

        Args:
            module: the module that loaded the state dict.

        Returns:
            The frozen head.

        Raises:
            RuntimeError: if no head is waiting.
        """
        if self._freeze is None:
            raise RuntimeError(f"Expected a frozen head to wait at '{self.head_name}', but none was loaded.")
        head = head_at(module, self.head_name)
        frozen = freeze_in_place(head, paths=self._freeze.paths, freeze_epoch=self._freeze.freeze_epoch)
        if self._entries:
            state = frozen.state_dict()
            state.update(self._entries)
            frozen.load_state_dict(state)
        self.forget()
        return frozen

    def _set_aside(self, head: nn.Module, state_dict: dict[str, Any], head_prefix: str) -> None:
        own = head.state_dict(prefix=head_prefix)
        for key in [key for key in state_dict if key.startswith(head_prefix) and key not in own]:
            self._entries[key.removeprefix(head_prefix)] = state_dict.pop(key)
        for key, value in own.items():
            state_dict.setdefault(key, value)

    def _check(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Check that a state dict can be loaded into the head."""
        head = self._find_head(module)
        if head is None or isinstance(head, JoinedHead):
            return
        freeze = read_freeze(state_dict, f"{prefix}{self.head_name}")
        if freeze is not None and not isinstance(head, GLAIHead) and self._waits(head, freeze):
            return
        freeze = check_head_fits(head, f"{prefix}{self.head_name}", state_dict)
        if freeze is not None and not isinstance(head, GLAIHead):
            check_freezable(head, paths=freeze.paths)


class _FreezeNote:
    """Hook that says in the metadata of a state dict that a head is frozen which is no part of the module by itself."""

    def __init__(self, head_name: str) -> None:
        self.head_name = head_name

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
        head = known_joined(module, self.head_name)
        record = None if head is None else find_record(head)
        metadata = getattr(state_dict, "_metadata", None)
        if record is not None and metadata is not None:
            freeze = FreezeMetadata(record.paths, record.freeze_epoch).to_primitives()
            metadata[f"{prefix}{self.head_name}"] = {FREEZE_METADATA: freeze}
