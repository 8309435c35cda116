"""The sides of a comparison."""

import pytest
import torch
from fits import FEATURES
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from glai_lightning import glu_head, matched_hidden_features, mlp_head, polyglu_head, random_feature_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.comparison.heads import HEADS, head_in_place, matched_head
from glai_lightning.comparison.variants import find_variant, find_variants, freeze_callback
from glai_lightning.heads import freeze_structure
from glai_lightning.solvers import LogisticSolver, RidgeSolver


def test_names_are_found_in_their_order():
    names = ["random+solve", "mlp", "output+solve"]
    assert [variant.name for variant in find_variants(names)] == names
    assert find_variants("random+solve, mlp,output+solve") == find_variants(names)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("mlp,all", r"Expected `variants` to be some of 'mlp', 'output\+solve', .* but got 'all'"),
        ("mlp,output,output", "Expected every name in `variants` to be given once"),
        ("output,tangent", "Expected `variants` to hold 'mlp'"),
        ("mlp", "at least one to compare with it"),
        ("", "but got ''"),
        ("mlp,annealed", r"Expected 'annealed' to stand beside 'output\+solve', whose time it is given"),
    ],
)
def test_names_that_make_no_comparison_are_refused(names, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        find_variants(names)


def test_heads_stand_beside_the_variants_and_the_mlp_first():
    heads = ["mlp", "output+solve", "glu", "glu+solve", "random", "random+solve"]
    assert [variant.name for variant in find_variants(None, "glu,random")] == heads
    assert [variant.name for variant in find_variants("mlp,random+solve,output", ["random"])] == [
        *("mlp", "random+solve", "output", "output+solve", "random"),
    ]
    with pytest.raises(MisconfigurationException, match="Expected every name in `heads` to be given once"):
        find_variants(None, "glu,glu")


def test_a_variant_takes_the_freeze_rule_and_decides_paths_and_solver():
    given = StructureFreezeCallback(
        "blocks.head", "tangent", churn_tolerance=0.3, patience=2, probe_size=7, solver=None, min_steps=0
    )
    callback = freeze_callback(find_variant("output+solve"), given, LogisticSolver(l2=0.5))
    assert (callback.head, callback.churn_tolerance, callback.patience) == ("blocks.head", 0.3, 2)
    assert (callback.probe_size, callback.paths) == (7, "output")
    assert (callback.solver, callback.stop_after_solve) == (LogisticSolver(l2=0.5), True)


def test_a_variant_that_trains_on_has_no_solver():
    given = StructureFreezeCallback(solver=RidgeSolver(), stop_after_solve=True, min_steps=0)
    callback = freeze_callback(find_variant("output"), given, RidgeSolver())
    assert (callback.solver, callback.stop_after_solve) == (None, False)


def test_a_random_structure_is_frozen_before_the_first_step():
    callback = freeze_callback(
        find_variant("random+solve"), StructureFreezeCallback(freeze_at_epoch=5, solver=None), RidgeSolver()
    )
    assert callback.freeze_at_epoch == 0


def test_the_rule_of_somebodys_own_callback_is_kept():
    class Impatient(StructureFreezeCallback):
        def should_freeze(self, head):
            return True

    assert isinstance(freeze_callback(find_variant("tangent"), Impatient(), None), Impatient)


def test_the_mlp_has_no_callback():
    assert freeze_callback(find_variant("mlp"), StructureFreezeCallback(solver=None, min_steps=0), None) is None


def weights(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_matched_head_has_the_width_that_the_paper_takes():
    head = matched_head(mlp_head(64, 1024, 10))
    assert head[0].out_features == matched_hidden_features(64, 1024, 10)


def test_a_matched_deep_head_has_as_many_path_weights_as_the_mlp_has_weights():
    mlp = mlp_head(20, [200, 100], 5)
    narrow = matched_head(mlp)
    paths = freeze_structure(narrow, paths="independent").num_paths
    assert 0.7 * weights(mlp) < paths <= weights(mlp)
    assert narrow[0].out_features == pytest.approx(2 * narrow[2].out_features, abs=1)


def test_a_matched_head_is_a_fresh_head_of_the_same_layers():
    linear = nn.Linear(FEATURES, 64, bias=False)
    layers = [linear, nn.BatchNorm1d(64, momentum=0.3), nn.LeakyReLU(0.2), nn.Dropout(0.4), nn.Linear(64, 3)]
    mlp = nn.Sequential(nn.Flatten(), *layers)
    narrow = matched_head(nn.Sequential(mlp, nn.BatchNorm1d(3)))
    kinds = [nn.Flatten, *map(type, layers), nn.BatchNorm1d]
    assert [type(module) for module in narrow] == kinds
    assert narrow[1].bias is None
    assert narrow[2].momentum == 0.3
    assert narrow[3].negative_slope == 0.2
    assert narrow[4].p == head_in_place(mlp, "gelu")[4].p == 0.4
    assert mlp[1] is linear
    assert not {id(p) for p in narrow.parameters()} & {id(p) for p in mlp.parameters()}


@pytest.mark.parametrize("mlp", [mlp_head(20, 64, 5), mlp_head(20, [64, 32], 5, batch_norm=True), mlp_head(3, 2, 2)])
def test_no_width_brings_a_head_nearer_to_the_parameters_of_the_mlp(mlp):
    for name in ("gelu", "silu", "tanh"):
        assert weights(head_in_place(mlp, name)) == weights(mlp)
    for name, make in {"glu": glu_head, "polyglu": polyglu_head, "random": random_feature_head}.items():
        head = head_in_place(mlp, name)
        width = next(linear for linear in head.modules() if isinstance(linear, nn.Linear)).out_features
        sizes = [weights(make(mlp[0].in_features, h, mlp[-1].out_features)) for h in (max(1, width - 1), width + 1)]
        off = abs(weights(head) - weights(mlp))
        assert all(off <= abs(size - weights(mlp)) for size in sizes)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "mlp"])
def test_a_head_in_place_keeps_what_stands_around_and_the_dtype(name):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3), nn.BatchNorm1d(3)).double()
    head = head_in_place(mlp, name)
    assert (type(head[0]), type(head[-1])) == (nn.Flatten, nn.BatchNorm1d)
    assert head(torch.randn(5, 4, 2, dtype=torch.float64)).shape == (5, 3)
    assert isinstance(freeze_structure(head_in_place(mlp_head(8, 16, 3), name)), nn.Module)


def test_a_linear_head_is_linear_in_its_inputs():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    head = head_in_place(mlp, "linear").eval()
    x = torch.randn(2, 4, 2, 4)
    torch.testing.assert_close(head(x[0]) + head(x[1]), 2 * head(x.mean(0)))
    torch.testing.assert_close(head(x[0]), head[-1](head[-2](x[0].flatten(1))))


def test_a_head_that_cannot_be_read_cannot_be_matched():
    with pytest.raises(ValueError, match="Expected a head with at least one hidden layer"):
        matched_head(nn.Linear(4, 3))
