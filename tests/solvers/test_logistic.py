import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glai_lightning.solvers import LogisticSolver
from glai_lightning.solvers.feature_batches import SystematicSample
from glai_lightning.solvers.report import LinearSolution


def solve_logistic(features, targets=None, *, weight, bias=None, validation=None, sample_weights=None, **settings):
    solver = LogisticSolver(**{"l2": 1e-3, "max_passes": 30, **settings})
    return solver.solve_features(
        features, targets, weight=weight, bias=bias, validation=validation, sample_weights=sample_weights
    )


def blobs(samples: int = 300, num_features: int = 6, classes: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % classes
    centers = torch.randn(classes, num_features, generator=generator)
    return centers[targets] + torch.randn(samples, num_features, generator=generator), targets


def from_zero(features, targets, *, classes=3, num_features=None, dtype=None, **settings) -> LinearSolution:
    settings = {"max_passes": 200, "tolerance": 1e-6, **settings}
    if isinstance(features, Tensor):
        num_features, dtype = features.shape[1], features.dtype
    weight = torch.zeros(classes, num_features or 6, dtype=dtype)
    return solve_logistic(features, targets, weight=weight, bias=weight.new_zeros(classes), **settings)


def is_finite(solution: LinearSolution) -> bool:
    bias = solution.weight.new_zeros(1) if solution.bias is None else solution.bias
    return bool(solution.weight.isfinite().all() and bias.isfinite().all()) and math.isfinite(solution.report.loss)


def gradient_at(solution, features, loss_of, *, l2):
    weight, bias = solution.weight.clone().requires_grad_(), solution.bias.clone().requires_grad_()
    loss = loss_of(F.linear(features, weight, bias)) + 0.5 * l2 * weight.square().sum()
    assert loss.item() == pytest.approx(solution.report.loss, rel=1e-9)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, (weight, bias))])


def doubled_blobs(classes=3):
    features, targets = blobs(classes=classes)
    return features.double(), targets


def soft_targets(outputs=3):
    logits = torch.randn(300, outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return logits.softmax(1)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, [1.0, 0.2, 3.0]])
def test_the_solution_is_a_stationary_point_of_torchs_cross_entropy(soft, label_smoothing, class_weights):
    features, targets = doubled_blobs()
    targets = soft_targets() if soft else targets
    solution = solve_logistic(
        features,
        targets,
        weight=0.1 * torch.randn(3, 6, dtype=torch.float64),
        bias=torch.randn(3, dtype=torch.float64),
        l2=1e-2,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        max_passes=300,
        tolerance=1e-9,
    )
    weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)

    def loss_of(logits):
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing)

    assert solution.report.reason == "converged"
    assert gradient_at(solution, features, loss_of, l2=1e-2).norm() < 1e-8


@pytest.mark.parametrize("class_weights", [None, [1.0, 5.0, 0.5]])
def test_several_binary_outputs_are_a_stationary_point_of_torchs_loss(class_weights):
    features, _ = doubled_blobs()
    targets = soft_targets()
    targets[:100] = targets[:100].round()
    solution = from_zero(
        features,
        targets,
        l2=1e-2,
        loss="binary_cross_entropy",
        class_weights=class_weights,
        tolerance=1e-9,
    )
    positives = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)

    def loss_of(logits):
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positives)

    assert gradient_at(solution, features, loss_of, l2=1e-2).norm() < 1e-8


@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_samples_are_those_of_a_weighted_mean(soft):
    features, targets = doubled_blobs()
    targets = soft_targets() if soft else targets
    weights = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[::3] = 0.0
    solution = from_zero(features, targets, l2=1e-2, sample_weights=weights, tolerance=1e-9)

    def loss_of(logits):
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()

    assert gradient_at(solution, features, loss_of, l2=1e-2).norm() < 1e-8
    batches = list(zip(features.split(70), targets.split(70), weights.split(70), strict=True))
    parts = from_zero(batches, None, dtype=torch.float64, l2=1e-2, tolerance=1e-9)
    assert torch.allclose(parts.weight, solution.weight, atol=1e-6)


def test_a_single_logit_is_binary_cross_entropy():
    features, targets = blobs(classes=2)
    weight, bias, report = from_zero(features, targets.float().unsqueeze(1), classes=1)
    loss = F.binary_cross_entropy_with_logits(features @ weight[0] + bias, targets.float())
    assert report.loss == pytest.approx(loss.item() + 0.5e-3 * weight.square().sum().item(), rel=1e-5)
    assert report.gradient_norm < 1e-4


