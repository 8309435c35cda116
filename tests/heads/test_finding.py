import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glai_lightning import find_heads, freeze_structure, glu_head, mlp_head


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True)
        self.encoder, self.norm = nn.TransformerEncoder(layer, 1), nn.BatchNorm1d(8)
        self.gated, self.classifier = glu_head(8, 6, 8), mlp_head(8, 12, 3)
        self.fc1, self.fc2, self.calls = nn.Linear(8, 5), nn.Linear(5, 2), 0

    def forward(self, tokens, mask):
        self.calls += 1
        h = self.gated(self.norm(self.encoder(tokens).mean(1)) * mask)
        return {"classes": self.classifier(h), "boxes": self.fc2(torch.tanh(self.fc1(h)))}


def test_heads_are_found_with_names_widths_activations_and_shares():
    net, batch = Net(), {"tokens": torch.randn(4, 3, 8), "mask": torch.ones(8)}
    state = copy.deepcopy(net.state_dict())
    found = {head.name: head for head in find_heads(net, batch)}
    assert list(found) == [
        "encoder.layers.0.linear1+encoder.layers.0.linear2", "gated", "classifier", "fc1+fc2"
    ]  # fmt: skip
    assert [head.widths for head in found.values()] == [(8, 16, 8), (8, 6, 8), (8, 12, 3), (8, 5, 2)]
    assert [head.activations for head in found.values()] == [("gelu",), ("SiLU",), ("ReLU",), ("tanh",)]
    assert found["classifier"].paths == ("output", "tangent", "independent")
    assert found["gated"].paths == ("output", "tangent")
    assert found["fc1+fc2"].paths == ("output",)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert found["classifier"].parameters == pytest.approx((8 * 12 + 12 + 12 * 3 + 3) / parameters)
    products = {"ffn": 3 * 2 * 8 * 16, "gated": 3 * 8 * 6, "classifier": 8 * 12 + 12 * 3, "fc": 8 * 5 + 5 * 2}
    shares = [head.multiply_adds for head in found.values()]
    assert shares[1] / shares[0] == pytest.approx(products["gated"] / products["ffn"])
    assert shares[2] / shares[3] == pytest.approx(products["classifier"] / products["fc"])
    assert sum(shares) < 1
    assert net.calls == 0
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_what_was_found_can_be_frozen_though_it_takes_what_cannot_be_made_up():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Bilinear(3, 3, 4)
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, a, b):
            return self.fc2(F.silu(self.fc1(self.head(a, b))))

    net = nn.ModuleDict({"pair": Pair()})
    net.forward = lambda a, b: net["pair"](a, b)
    with pytest.raises(ValueError, match="reads it from a real call"):
        freeze_structure(net["pair"])
    a = torch.randn(4, 3)
    assert [head.name for head in find_heads(net, (a, a))] == ["pair"]
    assert torch.equal(freeze_structure(net["pair"])(a, a), net["pair"](a, a))


@pytest.mark.parametrize(
    ("module", "batch", "error"), [("head", 1, TypeError), (mlp_head(4, 8, 3), torch.randn(2, 5), ValueError)]
)
def test_what_cannot_be_called_is_refused(module, batch, error):
    with pytest.raises(error, match="Expected"):
        find_heads(module, batch)
