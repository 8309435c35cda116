import math

import pytest
import torch
from process_groups import run_in_processes
from test_minibatch import averaged, blobs
from torch.distributed import group

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("streamed", [False, True])
def test_processes_with_unequal_shares_end_with_the_same_weights_near_those_of_one(tmp_path, streamed):
    features, targets = blobs(4400)
    shares = [(features[:1100], targets[:1100]), (features[1100:], targets[1100:])]

    def solve(rank):
        share = ([shares[rank]],) if streamed else shares[rank]
        return averaged(*share, validation=shares[1 - rank], patience=20, max_passes=5, group=group.WORLD)

    first, second = run_in_processes(solve, tmp_path)
    alone = averaged(features, targets, validation=(features, targets), patience=20, max_passes=5)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert first.report.loss == second.report.loss
    # Of streamed rows, the first come together with others than in one process.
    assert first.report.score == pytest.approx(alone.report.score, abs=0.1)
    assert first.report.score > first.report.start_score + 0.1


def test_an_error_in_one_process_is_one_in_all(tmp_path):
    features, targets = blobs(1100)

    def solve(rank):
        share = features.clone() if rank == 0 else features.index_fill(0, torch.tensor([700]), math.nan)
        return averaged([(share[:300], targets[:300]), (share[300:], targets[300:])], group=group.WORLD)

    first, second = run_in_processes(solve, tmp_path)
    assert isinstance(second, ValueError)
    assert isinstance(first, RuntimeError)
    assert "Expected features to be finite" in str(first)