def test_a_single_logit_equals_the_difference_of_two():
    features, targets = doubled_blobs(classes=2)
    settings = {"label_smoothing": 0.1, "class_weights": [1.0, 4.0], "tolerance": 1e-9}
    single = from_zero(features, targets, classes=1, l2=0.0, **settings)
    pair = from_zero(features, targets, classes=2, l2=0.0, **settings)
    assert single.report.loss == pytest.approx(pair.report.loss, rel=1e-8)
    assert torch.allclose(single.weight[0], pair.weight[1] - pair.weight[0], atol=1e-5)


def test_the_objective_at_the_optimum_is_scikit_learns():
    features, targets = blobs(600, 20, 5)
    reference = LogisticRegression(C=1.0 / (1e-3 * 600), tol=1e-10, max_iter=5000)
    reference.fit(features.double().numpy(), targets.numpy())
    weight, bias = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
    best = F.cross_entropy(F.linear(features.double(), weight, bias), targets) + 0.5e-3 * weight.square().sum()
    assert from_zero(features, targets, classes=5).report.loss == pytest.approx(best.item(), rel=1e-6)


def test_batches_of_any_size_give_the_solution_of_the_whole():
    features, targets = blobs()
    whole = from_zero(features, targets, tolerance=1e-5)
    batches = [*zip(features.split(37), targets.split(37), strict=True), (features[:0], targets[:0])]
    start = torch.zeros(3, 6), torch.zeros(3)
    parts = solve_logistic(batches, weight=start[0], bias=start[1], max_passes=200, tolerance=1e-5)
    assert parts.report.loss == pytest.approx(whole.report.loss, rel=1e-6)
    assert torch.allclose(parts.weight, whole.weight, atol=1e-2)


def test_equal_data_gives_bitwise_equal_solutions():
    assert torch.equal(from_zero(*blobs()).weight, from_zero(*blobs()).weight)


def test_without_a_bias_none_is_fitted():
    features, targets = blobs()
    solution = solve_logistic(features, targets, weight=torch.zeros(3, 6), max_passes=100)
    assert solution.bias is None
    assert solution.report.loss > from_zero(features, targets).report.loss


def test_the_weights_given_are_not_changed_and_decide_the_dtype():
    features, targets = blobs()
    weight, bias = torch.randn(3, 6).bfloat16(), torch.zeros(3).bfloat16()
    before = weight.clone()
    solution = solve_logistic(features, targets, weight=weight, bias=bias)
    assert torch.equal(weight, before)
    assert solution.weight.dtype == solution.bias.dtype == torch.bfloat16
    assert solution.weight.data_ptr() != weight.data_ptr()


def test_a_solution_is_its_own_solution():
    features, targets = blobs()
    first = from_zero(features, targets)
    again = solve_logistic(features, targets, weight=first.weight, bias=first.bias, max_passes=100, tolerance=1e-2)
    assert again.report.loss == pytest.approx(first.report.loss, rel=1e-6)


def test_passes_are_counted_and_kept_to():
    features, targets = blobs()
    read = 0

    class Counted:
        def __iter__(self):
            nonlocal read
            read += 1
            yield features, targets

    start = torch.zeros(3, 6), torch.zeros(3)
    report = solve_logistic(Counted(), weight=start[0], bias=start[1], max_passes=5, tolerance=0.0).report
    assert report.passes == read == 5
    assert report.reason == "max_passes"


