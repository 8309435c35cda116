import pytest
import torch
from head_examples import D
from hypothesis import given
from hypothesis import strategies as st

from glai_lightning import freeze_structure, matched_hidden_features, mlp_head
from glai_lightning.heads.paths import count_path_weights


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000))
def test_matched_width_has_about_as_many_paths_as_the_mlp_has_weights(inputs, hidden, outputs):
    matched = matched_hidden_features(inputs, hidden, outputs)
    weights = hidden * (inputs + outputs)
    assert matched == max(1, round(weights / (inputs * outputs)))
    assert matched == 1 or abs(matched * inputs * outputs - weights) <= inputs * outputs / 2


def test_matched_width_refuses_sizes_below_one():
    with pytest.raises(ValueError, match="Expected `hidden_features` to be an integer of at least 1, but got 0"):
        matched_hidden_features(4, 0, 3)


@given(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4))
def test_number_of_paths_is_the_number_of_independent_path_weights(inputs, hidden, outputs):
    head = freeze_structure(mlp_head(inputs, hidden, outputs), paths="independent")
    assert head.num_paths == sum(p.numel() for p in head.parameters() if p.requires_grad)


def test_number_of_paths_of_one_hidden_layer():
    assert count_path_weights((512, 64, 10), [True], True) == 512 * 64 * 10 + 64 * 10 + 10


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_independent_outputs_are_linear_in_the_path_activations(hidden):
    head = freeze_structure(mlp_head(D, hidden, 3).double(), paths="independent")
    x = torch.randn(20, D, dtype=torch.float64)
    paths = head[-1]
    weights = torch.cat([paths.path_weights.flatten(1), *paths.path_biases()], dim=1)
    torch.testing.assert_close(head.path_activations(x) @ weights.T + paths.bias, head(x))


def test_tangent_outputs_are_linear_in_the_path_activations_after_training():
    head = freeze_structure(mlp_head(D, [5, 4], 3).double(), paths="tangent")
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(400, D, dtype=torch.float64)
    features = torch.cat([head.path_activations(x), torch.ones(400, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(features, head(x), driver="gelsd").solution
    torch.testing.assert_close(features @ solution, head(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_outputs_are_affine_in_what_is_trained(paths):
    heads = [freeze_structure(mlp_head(D, [5, 4], 3, batch_norm=True).double(), paths=paths).eval() for _ in range(1)]
    head, x = heads[0], torch.randn(50, D, dtype=torch.float64)
    trainable = [p for p in head.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trainable]
    step = [torch.randn_like(p) for p in trainable]

    def outputs_at(distance):
        with torch.no_grad():
            for parameter, origin, direction in zip(trainable, start, step, strict=True):
                parameter.copy_(origin + distance * direction)
            return head(x)

    torch.testing.assert_close(outputs_at(2.0) - outputs_at(1.0), outputs_at(1.0) - outputs_at(0.0))
