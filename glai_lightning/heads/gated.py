"""Heads with gates: GLU and its variants, and gates that choose among activations."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glai_lightning.checks import expect_choice, expect_number, expect_sizes

GateKind = Literal["glu", "swiglu", "geglu", "reglu"]
_GATES = {"glu": nn.Sigmoid, "swiglu": nn.SiLU, "geglu": nn.GELU, "reglu": nn.ReLU}


class GLUHead(nn.Module):
    """A gated head, see ``glu_head``."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, kind: GateKind) -> None:
        super().__init__()
        self.gate = nn.Linear(in_features, hidden_features)
        self.activation = _GATES[kind]()
        self.value = nn.Linear(in_features, hidden_features)
        self.output = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        outputs: Tensor = self.output(self.activation(self.gate(x)) * self.value(x))
        return outputs


def glu_head(in_features: int, hidden_features: int, out_features: int, *, kind: GateKind = "swiglu") -> GLUHead:
    """Build a gated head: f(x) = W3 (act(W1 x + b1) * (W2 x + b2)) + b3, after arXiv 2002.05202.

    Its pattern is the sign of the gate W1 x + b1. For as many parameters as an MLP of H units it takes about
    H (D + C) / (2 D + C) of them.

    Args:
        in_features: width D of the inputs, at least 1.
        hidden_features: units H, at least 1.
        out_features: number C of outputs, at least 1.
        kind: the activation of the gate: 'glu' (sigmoid), 'swiglu' (SiLU), 'geglu' (GELU) or 'reglu' (ReLU).

    Returns:
        A head from (..., D) to (..., C).

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1, or ``kind`` unknown.

    Example:
        >>> import torch
        >>> glu_head(4, 8, 3, kind="geglu")(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """
    expect_sizes(in_features=in_features, hidden_features=hidden_features, out_features=out_features)
    expect_choice("kind", kind, get_args(GateKind))
    return GLUHead(in_features, hidden_features, out_features, kind)


class RoutedActivation(nn.Module):
    """Applies to each unit one of four activations: ReLU, tanh, SiLU or GELU, as logits say.

    Args:
        temperature: of the Gumbel-softmax in train mode, before its first call.
        lowest_temperature: what it falls to.
        decay: factor by which it falls from call to call.
    """

    def __init__(self, temperature: float, lowest_temperature: float, decay: float) -> None:
        super().__init__()
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(temperature))
        self.lowest_temperature = lowest_temperature
        self.decay = decay

    def forward(self, z: Tensor, logits: Tensor) -> Tensor:
        """Mix the activations: preactivations (..., H) and logits (..., H, 4) -> (..., H)."""
        if self.training:
            routes = F.gumbel_softmax(logits, tau=self.temperature.clone())  # type: ignore[arg-type]
            with torch.no_grad():
                self.temperature.mul_(self.decay).clamp_(min=self.lowest_temperature)
        else:
            routes = self.pattern(z, logits).to(z.dtype)
        activated = torch.stack([F.relu(z), torch.tanh(z), F.silu(z), F.gelu(z)], dim=-1)
        return (routes * activated).sum(-1)

    def pattern(self, z: Tensor, logits: Tensor) -> Tensor:
        """Return which activation each unit has: bool (..., H, 4), one of four true."""
        return F.one_hot(logits.argmax(-1), 4).bool()


class PolyGLUHead(nn.Module):
    """A gated head whose gates choose among activations, see ``polyglu_head``."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, routed: RoutedActivation) -> None:
        super().__init__()
        self.gate = nn.Linear(in_features, hidden_features)
        self.router = nn.Sequential(nn.Linear(in_features, 32), nn.ReLU(), nn.Linear(32, 4))
        self.alpha = nn.Parameter(torch.zeros(hidden_features, 4))
        self.beta = nn.Parameter(torch.ones(4))
        self.activation = routed
        self.value = nn.Linear(in_features, hidden_features)
        self.output = nn.Linear(hidden_features, out_features)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that an optimizer should not decay; the name of this method is timm's."""
        return {"alpha"}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs: (..., D) -> (..., C)."""
        logits = self.alpha + (self.beta * self.router(x)).unsqueeze(-2)
        outputs: Tensor = self.output(self.activation(self.gate(x), logits) * self.value(x))
        return outputs


def polyglu_head(
    in_features: int,
    hidden_features: int,
    out_features: int,
    *,
    temperature: float = 1.0,
    lowest_temperature: float = 0.1,
    decay: float = 0.999,
) -> PolyGLUHead:
    """Build a gated head in which every unit chooses among ReLU, tanh, SiLU and GELU, after arXiv 2603.13347.

    f(x) = W3 (sum_k g_k act_k(W1 x + b1) * (W2 x + b2)) + b3. The routes g (H, 4) are a Gumbel-softmax in train mode
    and the largest alone in eval mode, of the logits alpha + beta r(x): alpha (H, 4) and beta (4,) are learned, and r
    is a Linear to 32, ReLU, and a Linear to 4. The temperature falls from call to call in train mode. Its pattern are
    the routes, and the signs inside r, so churn is how much the routing still moves.

    Args:
        in_features: width D of the inputs, at least 1.
        hidden_features: units H, at least 1.
        out_features: number C of outputs, at least 1.
        temperature: of the Gumbel-softmax, before the first step; above 0.
        lowest_temperature: what it falls to; above 0, at most ``temperature``.
        decay: factor by which it falls at each step, in (0, 1].

    Returns:
        A head from (..., D) to (..., C). ``no_weight_decay()`` names ``alpha``, which an optimizer should not decay.

    Raises:
        TypeError: if a size is not an integer, or another argument not a number.
        ValueError: if an argument is out of its range.

    Example:
        >>> import torch
        >>> head = polyglu_head(4, 8, 3).eval()
        >>> head(torch.randn(5, 4)).shape, head.no_weight_decay()
        (torch.Size([5, 3]), {'alpha'})
    """
    expect_sizes(in_features=in_features, hidden_features=hidden_features, out_features=out_features)
    expect_number("temperature", temperature, low=0.0, above=True)
    expect_number("lowest_temperature", lowest_temperature, low=0.0, high=temperature, above=True)
    expect_number("decay", decay, low=0.0, high=1.0, above=True)
    routed = RoutedActivation(temperature, lowest_temperature, decay)
    return PolyGLUHead(in_features, hidden_features, out_features, routed)