def test_with_validation_the_result_is_never_worse_there_than_the_start():
    features, targets = blobs(40, 30)
    held_out, held_out_targets = blobs(400, 30)
    good = from_zero(held_out, held_out_targets)
    validation = held_out, held_out_targets
    shuffled = targets[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    solution = solve_logistic(features, shuffled, weight=good.weight, bias=good.bias, validation=validation)
    assert solution.report.score == solution.report.start_score
    assert solution.report.best_step == 0
    assert torch.equal(solution.weight, good.weight)
    assert solution.report.reason == "validation"


def test_the_best_step_by_validation_is_handed_back():
    features, targets = blobs(60, 40)
    held_out, held_out_targets = blobs(500, 40, seed=0)
    validation = [(held_out[:250], held_out_targets[:250]), (held_out[250:], held_out_targets[250:])]
    solution = from_zero(features, targets, validation=validation, l2=0.0, patience=50, max_passes=20)
    accuracy = (F.linear(held_out, solution.weight, solution.bias).argmax(1) == held_out_targets).double().mean()
    assert solution.report.score == pytest.approx(accuracy.item())
    assert solution.report.score >= solution.report.start_score


def test_constant_and_collinear_features_are_solved_like_their_independent_part():
    features, targets = blobs()
    redundant = torch.cat([features, torch.full((300, 1), 7.0), features[:, :2] @ torch.randn(2, 3)], dim=1)
    plain = from_zero(features, targets, l2=0.0, tolerance=1e-5)
    solution = from_zero(redundant, targets, l2=0.0, tolerance=1e-5)
    assert is_finite(solution)
    assert solution.report.loss == pytest.approx(plain.report.loss, rel=1e-5)


def test_columns_of_extreme_scales_are_solved_like_those_of_one_scale_without_a_penalty():
    features, targets = doubled_blobs()
    scales = torch.tensor([1e-8, 1e-4, 1.0, 1e4, 1e8, 1.0], dtype=torch.float64)
    plain = from_zero(features, targets, l2=0.0, max_passes=100)
    solution = from_zero(features * scales, targets, l2=0.0, max_passes=100)
    assert solution.report.loss == pytest.approx(plain.report.loss, rel=1e-6)
    assert torch.allclose(solution.weight * scales, plain.weight, atol=2e-2)
    assert is_finite(from_zero((features * scales).float(), targets))


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_columns_at_the_edge_of_the_dtype_give_finite_weights(scale):
    features, targets = blobs()
    features[:, 0] *= scale
    solution = from_zero(features, targets, max_passes=40)
    assert is_finite(solution)
    assert solution.report.loss < 0.5 * solution.report.start_loss


def test_far_shifted_features_are_solved_like_centered_ones():
    features, targets = blobs()
    plain = from_zero(features, targets, tolerance=1e-4)
    solution = from_zero(features + 100.0, targets, tolerance=0.0, max_passes=100)
    assert solution.report.loss == pytest.approx(plain.report.loss, rel=1e-3)


def test_separable_data_without_penalty_stops_with_finite_weights():
    features = torch.cat([torch.randn(50, 4) + 10.0, torch.randn(50, 4) - 10.0])
    targets = torch.arange(100) // 50
    solution = from_zero(features, targets, classes=2, l2=0.0, tolerance=0.0, max_passes=500)
    assert is_finite(solution)
    assert solution.report.reason in ("no_progress", "max_passes", "converged")
    assert solution.report.loss < 1e-3


def test_a_class_without_samples_is_not_predicted():
    features, targets = blobs()
    solution = from_zero(features, targets, classes=5, max_passes=50)
    assert is_finite(solution)
    assert int(F.linear(features, solution.weight, solution.bias).argmax(1).max()) <= 2


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_fewer_samples_than_features_are_solved(samples):
    features, targets = blobs(samples, 30)
    solution = from_zero(features, targets, max_passes=50)
    assert is_finite(solution)
    assert solution.report.loss < solution.report.start_loss


def test_all_samples_of_one_class_are_solved():
    features, _ = blobs()
    solution = from_zero(features, torch.zeros(300, dtype=torch.int64), max_passes=50)
    assert is_finite(solution)
    assert solution.report.loss < 0.1


def test_features_that_are_all_zero_leave_the_prior():
    targets = torch.tensor([0, 0, 0, 1])
    solution = from_zero(torch.zeros(4, 3), targets, classes=2)
    assert torch.allclose(solution.bias.softmax(0), torch.tensor([0.75, 0.25]), atol=1e-4)
    assert torch.equal(solution.weight, torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_an_error(bad):
    features, targets = blobs()
    features[7, 2] = bad
    with pytest.raises(ValueError, match="Expected features to be finite"):
        from_zero(features, targets)


def test_validation_features_that_are_not_finite_are_an_error():
    features, targets = blobs()
    with pytest.raises(ValueError, match="Expected validation features to be finite"):
        from_zero(features, targets, validation=(features * math.nan, targets))


@pytest.mark.parametrize(
    ("features", "targets", "error", "message"),
    [
        (
            torch.zeros(4, 6),
            torch.tensor([0, 1, 2, 3]),
            ValueError,
            r"Expected class labels in \[0, 2\], but got 0 to 3",
        ),
        (torch.zeros(4, 6), torch.tensor([0, 1, 2, -1]), ValueError, "Expected class labels"),
        (torch.zeros(4, 6), torch.zeros(4), TypeError, "Expected integer class labels"),
        (torch.zeros(4, 6), torch.zeros(4, 3).long(), ValueError, r"Expected targets of shape \(samples,\)"),
        (torch.zeros(4, 6), torch.full((4, 3), 2.0), ValueError, r"Expected targets to be in \[0, 1\]"),
        (torch.zeros(4, 6), torch.full((4, 3), math.nan), ValueError, r"Expected targets to be in \[0, 1\]"),
        (torch.zeros(4, 6), torch.zeros(3).long(), ValueError, "Expected as many targets as features, but got 3 and 4"),
        (torch.zeros(0, 6), torch.zeros(0).long(), ValueError, "Expected at least one sample"),
        (torch.zeros(4, 5), torch.zeros(4).long(), ValueError, "Expected 6 features a sample, but got 5"),
        (torch.zeros(4, 6).long(), torch.zeros(4).long(), TypeError, "Expected features of a floating dtype"),
        (torch.zeros(6), torch.zeros(6).long(), ValueError, r"Expected features of shape \(samples, features\)"),
        (torch.zeros(4, 6), None, TypeError, "Expected `targets` to be a tensor"),
        ([], None, ValueError, "Expected at least one sample"),
        (3, None, TypeError, "Expected a tensor or an iterable"),
        (iter([]), None, TypeError, "Expected batches that can be read several times"),
        ([torch.zeros(4, 6)], None, TypeError, "Expected every batch to be a pair"),
        ([(torch.zeros(4, 6), [0, 1])], None, TypeError, "Expected features and targets to be tensors"),
    ],
)
def test_unfit_data_is_an_error(features, targets, error, message):
    with pytest.raises(error, match=message):
        solve_logistic(features, targets, weight=torch.zeros(3, 6), bias=torch.zeros(3))


def test_labels_of_a_single_logit_in_between_are_an_error():
    with pytest.raises(ValueError, match="Expected targets of a single logit to be 0 or 1"):
        from_zero(torch.zeros(2, 3), torch.tensor([0.0, 0.5]), classes=1)


def test_passes_of_different_lengths_are_an_error():
    features, targets = blobs()
    lengths = iter([300, 200])

    class Shrinking:
        def __iter__(self):
            length = next(lengths)
            yield features[:length], targets[:length]

    with pytest.raises(ValueError, match="Expected every pass to read 300 samples, but got 200"):
        solve_logistic(Shrinking(), weight=torch.zeros(3, 6), bias=torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l2": -1.0}, "`l2`"),
        ({"l2": math.nan}, "`l2`"),
        ({"loss": "hinge"}, "`loss` to be 'cross_entropy' or 'binary_cross_entropy', but got 'hinge'"),
        ({"label_smoothing": 1.0}, "`label_smoothing`"),
        ({"max_passes": 1}, "`max_passes`"),
        ({"tolerance": -1.0}, "`tolerance`"),
        ({"patience": 0}, "`patience`"),
        ({"class_weights": [1.0, 2.0]}, "`class_weights` to be 3 numbers"),
        ({"class_weights": [1.0, 2.0, -1.0]}, "`class_weights` to be finite and at least 0"),
        (
            {"class_weights": [0.0, 0.0, 0.0]},
            "weights of samples, and `class_weights` of a class that has samples, to be positive",
        ),
        ({"weight": torch.zeros(3)}, "`weight` to be of shape"),
        ({"weight": torch.full((3, 6), math.nan)}, "`weight` to be finite"),
        ({"bias": torch.zeros(4)}, "`bias` to be of shape"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    features, targets = blobs()
    with pytest.raises(ValueError, match=f"Expected {message}"):
        solve_logistic(features, targets, **{"weight": torch.zeros(3, 6), "bias": torch.zeros(3), **settings})


def test_a_systematic_sample_is_bounded_and_evenly_spaced():
    sample = SystematicSample(50)
    for part in torch.arange(1000.0).unsqueeze(1).split(17):
        sample.add(part)
    kept = sample.collect().squeeze(1)
    assert 50 <= len(kept) <= 100
    assert torch.equal(kept.diff(), torch.full_like(kept[1:], 16.0))
