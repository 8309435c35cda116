import math

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from glai_lightning.heads import GLAIHead, freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver, RidgeSolver

SOLVERS = [LogisticSolver(), RidgeSolver()]


def blobs(samples: int = 240, *, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % classes
    centers = 2.0 * torch.randn(classes, 5, generator=generator)
    return centers[targets] + torch.randn(samples, 5, generator=generator), targets


def frozen(paths: str = "output", *, classes: int = 3, **settings: object) -> GLAIHead:
    torch.manual_seed(0)
    return freeze_structure(mlp_head(5, [7, 6], classes, **settings), paths=paths)


def snapshot(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def is_as_before(head: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("paths", ["output", "independent"])
def test_the_reported_loss_is_that_of_the_head(paths):
    inputs, targets = blobs()
    head = frozen(paths)
    before = head(inputs).detach()
    report = LogisticSolver(l2=0.0, max_passes=30).solve(head, inputs, targets)
    assert report.loss == pytest.approx(F.cross_entropy(head(inputs), targets).item(), rel=1e-4)
    assert report.start_loss == pytest.approx(F.cross_entropy(before, targets).item(), rel=1e-4)
    assert report.loss < report.start_loss


@pytest.mark.parametrize("paths", ["output", "independent"])
def test_ridge_recovers_a_head_that_differs_in_its_path_weights_alone(paths):
    inputs, _ = blobs()
    head, wanted = frozen(paths).double(), frozen(paths).double()
    with torch.no_grad():
        for parameter in wanted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    inputs = inputs.double()
    RidgeSolver(l2=0.0).solve(head, inputs, wanted(inputs).detach())
    assert torch.allclose(head(inputs), wanted(inputs), atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_path_weights_change_and_in_place(solver):
    inputs, targets = blobs()
    head = frozen(batch_norm=True)
    before, parameters = snapshot(head), dict(head.named_parameters())
    solver.solve(head, inputs, targets)
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"6.weight", "6.bias"}
    assert all(parameters[name] is parameter for name, parameter in head.named_parameters())
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_solve_like_tensors(solver):
    inputs, targets = blobs()
    whole, parts = frozen(), frozen()
    solver.solve(whole, inputs, targets)
    solver.solve(parts, list(zip(inputs.split(50), targets.split(50), strict=True)))
    assert torch.allclose(whole(inputs), parts(inputs), atol=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("as_batches", [False, True])
def test_validation_keeps_a_head_that_no_solution_improves(solver, as_batches):
    inputs, targets = blobs()
    head = frozen()
    LogisticSolver(l2=0.0, max_passes=60).solve(head, inputs, targets)
    predicted = head(inputs).argmax(1)
    before = snapshot(head)
    validation = [(inputs, predicted)] if as_batches else (inputs, predicted)
    noise = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))]
    report = solver.solve(head, inputs, noise, validation=validation)
    assert is_as_before(head, before)
    assert report.best_step == 0
    if isinstance(solver, LogisticSolver):
        assert report.score == report.start_score == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_head_keeps_its_dtype(dtype):
    inputs, targets = blobs()
    head = frozen().to(dtype)
    LogisticSolver().solve(head, inputs, targets)
    assert {parameter.dtype for parameter in head.parameters()} == {dtype}


def test_the_mode_of_the_head_is_left_alone():
    inputs, targets = blobs()
    head = frozen(dropout=0.5).train()
    LogisticSolver().solve(head, inputs, targets)
    assert head.training


def test_a_binary_head_of_one_logit_is_solved():
    inputs, targets = blobs(classes=2)
    for solver in SOLVERS:
        head = frozen(classes=1)
        solver.solve(head, inputs, targets)
        assert ((head(inputs).squeeze(1) > 0) == targets).double().mean() > 0.9


def test_a_head_without_output_bias_is_solved():
    inputs, targets = blobs()
    head = freeze_structure(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)))
    assert LogisticSolver().solve(head, inputs, targets).loss < math.log(3.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        (torch.full((4, 5), math.nan), torch.zeros(4).long(), ValueError, "Expected features to be finite"),
        (torch.zeros(4, 5), torch.full((4,), 3), ValueError, r"Expected class labels in \[0, 2\]"),
        (torch.zeros(4, 6), torch.zeros(4).long(), ValueError, r"Expected inputs of shape \(samples, 5\)"),
        (torch.zeros(4, 5), torch.zeros(3).long(), ValueError, "Expected as many targets as features"),
        (torch.zeros(0, 5), torch.zeros(0).long(), ValueError, "Expected at least one sample"),
        ([], None, ValueError, "Expected at least one sample"),
        (iter([]), None, TypeError, "Expected batches that can be read several times"),
    ],
)
def test_after_an_error_the_head_is_as_it_was(solver, inputs, targets, error, message):
    head = frozen()
    before = snapshot(head)
    with pytest.raises(error, match=message):
        solver.solve(head, inputs, targets)
    assert is_as_before(head, before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_heads_that_are_not_linear_in_their_path_weights_are_an_error(solver):
    inputs, targets = blobs()
    with pytest.raises(TypeError, match="Expected the head to be a `GLAIHead`, but got `Sequential`"):
        solver.solve(mlp_head(5, 7, 3), inputs, targets)
    with pytest.raises(ValueError, match="Expected `paths` to be 'output' or 'independent'"):
        solver.solve(frozen("tangent"), inputs, targets)
    normed = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"Expected no module after the head's last Linear.*BatchNorm1d"):
        solver.solve(freeze_structure(normed), inputs, targets)


def test_settings_out_of_range_are_an_error_when_a_solver_is_made():
    with pytest.raises(ValueError, match="Expected `loss`"):
        LogisticSolver(loss="hinge")
    with pytest.raises(ValueError, match="Expected `l2` to be a number or several, but got none"):
        LogisticSolver(l2=[])
    with pytest.raises(ValueError, match="Expected `l2`"):
        RidgeSolver(l2=[-1.0])


@pytest.mark.parametrize(
    ("class_path", "init_args", "solver"),
    [
        ("glai_lightning.solvers.LogisticSolver", {"l2": 0.1, "class_weights": [1.0, 2.0]}, LogisticSolver),
        ("glai_lightning.solvers.RidgeSolver", {"l2": [0.1, 1.0]}, RidgeSolver),
    ],
)
def test_solvers_are_built_from_configuration(class_path, init_args, solver):
    parser = ArgumentParser()
    parser.add_argument("--solver", type=LogisticSolver | RidgeSolver)
    config = parser.parse_object({"solver": {"class_path": class_path, "init_args": init_args}})
    built = parser.instantiate_classes(config).solver
    assert built == solver(**init_args)
