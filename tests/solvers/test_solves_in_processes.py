import itertools

import pytest
import torch
import torch.distributed as dist
from process_groups import run_in_processes

from glai_lightning.solvers import LogisticSolver, RidgeSolver
from glai_lightning.solvers.processes import Processes

pytestmark = pytest.mark.processes

SAMPLES, FEATURES, CLASSES = 700, 12, 4


def solve_logistic(features, targets=None, *, weight, bias=None, validation=None, group=None, **settings):
    solver = LogisticSolver(**{"l2": 1e-3, "max_passes": 30, **settings})
    return solver.solve_features(features, targets, weight=weight, bias=bias, validation=validation, group=group)


def solve_ridge(features, targets=None, *, weight, bias=None, l2=None, validation=None, group=None):
    solver = RidgeSolver(l2=l2)
    return solver.solve_features(features, targets, weight=weight, bias=bias, validation=validation, group=group)


def make_data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=dtype) + 3.0
    targets = (features @ torch.randn(FEATURES, CLASSES, generator=generator, dtype=dtype)).argmax(1)
    flipped = torch.rand(SAMPLES, generator=generator) < 0.2
    return features, torch.where(flipped, torch.arange(SAMPLES) % CLASSES, targets)


def shard(rank, data, count):
    """Unequal shards: the first process has the first tenth alone, the others share the rest."""
    features, targets = data
    if rank == 0:
        return features[:70], targets[:70]
    return features[70:][rank - 1 :: count - 1], targets[70:][rank - 1 :: count - 1]


def in_batches(features, targets, rows):
    return list(zip(features.split(rows), targets.split(rows), strict=True))


SOLVES = {
    "one strength": (solve_logistic, {"l2": 1e-3, "max_passes": 20}),
    "as few passes as by default": (solve_logistic, {"l2": 1e-3, "max_passes": 12}),
    "with class weights": (solve_logistic, {"l2": 1e-2, "class_weights": [1.0, 2.0, 0.5, 1.0], "max_passes": 20}),
    "ridge": (solve_ridge, {"l2": 1e-2}),
    "ridge, leaving one out": (solve_ridge, {}),
}


def centred_logits(features, solution):
    """A softmax does not notice what is added to all logits alike."""
    logits = features @ solution.weight.t() + solution.bias
    return logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize(("count", "dtype", "tolerance"), [(2, torch.float32, 1e-4), (3, torch.float64, 1e-10)])
def test_processes_that_share_the_data_find_the_weights_of_one_that_has_it_all(tmp_path, count, dtype, tolerance):
    data = make_data(dtype)
    start = {"weight": 0.1 * torch.randn(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    start = {name: value.to(dtype) for name, value in start.items()}
    held_out = (data[0].flip(0)[:200] + 0.1, data[1].flip(0)[:200])
    cases = list(itertools.product(SOLVES, [False, True]))

    def solve_shard(rank):
        own = in_batches(*shard(rank, data, count), rows=16)
        own_held_out = tuple(part[rank::count] for part in held_out)
        return {
            (name, validated): SOLVES[name][0](
                own,
                **start,
                **SOLVES[name][1],
                validation=own_held_out if validated else None,
                group=dist.group.WORLD,
            )
            for name, validated in cases
        }

    first, *others = run_in_processes(solve_shard, tmp_path, count)
    for name, validated in cases:
        solve, options = SOLVES[name]
        whole = solve(*data, **start, **options, validation=held_out if validated else None)
        found = first[name, validated]
        assert (found.weight - whole.weight).abs().max() <= tolerance, name
        logits = centred_logits(data[0], whole)
        assert (centred_logits(data[0], found) - logits).abs().max() <= tolerance * logits.abs().max(), name
        assert found.report.passes == whole.report.passes
        assert found.report.loss == pytest.approx(whole.report.loss, rel=1e-5)
        assert found.report.start_score == pytest.approx(whole.report.start_score)
        for other in others:
            assert torch.equal(other[name, validated].weight, found.weight)
            assert torch.equal(other[name, validated].bias, found.bias)
            assert other[name, validated].report.loss == found.report.loss
            assert other[name, validated].report.score == found.report.score


def test_a_process_without_samples_does_not_hold_up_the_others(tmp_path):
    features, targets = make_data()
    start = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES), "l2": 1e-2}
    solves = [solve_logistic, solve_ridge]

    def solve_all_or_nothing(rank):
        rows = slice(0, 0) if rank == 0 else slice(None)
        return [solve(features[rows], targets[rows], **start, group=dist.group.WORLD) for solve in solves]

    for solutions in run_in_processes(solve_all_or_nothing, tmp_path):
        for solve, solution in zip(solves, solutions, strict=True):
            whole = solve(features, targets, **start)
            torch.testing.assert_close(solution.weight, whole.weight, atol=1e-5, rtol=1e-5)


def broken(case, features, targets):
    if case == "a label out of range":
        return features, targets.index_fill(0, torch.tensor([50]), CLASSES)
    if case == "a number that is not finite":
        return features.index_fill(0, torch.tensor([50]), torch.inf), targets
    if case == "the wrong width":
        return features[:, 1:], targets
    return features[0], targets


def test_what_is_wrong_in_one_process_raises_in_all(tmp_path):
    data = make_data()
    start = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES), "l2": 1e-2}
    wrongs = ["a label out of range", "a number that is not finite", "the wrong width", "no matrix"]
    cases = list(itertools.product([solve_logistic, solve_ridge], wrongs, [False, True]))

    def solve_broken(rank):
        errors = []
        for solve, wrong, in_validation in cases:
            own = broken(wrong, *data) if rank == 1 else data
            training, held_out = (data, own) if in_validation else (own, data)
            with pytest.raises((ValueError, RuntimeError)) as caught:
                solve(*training, **start, validation=held_out, group=dist.group.WORLD)
            errors.append(caught.value)
        return errors

    first, second = run_in_processes(solve_broken, tmp_path)
    assert len(first) == len(second) == len(cases)
    for told, raised in zip(first, second, strict=True):
        assert isinstance(raised, ValueError)
        assert str(raised) in str(told)


def test_labels_in_one_process_and_numbers_in_another_raise_in_both(tmp_path):
    features, targets = make_data()

    def solve_mixed(rank):
        own = targets if rank == 0 else torch.zeros(SAMPLES, CLASSES)
        return solve_ridge(features, own, weight=torch.zeros(CLASSES, FEATURES), group=dist.group.WORLD)

    assert [str(error) for error in run_in_processes(solve_mixed, tmp_path)] == [
        "Expected all targets to be class labels (integers) or all to be numbers (floating), but got both."
    ] * 2


def test_an_error_of_any_kind_is_told_to_the_others(tmp_path):
    def fail(rank):
        with Processes(dist.group.WORLD).failing_together():
            if rank == 1:
                raise LookupError("no such key")
        return "not told"

    first, second = run_in_processes(fail, tmp_path)
    assert isinstance(second, LookupError)
    assert isinstance(first, RuntimeError)
    assert str(first) == "Process 1 of 2 failed. LookupError: no such key"
