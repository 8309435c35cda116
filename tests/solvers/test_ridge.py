import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.solvers import RidgeSolver


def solve_ridge(features, targets=None, *, weight, bias=None, l2=None, validation=None, group=None):
    solver = RidgeSolver(l2=l2)
    return solver.solve_features(features, targets, weight=weight, bias=bias, validation=validation, group=group)


def regression(samples: int = 80, num_features: int = 6, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, num_features, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_features, outputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return features, features @ weight + 3.0 + noise


def start(outputs: int = 2, num_features: int = 6) -> dict[str, Tensor]:
    return {
        "weight": torch.zeros(outputs, num_features, dtype=torch.float64),
        "bias": torch.zeros(outputs, dtype=torch.float64),
    }


def test_the_solution_is_a_stationary_point_of_the_penalised_squared_error():
    features, targets = regression()
    weight, bias, report = solve_ridge(features, targets, **start(), l2=0.3)
    weight.requires_grad_()
    bias.requires_grad_()
    errors = (F.linear(features, weight, bias) - targets).square().sum(1).mean()
    loss = 0.5 * errors + 0.15 * weight.square().sum()
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    assert report.gradient_norm < 1e-12
    assert all(gradient.norm() < 1e-12 for gradient in torch.autograd.grad(loss, (weight, bias)))


def test_the_loss_at_the_start_is_that_of_the_weights_given():
    features, targets = regression()
    weight, bias = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    report = solve_ridge(features, targets, weight=weight, bias=bias, l2=0.3).report
    errors = (F.linear(features, weight, bias) - targets).square().sum(1).mean()
    assert report.start_loss == pytest.approx((0.5 * errors + 0.15 * weight.square().sum()).item(), rel=1e-12)


def test_without_a_bias_nothing_is_centered():
    features, targets = regression()
    solution = solve_ridge(features, targets, weight=torch.zeros(2, 6, dtype=torch.float64), l2=1e-9)
    assert torch.allclose(solution.weight.t(), torch.linalg.lstsq(features, targets).solution, atol=1e-6)
    assert solution.bias is None


def test_batches_give_the_solution_of_the_whole():
    features, targets = regression()
    whole = solve_ridge(features, targets, **start())
    parts = solve_ridge(list(zip(features.split(7), targets.split(7), strict=True)), **start())
    assert parts.report.l2 == pytest.approx(whole.report.l2)
    assert torch.allclose(parts.weight, whole.weight, atol=1e-10)


def test_leave_one_out_finds_the_strength_that_leaving_out_finds():
    features, targets = regression(20, outputs=1)
    strengths = [1e-3, 1e-2, 1e-1, 1.0, 10.0]

    def error_left_out(l2: float) -> float:
        total = 0.0
        for index in range(20):
            kept = torch.arange(20) != index
            # The sums of the whole are divided by N - 1 and not N, so the penalty on the mean is scaled alike.
            fit = solve_ridge(features[kept], targets[kept], **start(1), l2=l2 * 20 / 19)
            total += (F.linear(features[index], fit.weight, fit.bias) - targets[index]).square().mean().item()
        return total / 20

    report = solve_ridge(features, targets, **start(1), l2=strengths).report
    left_out = [error_left_out(l2) for l2 in strengths]
    assert report.l2 == pytest.approx(strengths[left_out.index(min(left_out))])
    assert dict(report.tried)[report.l2] == pytest.approx(-min(left_out), rel=1e-9)
    assert report.score is None
    assert report.start_score is None
    assert "score" not in str(report)
    assert report.passes == 2


def test_validation_chooses_the_strength_and_may_keep_the_start():
    features, targets = regression(30)
    held_out, held_out_targets = regression(200)
    free = solve_ridge(features, targets, **start(), validation=(held_out, held_out_targets))
    errors = (F.linear(held_out, free.weight, free.bias) - held_out_targets).square().mean()
    assert free.report.score == pytest.approx(-errors.item())
    assert [l2 for l2, _ in free.report.tried] == sorted((l2 for l2, _ in free.report.tried), reverse=True)
    best = solve_ridge(held_out, held_out_targets, **start(), l2=0.0)
    kept = solve_ridge(features, targets, weight=best.weight, bias=best.bias, validation=(held_out, held_out_targets))
    assert torch.equal(kept.weight, best.weight)
    assert kept.report.best_step == 0


def test_outputs_get_a_strength_each_and_score_no_worse_than_with_one_for_all():
    features, targets = regression(300)
    noise = 30.0 * torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.stack([targets[:, 0] + noise, targets[:, 1]], dim=1)
    training, validation = (features[:20], targets[:20]), (features[20:], targets[20:])
    own = solve_ridge(*training, **start(), validation=validation).report
    common = [solve_ridge(*training, **start(), l2=l2, validation=validation).report for l2, _ in own.tried]
    assert own.score > max(report.score for report in common)
    assert own.best_step == 1
    own_strengths = [
        solve_ridge(training[0], training[1][:, [c]], **start(1), validation=(validation[0], validation[1][:, [c]]))
        for c in range(2)
    ]
    assert own.l2 == pytest.approx(sum(solution.report.l2 for solution in own_strengths) / 2)


@pytest.mark.parametrize("outputs", [1, 3])
def test_integer_targets_make_a_classifier(outputs):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(90) % max(outputs, 2)
    features = 4.0 * torch.randn(3, 6, generator=generator)[targets] + torch.randn(90, 6, generator=generator)
    weight, bias, report = solve_ridge(features, targets, weight=torch.zeros(outputs, 6), bias=torch.zeros(outputs))
    logits = F.linear(features, weight, bias)
    predicted = (logits.squeeze(1) > 0).long() if outputs == 1 else logits.argmax(1)
    assert torch.equal(predicted, targets)
    assert dict(report.tried)[report.l2] == 1.0


def test_constant_collinear_and_few_samples_are_solved():
    features, targets = regression(4)
    redundant = torch.cat([features, features[:, :2], torch.ones(4, 1, dtype=torch.float64)], dim=1)
    for l2 in (0.0, 1e-3, None):
        weight, bias, report = solve_ridge(redundant, targets, **start(2, 9), l2=l2)
        assert weight.isfinite().all()
        assert bias.isfinite().all()
        assert math.isfinite(report.loss)
    assert solve_ridge(redundant, targets, **start(2, 9), l2=0.0).report.loss < 1e-10


def test_one_sample_is_met_by_the_bias_alone():
    features, targets = regression(1)
    weight, bias, _ = solve_ridge(features, targets, **start())
    assert torch.equal(weight, torch.zeros_like(weight))
    assert torch.allclose(bias, targets[0])


def test_columns_of_extreme_scales_give_finite_weights_and_a_fit():
    features, targets = regression()
    scales = torch.tensor([1e-8, 1e-4, 1.0, 1e4, 1e8, 1.0], dtype=torch.float64)
    weight, _, report = solve_ridge(features * scales, targets, **start())
    assert weight.isfinite().all()
    assert report.loss < report.start_loss


def test_means_far_from_zero_cost_no_precision():
    features, targets = regression()
    plain = solve_ridge(features, targets, **start(), l2=1e-2)
    shifted = solve_ridge(features + 1e6, targets, **start(), l2=1e-2)
    assert torch.allclose(shifted.weight, plain.weight, atol=1e-7)


def test_a_class_without_samples_is_not_predicted():
    features, _ = regression()
    weight, bias, _ = solve_ridge(features, torch.arange(80) % 2, **start(4))
    assert int(F.linear(features, weight, bias).argmax(1).max()) <= 1


@pytest.mark.parametrize(
    ("features", "targets", "error", "message"),
    [
        (
            torch.zeros(4, 6),
            torch.tensor([0, 1, 2, 1]),
            ValueError,
            r"Expected class labels in \[0, 1\], but got 0 to 2",
        ),
        (torch.zeros(4, 6), torch.zeros(4), ValueError, r"Expected targets of shape \(samples, 2\)"),
        (torch.zeros(4, 6), torch.zeros(4, 2).long(), ValueError, r"Expected class labels of shape \(samples,\)"),
        (torch.zeros(4, 6), torch.full((4, 2), math.nan), ValueError, "Expected targets to be finite"),
        (torch.full((4, 6), math.inf), torch.zeros(4, 2), ValueError, "Expected features to be finite"),
        (torch.zeros(4, 5), torch.zeros(4, 2), ValueError, "Expected 6 features a sample"),
        ([], None, ValueError, "Expected at least one sample"),
        (
            [(torch.zeros(1, 6), torch.zeros(1, 2)), (torch.zeros(1, 6), torch.zeros(1).long())],
            None,
            TypeError,
            "Expected all targets to be class labels",
        ),
    ],
)
def test_unfit_data_is_an_error(features, targets, error, message):
    with pytest.raises(error, match=message):
        solve_ridge(features, targets, **start())


@pytest.mark.parametrize("l2", [-1.0, math.nan, [], [1.0, -1.0]])
def test_strengths_out_of_range_are_an_error(l2):
    with pytest.raises(ValueError, match="Expected `l2` to be a"):
        solve_ridge(*regression(), **start(), l2=l2)


def test_validation_that_is_empty_or_not_finite_is_an_error():
    features, targets = regression()
    with pytest.raises(ValueError, match="Expected at least one validation sample"):
        solve_ridge(features, targets, **start(), validation=[])
    with pytest.raises(ValueError, match="Expected validation features to be finite"):
        solve_ridge(features, targets, **start(), validation=(features * math.nan, targets))
