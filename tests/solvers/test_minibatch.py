import resource

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.solvers import LogisticSolver
from glai_lightning.solvers.report import LinearSolution

#: More than quasi-Newton steps are made for.
CLASSES = 1100


def blobs(samples: int = 8800, num_features: int = 16, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % CLASSES
    centers = 2.0 * torch.randn(CLASSES, num_features, generator=torch.Generator().manual_seed(7))
    order = torch.randperm(samples, generator=generator)
    return centers[targets][order] + torch.randn(samples, num_features, generator=generator), targets[order]


def averaged(features, targets=None, *, validation=None, group=None, weight=None, **settings) -> LinearSolution:
    solver = LogisticSolver(**{"l2": 1e-4, "max_passes": 12, **settings})
    weight = torch.zeros(CLASSES, 16) if weight is None else weight
    return solver.solve_features(
        features, targets, weight=weight, bias=torch.zeros(CLASSES), validation=validation, group=group
    )


def accuracy(solution: LinearSolution, features: Tensor, targets: Tensor) -> float:
    return (F.linear(features, solution.weight, solution.bias).argmax(1) == targets).float().mean().item()


def test_many_classes_are_solved_by_minibatches():
    solution = averaged(*blobs())
    assert solution.report.method == "minibatch"
    assert solution.report.loss < 0.5 * solution.report.start_loss
    assert solution.report.passes == 12
    assert accuracy(solution, *blobs(seed=1)) > 0.5


def test_the_reported_loss_is_that_of_the_weights():
    features, targets = blobs()
    weight, bias, report = averaged(features, targets, max_passes=4)
    loss = F.cross_entropy(F.linear(features, weight, bias), targets) + 0.5e-4 * weight.square().sum()
    assert report.loss == pytest.approx(loss.item(), rel=1e-4)


def test_features_of_any_scale_and_shift_are_solved_alike():
    features, targets = blobs()
    held_out, held_out_targets = blobs(seed=1)

    def score(scale, shift):
        validation = (held_out * scale + shift, held_out_targets)
        return averaged(features * scale + shift, targets, l2=0.0, max_passes=6, validation=validation).report.score

    plain = score(1.0, 0.0)
    moved = [score(scale, shift) for scale, shift in ((1e3, 0.0), (1e-3, 0.0), (1.0, 1e3))]
    assert moved == pytest.approx([plain] * 3, abs=0.02)


def test_a_path_is_tried_from_strong_to_weak():
    tried = [l2 for l2, _ in averaged(*blobs(), l2=None, validation=blobs(seed=1)).report.tried]
    assert len(tried) > 1
    assert tried == sorted(tried, reverse=True)


def test_weights_that_no_pass_improves_are_left_as_they_were():
    features, targets = blobs()
    good = averaged(features, targets, l2=0.0).weight
    predicted = F.linear(features, good).argmax(1)
    kept = averaged(features, targets, l2=1e9, weight=good, validation=(features, predicted))
    assert kept.report.score == kept.report.start_score == 1.0
    assert kept.report.best_step == 0
    assert torch.equal(kept.weight, good)


def test_the_same_data_gives_the_same_weights_to_the_last_bit():
    first, second = (averaged(*blobs(), max_passes=3) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_rows_of_batches_are_taken_as_they_come_and_cut_to_size():
    features, targets = blobs()
    whole = averaged([(features, targets)], max_passes=3)
    cut = averaged(list(zip(features.split(512), targets.split(512), strict=True)), max_passes=3)
    assert torch.allclose(whole.weight, cut.weight, atol=1e-5)
    assert whole.report.steps == cut.report.steps


def test_ten_thousand_classes_are_solved_in_bounded_memory():
    features, targets = torch.randn(4000, 32), torch.arange(4000) * 5 % 10_000
    weight, bias = torch.zeros(10_000, 32), torch.zeros(10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = LogisticSolver(l2=1e-4, max_passes=4).solve_features(features, targets, weight=weight, bias=bias).report
    assert report.loss < report.start_loss
    # A matrix of classes by classes alone would take 400 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
