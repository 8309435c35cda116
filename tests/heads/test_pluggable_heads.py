import pytest
import torch
from fits import make_trainer
from head_examples import C, D
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from glai_lightning import (
    SupervisedModule,
    distil_eugen,
    eugen_head,
    freeze_structure,
    glu_head,
    mlp_head,
    polyglu_head,
    random_feature_head,
    rectify,
)
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver, RidgeSolver

H = 24
HEADS = {
    "glu": lambda: glu_head(D, H, C, kind="glu"),
    "swiglu": lambda: glu_head(D, H, C),
    "reglu": lambda: glu_head(D, H, C, kind="reglu"),
    "polyglu": lambda: polyglu_head(D, H, C),
    "eugen": lambda: eugen_head(D, C, features=H),
    "trained eugen": lambda: eugen_head(D, C, order=3, features=H, trained=True),
    "random features": lambda: random_feature_head(D, H, C, activation="Tanh"),
}


@pytest.mark.parametrize("name", HEADS)
def test_pluggable_heads_freeze_exactly_and_are_solved(name):
    torch.manual_seed(1)
    head, x = HEADS[name]().double().eval(), torch.randn(200, D, dtype=torch.float64)
    for paths in ("output", "tangent"):
        frozen = freeze_structure(head, paths=paths)
        assert (frozen(x) - head(x)).abs().max() <= (0 if paths == "output" else 1e-12) * head(x).abs().max()
    frozen, targets = freeze_structure(head), x[:, :C].argmax(1)
    report = LogisticSolver(l2=1e-4).solve(frozen, x, targets)
    assert report.loss < 0.7 * report.start_loss
    assert RidgeSolver(l2=1e-4).solve(frozen, x, x[:, :C]).loss < 0.5


@pytest.mark.parametrize("name", ["swiglu", "polyglu", "trained eugen"])
def test_a_fit_freezes_and_solves_a_pluggable_head(name):
    torch.manual_seed(0)
    x = torch.randn(256, D)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0)
    data = FeaturesDataModule(arrays={"x_train": x, "y_train": y, "x_test": x, "y_test": y}, batch_size=32)
    callback = StructureFreezeCallback(freeze_at_epoch=2, verbose=False)
    make_trainer(callback, max_epochs=4).fit(SupervisedModule(HEADS[name]()), data)
    assert callback.frozen
    assert callback.solve_report.loss < callback.solve_report.start_loss
    assert len(callback.churn_history) == 2
    assert callback.churn_history[0] > 0


def test_routes_of_a_polyglu_head_are_its_pattern_and_its_temperature_falls():
    head, x = polyglu_head(D, H, C, temperature=1.0, lowest_temperature=0.3, decay=0.5), torch.randn(50, D)
    routes = freeze_structure(head).patterns(x)[1]
    assert routes.shape == (50, H, 4)
    assert bool((routes.sum(-1) == 1).all())
    with torch.no_grad():
        head.alpha[:, 3] = 100.0
    assert bool(freeze_structure(head).patterns(x)[1][..., 3].all())
    gate = head.gate(x)
    expected = head.output(nn.functional.gelu(gate) * head.value(x))
    assert torch.allclose(head.eval()(x), expected, atol=1e-6)
    head.train()(x), head(x)
    assert head.activation.temperature == pytest.approx(0.3)


def test_eugen_features_estimate_polynomials_without_bias():
    torch.manual_seed(0)
    u, w = torch.randn(2, 1, D, dtype=torch.float64)
    head = eugen_head(D, 1, order=2, features=20_000).double()
    features = freeze_structure(head).path_activations(torch.cat([u, w]))
    extended = torch.cat([torch.cat([u, w]), torch.ones(2, 1), torch.cat([u, w]).abs()], 1)
    parts = features[:, 1:].split(20_000, dim=1)
    for power, part in enumerate(parts, start=1):
        assert part[0] @ part[1] == pytest.approx(float(extended[0] @ extended[1]) ** power, rel=0.35)


def test_a_layer_with_a_polynomial_activation_is_distilled():
    torch.manual_seed(0)
    layer, x = nn.Linear(D, 3).double(), torch.randn(2000, D, dtype=torch.float64)
    square = nn.Sequential(layer, type("Square", (nn.Module,), {"forward": lambda self, z: z * z})())
    head, others = distil_eugen(square, x, features=200), torch.randn(100, D, dtype=torch.float64)
    assert torch.nn.functional.mse_loss(head(others), square(others)) < 1e-6 * square(others).square().mean()


def test_a_rectified_head_has_exact_paths_and_is_near_what_it_was():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(D, 128), nn.GELU(), nn.Linear(128, 32), nn.SiLU(), nn.Linear(32, C))
    rectified = rectify(head, torch.randn(2000, D))
    assert rectified.error < 0.1 < rectified.error_before
    assert isinstance(head[1], nn.GELU)
    assert torch.equal(rectified.head[0].weight, head[0].weight)
    freeze_structure(rectified.head, paths="independent")


SMOOTH = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, C))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glu_head(D, H, C, kind="relu"), "Expected `kind` to be 'glu', 'swiglu', 'geglu' or 'reglu'"),
        (lambda: polyglu_head(D, H, C, decay=0.0), "Expected `decay`"),
        (lambda: eugen_head(D, C, order=0), "Expected `order` to be an integer of at least 1, but got 0."),
        (lambda: random_feature_head(D, H, C, activation="Nothing"), "Expected `activation` to be a class"),
        (lambda: eugen_head(D, C, order=10**12), "Expected `order` to be an integer from 1 to 8"),
        (lambda: polyglu_head(D, H, C, lowest_temperature=1.5), "Expected `lowest_temperature` .* in \\(0, 1\\]"),
        (lambda: random_feature_head(D, H, C, activation="Linear"), "a class that is made without arguments"),
        (lambda: rectify(nn.Linear(D, C), torch.randn(9, D)), "with 1 Linear"),
        (lambda: rectify(SMOOTH, torch.randn(9, D + 1)), "Expected `inputs` to be what `head` takes"),
        (lambda: rectify(SMOOTH, torch.randn(9, D).double()), "Expected `inputs` to be what `head` takes"),
        (lambda: rectify(SMOOTH, torch.full((9, D), torch.nan)), "two or more that are finite"),
        (lambda: rectify(SMOOTH, torch.randn(1, D)), "two or more that are finite, but got 1"),
        (lambda: rectify(mlp_head(D, H, C), torch.randn(9, D)), "but got one with ReLU alone"),
        (lambda: rectify(freeze_structure(SMOOTH), torch.randn(9, D)), "whose structure is frozen already"),
        (lambda: distil_eugen(SMOOTH, torch.randn(9, D + 1)), "Expected `inputs` to be what `layer` takes"),
        (lambda: distil_eugen(SMOOTH, torch.full((9, D), torch.inf)), "two or more that are finite"),
        (lambda: distil_eugen(nn.Linear(D, C), torch.randn(9, 2, D)), r"Expected inputs \(N, D\)"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("name", ["glu_head", "polyglu_head", "eugen_head", "random_feature_head"])
def test_heads_are_made_from_yaml(name, tmp_path):
    sizes = {"in_features": D, "out_features": C, **({} if name == "eugen_head" else {"hidden_features": H})}
    parser = LightningArgumentParser()
    parser.add_argument("--head", type=nn.Module)
    config = parser.parse_object({"head": {"class_path": f"glai_lightning.{name}", "init_args": sizes}})
    assert parser.instantiate_classes(config).head(torch.randn(2, D)).shape == (2, C)
