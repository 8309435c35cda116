import pytest
import torch
import torch.nn.functional as F
from head_examples import HEADS, C, D, H
from torch import nn

from glai_lightning import freeze_structure
from glai_lightning.heads.layout import read_head


@pytest.mark.parametrize("name", HEADS)
def test_reads_heads_as_people_write_them(name):
    layout = read_head(HEADS[name]())
    assert layout.widths[0] == D
    assert layout.widths[-1] == C
    assert all(isinstance(layer.linear, nn.Linear) for layer in layout.hidden)


def test_layout_holds_the_modules_of_the_head_itself():
    head = HEADS["timm's Mlp"]()
    layout = read_head(head)
    assert layout.hidden[0].linear is head.fc1
    assert layout.output is head.fc2
    assert layout.names.output == "fc2"
    assert layout.trailing == (head.drop2,)


def test_one_activation_module_may_serve_several_layers():
    relu = nn.ReLU()
    layout = read_head(nn.Sequential(nn.Linear(D, H), relu, nn.Linear(H, 5), relu, nn.Linear(5, C)))
    assert layout.widths == (D, H, 5, C)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(x)))


class Branching(Residual):
    def forward(self, x):
        return self.fc2(self.fc1(x)) if x.sum() > 1e9 else self.fc1(x)


class TwoOutputs(Residual):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(D, D)

    def forward(self, x):
        x = self.trunk(x).relu()
        return {"classes": self.fc1(x), "boxes": self.fc2(x)}


class TwoTensors(Residual):
    def forward(self, x, mask):
        return self.fc2(F.relu(self.fc1(x)) * mask["rows"])


SHARED = nn.Linear(D, D)
TIED = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
TIED[2].weight = TIED[0].weight


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(D, C), "`Linear` with 1 Linear"),
        (nn.Sequential(nn.Linear(D, H), nn.Linear(H, C)), "Expected an activation before the last Linear"),
        (nn.Sequential(nn.Linear(D, H), nn.Softmax(-1), nn.Linear(H, C)), "Expected an activation before"),
        (
            nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False), nn.ReLU(), nn.Linear(H, C)),
            "but got track_running_stats=False",
        ),
        (
            nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, momentum=None), nn.ReLU(), nn.Linear(H, C)),
            "but got momentum=None",
        ),
        (nn.Sequential(SHARED, nn.ReLU(), SHARED), "one that is called twice"),
        (TIED, "to be its own, but got it as ['0.weight', '2.weight'] too"),
        (nn.Sequential(nn.LazyLinear(H), nn.ReLU(), nn.Linear(H, C)), "but got `LazyLinear`"),
        (Branching(), "Expected two layers of `Branching` to be called, but 1 were"),
        (TwoOutputs(), "at 'fc2', to feed it, but got 'fc1' beside it"),
        (TwoTensors(), "reads it from a real call"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_refuses_what_it_cannot_read_with_the_module_at_fault(head, message):
    with pytest.raises(ValueError, match="Expected") as caught:
        read_head(head)
    assert message in str(caught.value)


def test_a_head_that_takes_more_is_read_from_a_real_call_and_known_from_there_on():
    head = TwoTensors()
    read_head(head, torch.randn(2, D), {"rows": torch.ones(D)})
    assert read_head(head).names.output == "fc2"
    head.fc2 = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    with pytest.raises(ValueError, match="reads it from a real call"):
        read_head(head)


class Counts(Residual):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        self.steps += 1
        return self.fc2(F.dropout(torch.tanh(self.fc1(x)), 0.5))


def test_reading_leaves_no_trace():
    head, random = Counts(), torch.get_rng_state()
    before = dict(vars(head)), head.steps.clone()
    read_head(head)
    assert (dict(vars(head)), head.steps) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in head.modules())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Residual(), "does not take the output of the step before it alone"),
        (nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, C)), "but got `GELU` at '1'"),
        (nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.SiLU()), nn.Linear(H, C)), "but got `SiLU` at '0.1'"),
        (nn.Sequential(nn.Linear(D, H), nn.PReLU(), nn.Linear(H, C)), "PReLU at '1' to be fixed"),
        (nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.BatchNorm1d(H), nn.Linear(H, C)), "`BatchNorm1d` at '2'"),
        (nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.Linear(H, C)), "none before the next Linear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_independent_paths_say_what_has_no_formula(head, message):
    with pytest.raises(ValueError, match="Output and tangent paths keep the forward") as caught:
        freeze_structure(head, paths="independent")
    assert message in str(caught.value)
