import itertools

import torch
from torch import Tensor

from glai_lightning.solvers.cross_entropy import CrossEntropy
from glai_lightning.solvers.lbfgs import LBFGS, Point
from glai_lightning.solvers.preconditioner import FeatureSpectrum
from glai_lightning.solvers.processes import Processes


class Quadratic:
    """Half of w' A w - b' w, over weights of shape (2, 3)."""

    def __init__(self, condition: float) -> None:
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
        self.hessian = basis @ torch.diag(torch.logspace(0, condition, 6, dtype=torch.float64)) @ basis.t()
        self.linear = torch.randn(6, generator=generator, dtype=torch.float64)

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        flat = weights.flatten()
        gradient = self.hessian @ flat - self.linear
        return float(0.5 * flat @ (gradient - self.linear)), gradient.view_as(weights)

    def begin(self) -> Point:
        weights = torch.zeros(2, 3, dtype=torch.float64)
        return Point(weights, *self(weights))


def test_with_the_inverse_hessian_as_preconditioner_one_step_is_enough():
    quadratic = Quadratic(6.0)
    minimiser = LBFGS(quadratic, quadratic.begin(), lambda g: torch.linalg.solve(quadratic.hessian, g.flatten()))
    assert minimiser.step(1)
    assert minimiser.point.gradient.norm() < 1e-8
    assert minimiser.evaluations == 1


def dense_bfgs_direction(points: list[Point], inverse: Tensor) -> Tensor:
    for before, after in itertools.pairwise(points):
        step = (after.weights - before.weights).flatten()
        change = (after.gradient - before.gradient).flatten()
        reflection = torch.eye(6, dtype=torch.float64) - step.outer(change) / (step @ change)
        inverse = reflection @ inverse @ reflection.t() + step.outer(step) / (step @ change)
    return inverse @ points[-1].gradient.flatten()


def test_the_compact_form_is_the_dense_bfgs_update():
    quadratic = Quadratic(2.0)
    minimiser = LBFGS(quadratic, quadratic.begin(), lambda gradient: gradient)
    points = [minimiser.point]
    for _ in range(4):
        assert minimiser.step(20)
        points.append(minimiser.point)
    change = (points[-1].gradient - points[-2].gradient).flatten()
    step = (points[-1].weights - points[-2].weights).flatten()
    scaled_identity = torch.eye(6, dtype=torch.float64) * (step @ change) / (change @ change)
    expected = dense_bfgs_direction(points, scaled_identity)
    assert torch.allclose(minimiser._inverse_hessian_times_gradient(), expected, rtol=1e-8)


def test_the_oldest_steps_are_forgotten_and_the_loss_goes_on_falling():
    quadratic = Quadratic(3.0)
    minimiser = LBFGS(quadratic, quadratic.begin(), lambda gradient: gradient, memory=2)
    for _ in range(300):
        minimiser.step(20)
    assert minimiser.point.gradient.norm() < 1e-3


def test_a_step_without_descent_leaves_the_point_where_it_is():
    begin = Point(torch.zeros(1, 2), 0.0, torch.ones(1, 2))
    minimiser = LBFGS(lambda weights: (1.0, torch.ones(1, 2)), begin, lambda gradient: gradient)
    assert not minimiser.step(10)
    assert minimiser.point is begin
    assert minimiser.evaluations <= 10


def test_a_change_of_the_objective_keeps_what_was_learned_exactly():
    quadratic, stronger = Quadratic(2.0), Quadratic(2.0)
    stronger.hessian = stronger.hessian + 3.0 * torch.eye(6, dtype=torch.float64)
    changed = LBFGS(quadratic, quadratic.begin(), lambda gradient: gradient)
    for _ in range(4):
        assert changed.step(20)
    weights = changed.point.weights
    steps, changes = changed._steps[:4], changed._changes[:4]
    changed.change_objective(stronger, Point(weights, *stronger(weights)), lambda gradient: gradient, lambda s: 3.0 * s)
    assert torch.allclose(changes, steps @ stronger.hessian, rtol=1e-10)
    for _ in range(30):
        changed.step(20)
    assert changed.point.gradient.norm() < 1e-6


def test_at_uniform_probabilities_the_preconditioner_is_the_inverse_hessian():
    features = torch.randn(200, 4, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01, 1.0]) + 2.0
    with_ones = torch.cat([features, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    covariance = with_ones.t() @ with_ones / 200 / 3.0
    direction = torch.randn(3, 5, dtype=torch.float64)
    direction -= direction.mean(0)
    spectrum = FeatureSpectrum.of(features, has_bias=True, processes=Processes())
    loss = CrossEntropy(torch.ones(3, dtype=torch.float64), 0.0)
    rotation, variances = loss.curvature(torch.zeros(3, 200, dtype=torch.float64))
    inverse = spectrum.preconditioner(rotation, variances, 0.0)
    assert torch.allclose(inverse(direction @ covariance), direction, atol=1e-6)


def test_the_penalty_is_exact_where_columns_are_of_one_scale():
    features = torch.randn(300, 4, dtype=torch.float64)
    centered = features - features.mean(0)
    hessian = centered.t() @ centered / 300 / 3.0 + 0.1 * torch.eye(4, dtype=torch.float64)
    direction = torch.randn(3, 4, dtype=torch.float64)
    direction -= direction.mean(0)
    spectrum = FeatureSpectrum.of(centered, has_bias=False, processes=Processes())
    loss = CrossEntropy(torch.ones(3, dtype=torch.float64), 0.0)
    inverse = spectrum.preconditioner(*loss.curvature(torch.zeros(3, 300, dtype=torch.float64)), 0.1)
    assert torch.allclose(inverse(direction @ hessian), direction, atol=1e-6)
