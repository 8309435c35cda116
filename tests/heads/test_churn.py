import pytest
import torch
from head_examples import C, D, H
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glai_lightning import ChurnProbe, activation_patterns, mlp_head, pattern_churn, structure_settled
from glai_lightning.heads.joined import head_at


def test_churn_counts_the_bits_of_all_layers_together():
    before = [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)]
    after = [torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)]
    churn = pattern_churn(before, after)
    assert churn.ndim == 0
    assert churn.is_floating_point()
    assert churn.item() == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)], TypeError, "bool tensors, but got a tensor of torch.float32"),
        ([torch.zeros(2, 3).bool()], [torch.zeros(3, 3).bool()], ValueError, "the same shapes"),
        ([torch.zeros(2, 3).bool()], [], ValueError, "the same shapes"),
        ([], [], ValueError, "at least one bit"),
    ],
)
def test_churn_refuses_patterns_that_cannot_be_compared(before, after, error, message):
    with pytest.raises(error, match=message):
        pattern_churn(before, after)


@pytest.mark.parametrize(
    ("history", "settled"),
    [
        ([0.24, 0.058], True),  # both thresholds
        ([0.30, 0.09], False),  # small, but not against the largest
        ([0.80, 0.15], False),  # small against the largest only
        ([0.005], False),  # a tiny learning rate: the first check is the largest
        ([], False),
        ([0.0], False),  # a warm-up that starts at a rate of zero: nothing was trained
        ([0.0, 0.0, 0.24, 0.05], True),
        ([0.24, float("nan")], False),  # diverged
        ([0.24, float("nan"), 0.05], True),
    ],
)
def test_settled_needs_churn_small_and_small_against_the_largest(history, settled):
    assert structure_settled(history, churn_tolerance=0.10, relative_tolerance=0.25) is settled


def test_settled_needs_patience_checks_in_a_row():
    assert not structure_settled([0.4, 0.05], patience=2)
    assert not structure_settled([0.4, 0.05, 0.2], patience=2)
    assert not structure_settled([0.4, 0.05, 0.2, 0.05], patience=2)
    assert structure_settled([0.4, 0.05, 0.2, 0.05, 0.05], patience=2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 4))
def test_a_larger_tolerance_never_unsettles(history, patience):
    if structure_settled(history, churn_tolerance=0.1, relative_tolerance=0.25, patience=patience):
        assert structure_settled(history, churn_tolerance=0.3, relative_tolerance=0.5, patience=patience)


def feed(head, *batches):
    for batch in batches:
        head(batch)


def test_probe_compares_snapshot_and_head_on_the_last_inputs_seen():
    head = mlp_head(D, H, C)
    probe = ChurnProbe(head, probe_size=10)
    batches = torch.randn(5, 4, D).unbind()
    feed(head, *batches)
    last = torch.cat(batches)[-10:]
    before = activation_patterns(head, last)
    with torch.no_grad():
        head[0].weight.add_(torch.randn(H, D))
    flipped, bits = probe.measure()
    assert bits == 10 * H
    assert flipped.item() / bits == pytest.approx(pattern_churn(before, activation_patterns(head, last)).item())
    assert flipped > 0


def test_probe_starts_again_from_each_measurement():
    head = mlp_head(D, H, C)
    probe = ChurnProbe(head)
    feed(head, torch.randn(8, D))
    with torch.no_grad():
        head[0].weight.neg_()
    assert probe.measure()[0] > 0
    assert not probe.has_inputs
    feed(head, torch.randn(8, D))
    assert probe.measure()[0] == 0


def test_probe_keeps_references_to_no_more_than_it_needs():
    head = mlp_head(D, H, C)
    probe = ChurnProbe(head, probe_size=10)
    batches = torch.randn(100, 4, D).unbind()
    feed(head, *batches)
    kept = list(probe.inputs)
    assert sum(len(rows) for rows in kept) <= 10 + 4
    assert [rows.data_ptr() for rows in kept] == [batch.data_ptr() for batch in batches[-3:]]


def test_probe_counts_the_tokens_of_a_transformers_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    probe = ChurnProbe(head_at(layer, "linear1+linear2"), probe_size=32)
    for _ in range(3):
        layer(torch.randn(4, 5, 8))
    assert probe.seen == 60
    _, bits = probe.measure()
    # Whole sequences, as few of them as hold 32 tokens.
    assert bits == 35 * 16


def test_probe_ignores_evaluation_and_momentum_encoders():
    head = mlp_head(D, H, C)
    probe = ChurnProbe(head)
    head.eval()
    feed(head, torch.randn(8, D))
    head.train()
    with torch.no_grad():
        feed(head, torch.randn(8, D))
    assert not probe.has_inputs


def test_batch_norm_and_dropout_in_training_mode_make_no_churn():
    head = mlp_head(D, H, C, batch_norm=True, dropout=0.5)
    probe = ChurnProbe(head)
    feed(head, torch.randn(64, D))
    # Running statistics moved, which is churn; from here on they stand still.
    probe.restart()
    head[1].momentum = 0.0
    feed(head, torch.randn(64, D), torch.randn(64, D))
    assert probe.measure()[0] == 0


def test_moving_statistics_are_churn():
    head = mlp_head(D, H, C, batch_norm=True)
    probe = ChurnProbe(head)
    feed(head, torch.randn(64, D) * 3 + 2)
    assert probe.measure()[0] > 0


def test_probe_with_no_input_says_so():
    probe = ChurnProbe(mlp_head(D, H, C))
    with pytest.raises(ValueError, match="saw no input"):
        probe.measure()


def test_a_closed_probe_leaves_no_hook():
    head = mlp_head(D, H, C)
    ChurnProbe(head).close()
    assert not head._forward_pre_hooks


def test_a_probe_told_not_to_listen_keeps_nothing_but_notices_calls():
    head = mlp_head(D, H, C)
    probe = ChurnProbe(head)
    feed(head, torch.randn(8, D))
    probe.listen(False)
    feed(head, torch.randn(8, D))
    assert not probe.has_inputs
    assert probe.seen == 16
    probe.listen(True)
    feed(head, torch.randn(4, D))
    assert probe.measure()[1] == 4 * H
