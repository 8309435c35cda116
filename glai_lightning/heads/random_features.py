"""Heads on random features: a frozen random layer, and products of random projections."""

from typing import Any

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError, expect_flag, expect_sizes


def random_feature_head(
    in_features: int, hidden_features: int, out_features: int, *, activation: type[nn.Module] | str = nn.ReLU
) -> nn.Sequential:
    """Build a head on random features: f(x) = W2 act(W1 x) + b2 with W1 drawn once and never trained.

    The projection of RanPAC (arXiv 2307.02251), and the structure that every trained structure is to be compared with.
    Nothing in it settles, so a callback freezes it by ``freeze_at_epoch``, and a solver can solve it at once.

    Args:
        in_features: width D of the inputs, at least 1.
        hidden_features: random features H, at least 1.
        out_features: number C of outputs, at least 1.
        activation: class of the activation, or its name in ``torch.nn``.

    Returns:
        A head from (..., D) to (..., C), whose first layer does not require gradients.

    Raises:
        TypeError: if a size is not an integer, or ``activation`` no class of a module that is made without arguments.
        ValueError: if a size is below 1.

    Example:
        >>> head = random_feature_head(4, 8, 3)
        >>> [name for name, parameter in head.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """
    expect_sizes(in_features=in_features, hidden_features=hidden_features, out_features=out_features)
    kind = getattr(nn, activation, None) if isinstance(activation, str) else activation
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserTypeError(f"Expected `activation` to be a class of `torch.nn`, but got {activation!r}.")
    try:
        module = kind()
    except TypeError as error:
        raise UserTypeError(
            f"Expected `activation` to be a class that is made without arguments, but got {activation!r} ({error})."
        ) from error
    projection = nn.Linear(in_features, hidden_features, bias=False)
    nn.init.normal_(projection.weight, std=in_features**-0.5)
    projection.weight.requires_grad_(False)
    return nn.Sequential(projection, module, nn.Linear(hidden_features, out_features))


class Product(nn.Module):
    """Multiplies what it is given, element by element."""

    def forward(self, *factors: Tensor) -> Tensor:
        """Return the product of tensors (..., m): (..., m)."""
        return torch.stack(factors).prod(0)

    def pattern(self, *factors: Tensor) -> Tensor:
        """Return which products are positive: bool (..., m)."""
        return self.forward(*factors) > 0


class EUGenHead(nn.Module):
    """A head on products of projections, see ``eugen_head``."""

    def __init__(self, in_features: int, out_features: int, order: int, features: int, trained: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.features = features
        width = 2 * in_features + 1
        self.projections = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, features, bias=False) for _ in range(power)) for power in range(1, order + 1)
        )
        for projection in self.projections.parameters():
            nn.init.normal_(projection)
            projection.requires_grad_(trained)
        self.product = Product()
        self.output = nn.Linear(1 + order * features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        one = torch.ones_like(x[..., :1])
        extended = torch.cat([x, one, x.abs()], dim=-1)
        groups: Any = self.projections
        powers = [self.product(*(projection(extended) for projection in group)) for group in groups]
        outputs: Tensor = self.output(torch.cat([one, *(power * self.features**-0.5 for power in powers)], dim=-1))
        return outputs


def eugen_head(
    in_features: int, out_features: int, *, order: int = 2, features: int = 64, trained: bool = False
) -> EUGenHead:
    """Build a head on products of random projections, after arXiv 2601.22563 (EUGen).

    f(x) = W [1, phi_1(x), ..., phi_k(x)] + b, where x+ = [x, 1, |x|], and phi_j (m,) is the product of j projections
    G_1 x+ * ... * G_j x+ over sqrt(m), entries of the G drawn from the standard normal distribution. The product of
    phi_j(x) with phi_j(w) is an unbiased estimate of (x+ . w+)^j, so with fixed projections the head estimates layers
    with polynomial activations of degree k without bias. Its pattern are the signs of the products.

    Args:
        in_features: width D of the inputs, at least 1.
        out_features: number C of outputs, at least 1.
        order: largest number k of projections that are multiplied, from 1 to 8: of more the spread drowns the mean.
        features: features m of each order, at least 1.
        trained: whether the projections are trained; else they stay as they were drawn.

    Returns:
        A head from (..., D) to (..., C).

    Raises:
        TypeError: if a size is not an integer, or ``trained`` not a bool.
        ValueError: if a size is below 1, or ``order`` above 8.

    Example:
        >>> eugen_head(4, 3, features=16)(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """
    expect_sizes(in_features=in_features, features=features, out_features=out_features, order=order)
    if order > 8:
        raise UserValueError(f"Expected `order` to be an integer from 1 to 8, but got {order}.")
    expect_flag("trained", trained)
    return EUGenHead(in_features, out_features, order, features, trained)
