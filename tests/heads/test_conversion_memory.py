"""What a conversion allocates at its peak: counted tensor by tensor, so that the figure is the same every time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glai_lightning import mlp_head
from glai_lightning.fitting.sizes import count_bytes
from glai_lightning.heads import freeze_in_place
from glai_lightning.heads.layout import read_head
from glai_lightning.heads.optimizers import replace_parameters


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of the tensors made in it, and how many there were at once at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known | set(self._storages):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def forget(_):
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, forget)


def trained(hidden, dtype):
    mlp = mlp_head(32, hidden, 24, batch_norm=True).to(dtype)
    optimizer = torch.optim.Adam(mlp.parameters())
    mlp(torch.randn(8, 32, dtype=dtype)).square().mean().backward()
    optimizer.step()
    # As a fit does at its start.
    read_head(mlp)
    return mlp, optimizer


def test_what_is_counted_is_what_is_alive():
    with LiveBytes() as counted:
        kept = torch.ones(1000)
        for _ in range(3):
            torch.ones(2000) + 1
    assert (counted.live, counted.peak) == (4000, 4000 + 2 * 8000)
    assert len(kept) == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, [16, 12]])
@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_a_conversion_needs_at_most_the_heads_parameters_and_optimizer_state_once_over(paths, hidden, dtype):
    mlp, optimizer = trained(hidden, dtype)
    state = count_bytes(dict(optimizer.state))
    with LiveBytes() as counted:
        head = freeze_in_place(mlp, paths=paths)
        replace_parameters(optimizer, head)
    parameters = count_bytes([*head.parameters(), *mlp.parameters()])
    assert counted.peak <= parameters + state
    if paths == "output":
        assert counted.peak == 0
