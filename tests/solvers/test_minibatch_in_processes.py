import math

import pytest
import torch
from process_groups import run_in_processes
from torch.distributed import group

from glai_lightning.solvers import LogisticSolver

pytestmark = pytest.mark.processes


def solve_logistic(features, targets=None, *, weight, bias=None, validation=None, group=None, **settings):
    solver = LogisticSolver(**{"max_passes": 30, **settings})
    return solver.solve_features(features, targets, weight=weight, bias=bias, validation=validation, group=group)


def solved(features, targets=None, **settings):
    settings = {"center": "zero", "method": "minibatch", "max_passes": 5, "batch_size": 32, **settings}
    return solve_logistic(features, targets, weight=torch.zeros(3, 5), bias=torch.zeros(3), **settings)


def blobs():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(600) % 3
    return torch.randn(3, 5, generator=generator)[targets] + torch.randn(600, 5, generator=generator), targets


@pytest.mark.parametrize("streamed", [False, True])
def test_processes_with_unequal_shares_end_with_the_same_weights_near_those_of_one(tmp_path, streamed):
    features, targets = blobs()
    shares = [(features[:150], targets[:150]), (features[150:], targets[150:])]

    def solve(rank):
        share = ([shares[rank]],) if streamed else shares[rank]
        return solved(*share, validation=shares[1 - rank], patience=20, group=group.WORLD)

    first, second = run_in_processes(solve, tmp_path)
    alone = solved(features, targets, validation=(features, targets), patience=20)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert first.report.loss == second.report.loss
    assert first.report.score == pytest.approx(alone.report.score, abs=0.02)


def test_an_error_in_one_process_is_one_in_all(tmp_path):
    features, targets = blobs()

    def solve(rank):
        share = features.clone() if rank == 0 else features.index_fill(0, torch.tensor([400]), math.nan)
        return solved([(share[:300], targets[:300]), (share[300:], targets[300:])], group=group.WORLD)

    first, second = run_in_processes(solve, tmp_path)
    assert isinstance(second, ValueError)
    assert isinstance(first, RuntimeError)
    assert "Expected features to be finite" in str(first)
