import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning import freeze_structure, mlp_head
from glai_lightning.solvers import LogisticSolver, RidgeSolver
from glai_lightning.solvers.feature_batches import FeatureBatches

SOLVERS = [LogisticSolver(), RidgeSolver()]


def blobs(samples: int = 600, num_features: int = 20, classes: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    centers = 0.5 * torch.randn(classes, num_features, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    return centers[targets] + torch.randn(samples, num_features, generator=generator), targets


def solve(features, targets=None, *, validation=None, weight=None, sample_weights=None, group=None, **settings):
    weight = torch.zeros(4, 20) if weight is None else weight
    return LogisticSolver(**settings).solve_features(
        features,
        targets,
        weight=weight,
        bias=torch.zeros(len(weight)),
        validation=validation,
        sample_weights=sample_weights,
        group=group,
    )


def accuracy(solution, features, targets):
    return (F.linear(features, solution.weight, solution.bias).argmax(1) == targets).double().mean().item()


def frozen_head(num_features: int = 20):
    torch.manual_seed(0)
    return freeze_structure(mlp_head(num_features, 16, 4))


def test_the_path_runs_from_strong_to_weak_and_keeps_what_validates_best():
    validation = blobs(seed=1)
    solution = solve(*blobs(), validation=validation)
    strengths = [l2 for l2, _ in solution.report.tried]
    assert strengths == sorted(strengths, reverse=True)
    assert len(strengths) > 2
    assert solution.report.score == pytest.approx(accuracy(solution, *validation))
    assert solution.report.score == max(score for _, score in solution.report.tried)
    assert solution.report.l2 in strengths
    assert solution.report.passes <= LogisticSolver().max_passes


def test_a_path_ends_where_validation_falls():
    generator = torch.Generator().manual_seed(3)
    features, targets = blobs(60)
    noise = torch.randint(4, (60,), generator=generator)
    targets = torch.where(torch.rand(60, generator=generator) < 0.4, noise, targets)
    report = solve(features, targets, validation=blobs(2000, seed=1)).report
    assert report.reason == "validation"
    assert len(report.tried) < 7


def test_the_strengths_given_are_those_tried_whatever_their_order():
    report = solve(*blobs(), validation=blobs(seed=1), l2=[1e-3, 1.0, 1e-1, 1e-3], patience=10, max_passes=30).report
    assert [l2 for l2, _ in report.tried] == [1.0, 1e-1, 1e-3][: len(report.tried)]


def test_the_default_path_follows_the_scale_of_the_features():
    features, targets = blobs()
    held_out, held_out_targets = blobs(seed=1)
    plain = solve(features, targets, validation=(held_out, held_out_targets)).report
    scaled = solve(1e3 * features, targets, validation=(1e3 * held_out, held_out_targets)).report
    assert scaled.l2 == pytest.approx(1e6 * plain.l2, rel=1e-3)
    assert scaled.score == pytest.approx(plain.score, abs=0.005)


@pytest.mark.parametrize("streamed", [False, True])
def test_without_validation_data_a_tenth_of_the_rows_is_held_out_and_the_report_says_so(streamed):
    features, targets = blobs(3000)
    data = (list(zip(features.split(100), targets.split(100), strict=True)),) if streamed else (features, targets)
    report = solve(*data).report
    assert 200 < report.held_out < 400
    assert report.score > report.start_score
    assert f"{report.held_out} training rows held out" in str(report)
    assert solve(*data, l2=1e-3).report.held_out == 0


def test_rows_are_held_out_by_what_they_hold_in_whatever_order_and_batches():
    features, targets = blobs(3000)
    order = torch.randperm(3000)
    kept, held_out = FeatureBatches(features, targets).split()
    rows = FeatureBatches([(features[order[i : i + 70]], targets[order[i : i + 70]]) for i in range(0, 3000, 70)])
    kept_too, held_out_too = rows.split()
    for whole, parts in ((kept, kept_too), (held_out, held_out_too)):
        expected = torch.cat([batch[0] for batch in whole])
        found = torch.cat([batch[0] for batch in parts])
        assert torch.equal(expected.sort(0).values, found.sort(0).values)


def test_tensors_and_batches_of_inputs_hold_out_the_same_rows():
    inputs, targets = blobs(3000)
    whole, parts = frozen_head(), frozen_head()
    first = LogisticSolver().solve(whole, inputs, targets)
    second = LogisticSolver().solve(parts, list(zip(inputs.split(50), targets.split(50), strict=True)))
    assert first.held_out == second.held_out
    assert first.score == pytest.approx(second.score, abs=0.01)


@pytest.mark.parametrize("samples", [1, 3])
def test_too_few_rows_to_hold_any_out_are_solved_for_one_strength(samples):
    features = torch.zeros(samples, 20)
    report = solve(features, torch.zeros(samples).long()).report
    assert report.score is None
    assert len(report.tried) == 1
    assert math.isfinite(report.loss)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("validated", [False, True])
def test_a_report_is_a_sentence_with_or_without_validation(solver, validated):
    inputs, targets = blobs()
    report = solver.solve(frozen_head(), inputs, targets, validation=blobs(seed=1) if validated else None)
    assert (report.score is None) == (report.start_score is None)
    assert str(report).endswith(".")
    assert len(report.tried) > 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_row_of_validation_is_enough(solver):
    inputs, targets = blobs()
    held_out, held_out_targets = blobs(1, seed=1)
    report = solver.solve(frozen_head(), inputs, targets, validation=(held_out, held_out_targets))
    assert report.score in (0.0, 1.0)
    assert math.isfinite(report.loss)


@pytest.mark.parametrize("solver", SOLVERS)
def test_classes_missing_in_validation_or_training_are_solved(solver):
    inputs, targets = blobs()
    seen = targets != 2
    held_out, held_out_targets = blobs(seed=1)
    for training, validation in (
        ((inputs, targets), (held_out[held_out_targets != 0], held_out_targets[held_out_targets != 0])),
        ((inputs[seen], targets[seen]), (held_out, held_out_targets)),
    ):
        head = frozen_head()
        report = solver.solve(head, *training, validation=validation)
        assert report.score > report.start_score
        assert all(parameter.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_classes_and_constant_columns_give_finite_weights(solver):
    inputs, targets = blobs()
    inputs = torch.cat([inputs[:, :18] + 50.0 * F.one_hot(targets, 18), torch.full((600, 2), 5.0)], dim=1)
    head = frozen_head()
    report = solver.solve(head, inputs, targets, validation=(inputs[:100], targets[:100]))
    assert report.score == 1.0
    assert all(parameter.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("validated", [False, True])
def test_nan_late_in_a_stream_is_named_and_leaves_the_head_as_it_was(solver, validated):
    inputs, targets = blobs()
    inputs = inputs.index_fill(0, torch.tensor([590]), math.nan)
    batches = list(zip(inputs.split(50), targets.split(50), strict=True))
    head = frozen_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(ValueError, match="Expected features to be finite"):
        solver.solve(head, batches, validation=blobs(seed=1) if validated else None)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e6])
def test_features_of_any_scale_are_never_solved_worse_than_they_were(scale):
    features, targets = blobs()
    held_out, held_out_targets = blobs(seed=1)
    good = solve(features, targets, l2=1e-2).weight / scale
    for l2 in (None, 1e-3, 1e9):
        report = solve(
            scale * features, targets, weight=good, l2=l2, validation=(scale * held_out, held_out_targets)
        ).report
        assert report.score >= report.start_score


def test_weights_of_validation_samples_decide_what_is_best():
    features, targets = blobs()
    held_out, held_out_targets = blobs(seed=1)
    weights = torch.rand(600, generator=torch.Generator().manual_seed(5))
    solution = solve(features, targets, validation=(held_out, held_out_targets, weights))
    correct = F.linear(held_out, solution.weight, solution.bias).argmax(1) == held_out_targets
    assert solution.report.score == pytest.approx(float((correct * weights).sum() / weights.sum()), rel=1e-5)


def test_several_binary_outputs_are_scored_by_the_outputs_that_are_right():
    features, targets = blobs()
    several = F.one_hot(targets, 4).float()
    several[:, 0] = (targets < 2).float()
    held_out, held_out_targets = blobs(seed=1)
    wanted = F.one_hot(held_out_targets, 4).float()
    wanted[:, 0] = (held_out_targets < 2).float()
    solution = solve(features, several, loss="binary_cross_entropy", validation=(held_out, wanted))
    right = ((F.linear(held_out, solution.weight, solution.bias) > 0) == (wanted > 0.5)).double().mean()
    assert solution.report.score == pytest.approx(right.item())
    assert solution.report.score > 0.85


def test_rare_classes_with_weights_are_found():
    features, targets = blobs(4000)
    kept = (targets != 3) | (torch.arange(4000) % 20 == 0)
    validation = blobs(2000, seed=1)
    plain = solve(features[kept], targets[kept], validation=validation).report
    weighted = solve(features[kept], targets[kept], validation=validation, class_weights=[1.0, 1.0, 1.0, 20.0]).report
    assert weighted.score > plain.score
