"""Heads with any activation, written in any way: exact at the freeze, with a pattern for every activation."""

import pytest
import torch
import torch.nn.functional as F
from head_examples import C, D, H
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from glai_lightning import ChurnProbe, activation_patterns, freeze_structure
from glai_lightning.heads import unfreeze_in_place
from glai_lightning.solvers import LogisticSolver

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(H),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "squared_relu": lambda: SquaredReLU(),
    "of one's own": lambda: NewGELU(),
    "inplace": lambda: nn.SiLU(inplace=True),
}


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))


class Plain(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, H), activation, nn.Linear(H, C)
        self.gate, self.narrow = nn.Linear(D, H), nn.Linear(H, D)
        self.norm, self.batch_norm, self.late_norm = nn.LayerNorm(H), nn.BatchNorm1d(H), nn.BatchNorm1d(H)
        self.deep = True
        del self.gate, self.narrow, self.norm, self.batch_norm, self.late_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(Plain):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.gate = nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * self.gate(x))


class Normed(Plain):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.first, self.late = nn.RMSNorm(H), nn.BatchNorm1d(H)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.late(self.act(self.first(self.fc1(x)))))


class TwoInARow(Plain):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.narrow, self.wide = nn.Linear(H, 3), nn.Linear(3, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.wide(self.narrow(self.act(self.fc1(x)))))


class Residual(Plain):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.inner, self.fc2 = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        h = h + self.inner(h)
        return h + self.fc2(h)


