import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.solvers import LogisticSolver
from glai_lightning.solvers.report import LinearSolution


def solve_logistic(features, targets=None, *, weight, bias=None, validation=None, group=None, **settings):
    solver = LogisticSolver(**{"max_passes": 30, **settings})
    return solver.solve_features(features, targets, weight=weight, bias=bias, validation=validation, group=group)


def blobs(samples: int = 1200, num_features: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(samples) % classes
    centers = torch.randn(classes, num_features, generator=generator)
    return centers[targets] + torch.randn(samples, num_features, generator=generator), targets


def averaged(features: object, targets: Tensor | None = None, **settings: object) -> LinearSolution:
    settings = {"center": "zero", "l2": 1e-2, "max_passes": 30, "learning_rate": 0.02, "batch_size": 64, **settings}
    start = {"weight": torch.zeros(4, 6), "bias": torch.zeros(4)}
    return solve_logistic(features, targets, **{**start, "method": "minibatch", **settings})


def objective(solution: LinearSolution, features: Tensor, targets: Tensor, start: Tensor, **settings: object) -> float:
    logits = F.linear(features, solution.weight, solution.bias)
    weights = settings.get("class_weights")
    loss = F.cross_entropy(
        logits,
        targets,
        weight=None if weights is None else torch.tensor(weights),
        label_smoothing=settings.get("label_smoothing", 0.0),
    )
    if settings["center"] == "current":
        return float(loss + 0.5 * settings["l2"] * (logits - F.linear(features, start)).square().sum(1).mean())
    return float(loss + 0.5 * settings["l2"] * solution.weight.square().sum())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, [1.0, 0.2, 3.0, 1.0]])
@pytest.mark.parametrize("center", ["zero", "current"])
def test_averaged_steps_come_near_the_minimum(label_smoothing, class_weights, center):
    features, targets = blobs()
    start = 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    settings = {"l2": 0.1, "center": center, "class_weights": class_weights, "label_smoothing": label_smoothing}
    near = averaged(features, targets, weight=start, **settings)
    there = solve_logistic(
        features, targets, weight=start, bias=torch.zeros(4), max_passes=300, tolerance=1e-7, **settings
    )
    begin = objective(LinearSolution(start, torch.zeros(4), there.report), features, targets, start, **settings)
    lowest = objective(there, features, targets, start, **settings)
    assert objective(near, features, targets, start, **settings) - lowest < 0.01 * (begin - lowest)


def test_the_average_is_nearer_to_the_minimum_than_steps_at_that_rate_get():
    features, targets = blobs()
    settings = {"l2": 1e-2, "center": "zero"}
    near = averaged(features, targets, learning_rate=0.3, batch_size=16, max_passes=10)
    weight, bias = torch.zeros(4, 6, requires_grad=True), torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=0.3)
    for _ in range(10):
        for rows in torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).split(16):
            adam.zero_grad()
            loss = F.cross_entropy(F.linear(features[rows], weight, bias), targets[rows])
            (loss + 0.5e-2 * weight.square().sum()).backward()
            adam.step()
    last = LinearSolution(weight.detach(), bias.detach(), near.report)
    there = solve_logistic(
        features, targets, weight=torch.zeros(4, 6), bias=torch.zeros(4), max_passes=300, tolerance=1e-7, **settings
    )
    lowest = objective(there, features, targets, weight, **settings)
    assert objective(near, features, targets, weight, **settings) - lowest < 0.5 * (
        objective(last, features, targets, weight, **settings) - lowest
    )


def test_the_same_data_gives_the_same_weights_to_the_last_bit():
    first, second = (averaged(*blobs()) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_rows_of_batches_are_taken_as_they_come_and_cut_to_size():
    features, targets = blobs()
    whole = averaged([(features, targets)], max_passes=3)
    cut = averaged(list(zip(features.split(128), targets.split(128), strict=True)), max_passes=3)
    assert torch.equal(whole.weight, cut.weight)
    assert whole.report.steps == 3 * math.ceil(1200 / 64)


def test_with_validation_data_the_weights_are_never_worse_on_it():
    features, targets = blobs()
    wrong = (features[:400], (targets[:400] + 1) % 4)
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    solution = averaged(features[400:], targets[400:], weight=start, validation=wrong, patience=3)
    assert solution.report.score >= solution.report.start_score
    assert solution.report.reason == "validation"
    assert solution.report.passes == 4
    accuracy = (F.linear(wrong[0], solution.weight, solution.bias).argmax(1) == wrong[1]).float().mean().item()
    assert accuracy == pytest.approx(solution.report.score)


def test_without_a_better_score_the_weights_stay_as_they_were():
    features, targets = blobs()
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    labels = F.linear(features, start).argmax(1)
    solution = averaged(features, targets, weight=start, validation=(features, labels))
    assert torch.equal(solution.weight, start)
    assert solution.report.best_step == 0
    assert solution.report.loss == solution.report.start_loss


def test_a_single_logit_is_solved_as_a_binary_model():
    features, targets = blobs(classes=2)
    solution = averaged(features, targets.bool().unsqueeze(1), weight=torch.zeros(1, 6), bias=torch.zeros(1))
    assert ((F.linear(features, solution.weight, solution.bias)[:, 0] > 0) == targets.bool()).float().mean() > 0.8


def test_samples_of_weight_zero_move_nothing_but_the_penalty():
    features, targets = blobs()
    settings = {"batch_size": 1, "max_passes": 3}
    features, targets = features[:300], targets[:300]
    only = averaged(features[targets != 3], targets[targets != 3], **settings)
    ordered = torch.cat([torch.nonzero(targets != 3), torch.nonzero(targets == 3)])[:, 0]
    weighted = averaged(features[ordered], targets[ordered], class_weights=[1.0, 1.0, 1.0, 0.0], **settings)
    assert weighted.weight.isfinite().all()
    assert weighted.report.loss == pytest.approx(only.report.loss, rel=0.05)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda features, targets: (features.index_fill(0, torch.tensor([7]), math.nan), targets), "to be finite"),
        (lambda features, targets: (features, targets + 1), r"class labels in \[0, 3\]"),
        (lambda features, targets: (features[:, :5], targets), "6 features"),
        (lambda features, targets: (features[:0], targets[:0]), "at least one sample"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_data_is_refused(spoil, message, streamed):
    features, targets = spoil(*blobs())
    with pytest.raises(ValueError, match=message):
        averaged(*([[(features, targets)]] if streamed else [features, targets]))


@pytest.mark.parametrize(
    ("setting", "value"), [("method", "newton"), ("learning_rate", 0.0), ("learning_rate", math.inf), ("batch_size", 0)]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        averaged(*blobs(), **{setting: value})
