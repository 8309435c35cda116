import pytest
import torch
import torch.nn.functional as F
from head_examples import C, D, H
from torch import nn

from glai_lightning import mlp_head
from glai_lightning.fitting.loss_watching import LossReached, LossWatcher

X, LABELS = torch.randn(5, D), torch.tensor([0, 1, 2, 3, 0])


def watch(head, step, **options):
    with LossWatcher(head, **options) as watcher:
        step()
    return watcher.calls


@pytest.mark.parametrize(
    ("outputs", "loss", "kind"),
    [
        (C, lambda y: F.cross_entropy(y, LABELS), "cross_entropy"),
        (C, lambda y: nn.CrossEntropyLoss()(input=y, target=LABELS), "cross_entropy"),
        (1, lambda y: F.binary_cross_entropy_with_logits(y.squeeze(-1), torch.ones(5)), "binary_cross_entropy"),
        (1, lambda y: nn.BCEWithLogitsLoss()(y.flatten(), torch.ones(5)), "binary_cross_entropy"),
        (1, lambda y: F.mse_loss(y[:, 0], torch.ones(5)), "mse"),
        (C, lambda y: nn.MSELoss()(y, torch.ones(5, C)), "mse"),
    ],
)
def test_losses_are_seen_with_what_the_head_was_given(outputs, loss, kind):
    head = mlp_head(D, H, outputs)
    (call,) = watch(head, lambda: loss(head(X)))
    assert call.kind == kind
    assert torch.equal(call.inputs, X)
    assert len(call.targets) == 5
    assert call.unusual is None


def test_losses_of_something_else_are_not_the_heads():
    head, other = mlp_head(D, H, C), mlp_head(D, H, C)

    def step():
        F.cross_entropy(other(X), LABELS)
        F.cross_entropy(head(X) * 2, LABELS)
        F.nll_loss(head(X).log_softmax(-1), LABELS)

    assert watch(head, step) == []


def test_the_head_may_be_called_several_times():
    head = mlp_head(D, H, C)
    first, second = torch.randn(5, D), torch.randn(5, D)
    calls = watch(head, lambda: [F.cross_entropy(y, LABELS) for y in [head(first), head(second)]])
    assert [
        call.inputs is not None and torch.equal(call.inputs, x) for call, x in zip(calls, (first, second), strict=True)
    ]
    assert torch.equal(calls[0].inputs, first)
    assert torch.equal(calls[1].inputs, second)


def test_options_of_the_loss_are_noted():
    head, weights = mlp_head(D, H, C), torch.rand(C)
    loss = nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1, ignore_index=3)
    (call,) = watch(head, lambda: loss(head(X), LABELS))
    assert torch.equal(call.class_weights, weights)
    assert (call.label_smoothing, call.ignore_index) == (0.1, 3)


@pytest.mark.parametrize(
    ("loss", "unusual"),
    [
        (lambda y: F.cross_entropy(y, LABELS, reduction="none"), "reduction='none'"),
        (lambda y: F.cross_entropy(y, torch.softmax(torch.randn(5, C), -1)), "class probabilities"),
        (lambda y: F.binary_cross_entropy_with_logits(y, torch.ones(5, C)), f"{C} binary outputs"),
        (lambda y: F.mse_loss(y, torch.ones(5, C), weight=torch.rand(5, C)), "a weight for each sample"),
    ],
)
def test_what_a_plain_mean_would_miss_is_noted(loss, unusual):
    head = mlp_head(D, H, C)
    (call,) = watch(head, lambda: loss(head(X)))
    assert unusual in call.unusual


def test_soft_binary_targets_are_noted():
    head = mlp_head(D, H, 1)
    (call,) = watch(head, lambda: F.binary_cross_entropy_with_logits(head(X), torch.full((5, 1), 0.3)))
    assert call.unusual == "targets other than 0 and 1"


def test_stopping_leaves_what_is_behind_the_loss_undone_and_the_head_unrun():
    head, ran = mlp_head(D, H, C), []
    head[0].register_forward_hook(lambda *_: ran.append("head"))

    def step():
        F.cross_entropy(head(X), LABELS)
        ran.append("behind")

    with pytest.raises(LossReached), LossWatcher(head, outputs=lambda x: x.new_zeros(len(x), C), stop=True) as watcher:
        step()
    assert ran == []
    assert torch.equal(watcher.calls[0].inputs, X)
    head(X)
    assert ran == ["head"]


def test_nothing_stays_behind_after_an_error():
    head = mlp_head(D, H, C)
    with pytest.raises(ZeroDivisionError), LossWatcher(head, outputs=lambda x: x):
        raise ZeroDivisionError
    assert not head._forward_hooks
    assert "forward" not in vars(head)
    assert head(X).shape == (5, C)
