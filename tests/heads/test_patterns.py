import copy

import pytest
import torch
from head_examples import HEADS, C, D, H, trained
from torch import nn

from glai_lightning import activation_patterns, mlp_head
from glai_lightning.heads.layout import read_head
from glai_lightning.heads.patterns import HiddenUnits


@pytest.mark.parametrize("name", HEADS)
def test_patterns_are_the_signs_of_what_the_activations_are_given(name):
    head = trained(HEADS[name]())
    seen, x = [], torch.randn(50, D)
    handles = [
        layer.activation.register_forward_pre_hook(lambda _, args: seen.append(args[0] > 0))
        for layer in read_head(head).hidden
    ]
    if name != "functional ReLU":
        head(x)
    else:
        seen.append(head.fc1(x) > 0)
    for handle in handles:
        handle.remove()
    patterns = activation_patterns(head, x)
    assert len(patterns) == len(seen)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(patterns, seen, strict=True))


def test_patterns_do_not_depend_on_the_mode_and_leave_no_trace():
    head = trained(mlp_head(D, [H, 7], C, batch_norm=True, dropout=0.5))
    x = torch.randn(40, D)
    expected = activation_patterns(head, x)
    head.train()
    before = copy.deepcopy(head.state_dict())
    random_state = torch.get_rng_state()
    patterns = activation_patterns(head, x)
    assert all(torch.equal(a, b) for a, b in zip(patterns, expected, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in head.modules())


def test_patterns_are_those_of_float32_under_autocast():
    head, x = mlp_head(D, 64, C), torch.randn(200, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = activation_patterns(head, x)
    assert torch.equal(under_autocast[0], activation_patterns(head, x)[0])


def test_patterns_keep_leading_dimensions():
    head, x = mlp_head(D, H, C), torch.randn(2, 5, D)
    (pattern,) = activation_patterns(head, x)
    assert pattern.shape == (2, 5, H)
    assert torch.equal(pattern.flatten(0, 1), activation_patterns(head, x.flatten(0, 1))[0])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_weights_compute_linear_and_batch_norm_together(affine, bias):
    head = nn.Sequential(nn.Linear(D, H, bias=bias), nn.BatchNorm1d(H, affine=affine), nn.ReLU(), nn.Linear(H, C))
    head = trained(head, torch.float64)
    units = HiddenUnits.of(read_head(head).hidden[0])
    weight, folded_bias = units.folded()
    x = torch.randn(30, D, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.linear(x, weight, folded_bias), head[1](head[0](x)))
