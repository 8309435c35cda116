import pytest
import torch.nn.functional as F
from head_examples import HEADS, C, D, H
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

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


class Normalising(Residual):
    def forward(self, x):
        return self.fc2(F.normalize(F.relu(self.fc1(x))))


class Branching(Residual):
    def forward(self, x):
        return self.fc2(self.fc1(x)) if x.sum() > 0 else self.fc1(x)


SHARED = nn.Linear(D, D)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(D, C), "`Linear` with 1 Linear"),
        (nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, C)), "but got `GELU` at '1'"),
        (nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)), "but got `Tanh` at '1'"),
        (nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.SiLU()), nn.Linear(H, C)), "but got `SiLU` at '0.1'"),
        (nn.Sequential(nn.Linear(D, H), nn.Linear(H, C)), "but got none before the next Linear"),
        (nn.Sequential(nn.Linear(D, H), nn.PReLU(), nn.Linear(H, C)), "PReLU at '1' to be fixed"),
        (
            nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False), nn.ReLU(), nn.Linear(H, C)),
            "but got track_running_stats=False",
        ),
        (
            nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, momentum=None), nn.ReLU(), nn.Linear(H, C)),
            "but got momentum=None",
        ),
        (
            nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.BatchNorm1d(H), nn.Linear(H, C)),
            "but got `BatchNorm1d` at '2'",
        ),
        (nn.Sequential(SHARED, nn.ReLU(), SHARED), "one that is called twice"),
        (nn.Sequential(nn.LazyLinear(H), nn.ReLU(), nn.Linear(H, C)), "but got `LazyLinear`"),
        (nn.Sequential(nn.Linear(D, H), nn.ReLU(), weight_norm(nn.Linear(H, C))), "but got `ParametrizedLinear`"),
        (nn.Conv2d(3, 4, 1), "`Conv2d` with 0 Linear"),
        (Residual(), "does not take the output of the step before it alone"),
        (Normalising(), "it calls `normalize`"),
        (Branching(), "could not be traced"),
        (nn.Sequential(nn.Flatten(), Residual()), "`Residual` at '1'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_refuses_what_it_cannot_read_with_the_module_at_fault(head, message):
    with pytest.raises(ValueError, match="Expected") as caught:
        read_head(head)
    assert message in str(caught.value)
