"""What turns inputs into the features of a linear model, and a fingerprint by which it is known again."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.frozen import GLAIHead, freeze_in_place
from glai_lightning.heads.layout import in_mode, read_head
from glai_lightning.heads.record import find_record, record_of
from glai_lightning.solvers.head_weights import LinearPathWeights

#: Entries of a state dict that no feature depends on.
_COUNTERS = ("num_batches_tracked",)


class FeatureMap:
    """The features of a frozen head, or what any other module returns, in eval mode and without gradients.

    Args:
        module: a ``GLAIHead`` with output or independent paths, whose features are its path activations, alone or as
            the last of an ``nn.Sequential``; or a module from a batch of inputs to features (n, F). A head of which
            nothing but the last Linear requires gradients, such as ``random_feature_head`` makes, is frozen in place.

    Raises:
        TypeError: if it is not a module.
        ValueError: if it is a head that is not linear in its path weights.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise UserTypeError(f"Expected the feature map to be a module, but got `{type(module).__name__}`.")
        self._module = module
        self._before: nn.Module | None = None
        self._prefix, head = "", module
        if isinstance(module, nn.Sequential) and len(module) and not isinstance(module, GLAIHead):
            name, last = list(module.named_children())[-1]
            _freeze_fixed(last)
            if isinstance(last, GLAIHead):
                self._before, self._prefix, head = module[:-1], f"{name}.", last
        if head is module:
            _freeze_fixed(module)
        self._head = LinearPathWeights(head) if isinstance(head, GLAIHead) else None
        self._known: tuple[tuple[Any, ...], str] | None = None

    @property
    def has_bias(self) -> bool:
        """Whether outputs over these features have a bias."""
        return self._head is None or self._head.bias is not None

    @property
    def num_outputs(self) -> int | None:
        """Outputs of the head; ``None`` for any other module."""
        return None if self._head is None else len(self._head.weight())

    def __call__(self, inputs: Any) -> Tensor:
        """Return the features (n, F) of a batch of inputs."""
        computed = self._module if self._head is None else self._before
        features = inputs
        if computed is not None:
            with torch.no_grad(), in_mode([computed], training=False):
                features = computed(inputs)
        if self._head is not None:
            return self._head.activations(features).detach()
        if not isinstance(features, Tensor) or not features.is_floating_point() or features.ndim < 2:
            got = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
            raise UserValueError(
                f"Expected the feature map to return features of a floating dtype and of shape (samples, features), "
                f"but got {got}."
            )
        return features.detach().flatten(1)

    def fingerprint(self) -> str:
        """Return a hash of all that features depend on: kinds and settings of modules, weights, statistics, dtypes.

        What stays trainable of a head is left out. It is computed anew when a tensor has changed.
        """
        left_out = self._left_out()
        entries = {
            name: entry.detach()
            for name, entry in self._module.state_dict().items()
            if isinstance(entry, Tensor) and not name.startswith(left_out) and not name.endswith(_COUNTERS)
        }
        versions = tuple(
            (name, entry.data_ptr(), 0 if entry.is_inference() else entry._version) for name, entry in entries.items()
        )
        if self._known is None or self._known[0] != versions:
            self._known = versions, self._hash(entries, left_out)
        return self._known[1]

    def _left_out(self) -> tuple[str, ...]:
        if self._head is None:
            return ()
        names = record_of(self._head.head).names
        steps = [names.output, *(step for step in names.trailing if isinstance(step, str))]
        return tuple(f"{self._prefix}{step}." for step in steps)

    def _hash(self, entries: dict[str, Tensor], left_out: tuple[str, ...]) -> str:
        digest = hashlib.sha256()
        for name, module in self._module.named_modules():
            if f"{name}.".startswith(left_out) or isinstance(module, _DropoutNd | nn.Identity):
                continue
            record = find_record(module)
            said = module.extra_repr() if record is None else record.paths
            kind = type(module) if record is None else record.original
            digest.update(f"{name}:{kind.__name__}({said})\n".encode())
        for name, entry in sorted(entries.items()):
            digest.update(f"{name}:{entry.dtype}{tuple(entry.shape)}\n".encode())
            digest.update(entry.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _freeze_fixed(module: nn.Module) -> None:
    """Freeze a head of which only the last Linear is trained."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if isinstance(module, GLAIHead) or not trained or len(trained) == len(list(module.parameters())):
        return
    try:
        output = read_head(module).names.output
    except UserValueError:
        return
    if all(name.startswith(f"{output}.") for name in trained):
        freeze_in_place(module)
