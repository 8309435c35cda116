"""Heads as people write them, for tests of the engine."""

import torch
from torch import Tensor, nn

from glai_lightning import mlp_head

D, H, C = 6, 9, 4


class FunctionalHead(nn.Module):
    """Two Linear layers and a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, H)
        self.fc2 = nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def nested_head() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(D, H, bias=False), nn.BatchNorm1d(H), nn.LeakyReLU(0.2))
    return nn.Sequential(
        nn.LayerNorm(D), block, nn.Dropout(0.5), nn.Linear(H, C, bias=False), nn.BatchNorm1d(C, affine=False)
    )


def fixed_prelu_head() -> nn.Sequential:
    prelu = nn.PReLU(H)
    prelu.weight.requires_grad_(False).copy_(torch.rand(H))
    return nn.Sequential(nn.Linear(D, H), prelu, nn.Linear(H, C))


def _lightly_simclr() -> nn.Module:
    from lightly.models.modules.heads import SimCLRProjectionHead

    return SimCLRProjectionHead(D, H, C)


def _lightly_barlow_twins() -> nn.Module:
    from lightly.models.modules.heads import BarlowTwinsProjectionHead

    return BarlowTwinsProjectionHead(D, H, C)


def _timm_mlp() -> nn.Module:
    from timm.layers import Mlp

    return Mlp(D, H, C, act_layer=nn.ReLU, drop=0.1)


def _torchvision_mlp() -> nn.Module:
    from torchvision.ops import MLP

    return MLP(D, [H, 7, C], norm_layer=nn.BatchNorm1d, dropout=0.1)


HEADS = {
    "mlp_head": lambda: mlp_head(D, H, C),
    "mlp_head with BatchNorm and Dropout": lambda: mlp_head(D, [H, 7], C, batch_norm=True, dropout=0.3),
    "three hidden layers": lambda: mlp_head(D, [5, 4, 3], C),
    "functional ReLU": FunctionalHead,
    "nested, leading LayerNorm, LeakyReLU, trailing BatchNorm": nested_head,
    "PReLU of a fixed slope": fixed_prelu_head,
    "lightly's SimCLR projection": _lightly_simclr,
    "lightly's Barlow Twins projection": _lightly_barlow_twins,
    "timm's Mlp": _timm_mlp,
    "torchvision's MLP": _torchvision_mlp,
}


def trained(head: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a head running statistics and affine weights that are not those of an untrained one; eval mode."""
    head = head.to(dtype).train()
    for _ in range(3):
        head(torch.randn(64, D, dtype=dtype) * 2 + 1)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias)
    return head.eval()