class Flagged(Plain):
    """Control flow, an optional argument, views, a type, a squeeze, and what comes after the last Linear."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.log_probabilities = True

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = x.view(len(x), -1).float() if x.dtype is torch.float16 else x.flatten(1)
        h = torch.stack([self.fc1(x), self.fc1(x)], 1)[:, 0]
        if x.sum() > 1e9:
            h = h * 2
        h = self.act(h) if mask is None else self.act(h) * mask
        z = self.fc2(h.unsqueeze(1)).squeeze(1) * scale
        return {"logits": F.log_softmax(z, -1) if self.log_probabilities else z}


class Pooled(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens = self.act(self.fc1(x.unsqueeze(1).repeat(1, 3, 1)))
        return self.fc2(tokens.mean(1)), tokens.shape


class WeightNormed(Plain):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.fc1, self.fc2 = weight_norm(self.fc1), weight_norm(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.normalize(self.act(self.fc1(x))))


class Convolutions(Plain):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(activation)
        self.fc1, self.fc2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x[..., None, None]))).flatten(1)


WRITINGS = [Plain, Gated, Normed, TwoInARow, Residual, Flagged, Pooled, WeightNormed, Convolutions]


def outputs_of(head: nn.Module, x: Tensor) -> Tensor:
    outputs = head(x)
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs


def made(writing, activation: str, dtype: torch.dtype) -> nn.Module:
    # A slope for each unit stands in the second dimension, which tokens have for themselves.
    slope = nn.PReLU() if activation == "prelu" and writing is Pooled else ACTIVATIONS[activation]()
    head = writing(slope).to(dtype).train()
    outputs_of(head, torch.randn(64, D, dtype=dtype) + 0.5)
    return head.eval()


@given(
    writing=st.sampled_from(WRITINGS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    paths=st.sampled_from(["output", "tangent"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_freeze_is_exact_for_every_activation_and_way_of_writing(writing, activation, paths, dtype):
    if writing is WeightNormed:
        # Torch has no derivatives of it in forward mode.
        paths = "output"
    head = made(writing, activation, dtype)
    x = torch.randn(20, D, dtype=dtype)
    frozen, expected = freeze_structure(head, paths=paths), outputs_of(head, x)
    error = (outputs_of(frozen, x) - expected).abs().max() / expected.abs().max()
    assert error <= (0 if paths == "output" else {torch.float32: 1e-5, torch.float64: 1e-12}[dtype])
    patterns = activation_patterns(head, x)
    assert len(patterns) == len(frozen.layout.names.activations) == 1
    assert patterns[0].numel() in (20 * H, 3 * 20 * H)
    assert 0 < patterns[0].float().mean() < 1
    assert all(torch.equal(a, b) for a, b in zip(patterns, frozen.patterns(x), strict=True))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("writing", [Plain, Gated])
def test_patterns_are_the_signs_of_what_the_activation_is_given(writing, activation):
    head = made(writing, activation, torch.float32)
    x = torch.randn(20, D)
    (pattern,) = activation_patterns(head, x)
    assert torch.equal(pattern, head.fc1(x) > 0)


@pytest.mark.parametrize("writing", WRITINGS)
def test_output_paths_train_the_last_linear_and_what_follows_it_alone(writing):
    head = freeze_structure(made(writing, "gelu", torch.float32)).train()
    x = torch.randn(20, D)
    before = outputs_of(head.eval(), x), head.patterns(x)
    outputs_of(head.train(), x).sum().backward()
    trained = {name for name, p in head.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in head.named_parameters() if name.startswith("fc2.")}
    assert torch.equal(outputs_of(head.eval(), x), before[0])
    assert type(unfreeze_in_place(head)) is writing


def test_a_head_without_derivatives_in_forward_mode_has_no_tangent_paths():
    head = made(WeightNormed, "gelu", torch.float32)
    with pytest.raises(ValueError, match="Expected a head with derivatives in forward mode"):
        freeze_structure(head, paths="tangent")
    assert type(head) is WeightNormed
    with pytest.raises(ValueError, match="a Linear whose weight is a parameter, to solve for it"):
        LogisticSolver().solve(freeze_structure(head), torch.randn(9, D), torch.zeros(9, dtype=torch.long))


@pytest.mark.parametrize("writing", [writing for writing in WRITINGS if writing is not WeightNormed])
def test_tangent_paths_are_the_first_order_expansion(writing):
    head = made(writing, "tanh", torch.float64)
    if writing is Flagged:
        # What follows the last Linear stays as it is, and bends.
        head.log_probabilities = False
    frozen, x = freeze_structure(head, paths="tangent"), torch.randn(20, D, dtype=torch.float64)
    weights = torch.randn_like(outputs_of(head, x))
    (outputs_of(head, x) * weights).sum().backward()
    (outputs_of(frozen, x) * weights).sum().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(frozen.get_parameter(name).grad, parameter.grad)
    directions = [torch.randn_like(parameter) for parameter in frozen.parameters()]
    moved = []
    for _ in range(3):
        moved.append(outputs_of(frozen, x).detach())
        with torch.no_grad():
            for parameter, direction in zip(frozen.parameters(), directions, strict=True):
                parameter.add_(direction)
    torch.testing.assert_close(moved[2] - moved[1], moved[1] - moved[0])
    # As Lightning validates.
    with torch.no_grad():
        expected = outputs_of(frozen, x)
    with torch.inference_mode():
        assert torch.equal(outputs_of(frozen, x.clone()), expected)


@pytest.mark.parametrize("paths", ["output", "tangent"])
@pytest.mark.parametrize("writing", [Gated, Normed, Flagged])
def test_state_dicts_cross_the_freeze(writing, paths):
    source, x = made(writing, "silu", torch.float32), torch.randn(9, D)
    head = freeze_structure(made(writing, "silu", torch.float32), paths=paths)
    head.load_state_dict(source.state_dict())
    torch.testing.assert_close(outputs_of(head, x), outputs_of(source, x))
    other = freeze_structure(made(writing, "silu", torch.float32), paths=paths)
    with torch.no_grad():
        head.fc2.weight.add_(1.0)
    other.load_state_dict(head.state_dict())
    assert torch.equal(outputs_of(other, x), outputs_of(head, x))


@pytest.mark.parametrize("writing", WRITINGS)
def test_churn_is_measured_on_the_calls_that_the_head_saw(writing):
    head = made(writing, "gelu", torch.float32).train()
    probe = ChurnProbe(head, probe_size=12)
    for _ in range(3):
        head(torch.randn(8, D))
    with torch.no_grad():
        for parameter in head.fc1.parameters():
            parameter.neg_()
    flipped, bits = probe.measure()
    assert bits == 12 * H * (3 if writing is Pooled else 1)
    # Of a weight that is normalised the length and the direction change their sign.
    assert flipped > (0.0 if writing is WeightNormed else 0.5) * bits
    probe.close()
