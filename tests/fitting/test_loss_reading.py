import pytest
import torch
import torch.nn.functional as F

from glai_lightning.fitting.loss_reading import LossNotReadError, probing_outputs, read_loss

N, C = 12, 5
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(N) % C
SOFT = torch.rand(N, C, generator=GENERATOR).softmax(-1)
WEIGHTS = torch.rand(N, generator=GENERATOR) + 0.1
CLASS_WEIGHTS = torch.rand(C, generator=GENERATOR) + 0.1
BITS = torch.randint(0, 2, (N, C), generator=GENERATOR).float()
NUMBERS = torch.randn(N, C, generator=GENERATOR) * 3
HARD = F.one_hot(LABELS, C).float()
EVEN = torch.full((N,), 1 / N)


def read(loss, outputs=C, dtype=torch.float32):
    z = probing_outputs((N, outputs), torch.zeros((), dtype=dtype)).requires_grad_()
    return read_loss(loss(z * 1), [z])


@pytest.mark.parametrize(
    ("loss", "kind", "targets", "weights"),
    [
        (lambda z: F.cross_entropy(z, LABELS), "cross_entropy", HARD, EVEN),
        (lambda z: F.cross_entropy(z, LABELS, reduction="none").mean(), "cross_entropy", HARD, EVEN),
        (lambda z: F.nll_loss(z.log_softmax(-1), LABELS), "cross_entropy", HARD, EVEN),
        (lambda z: -z.log_softmax(-1)[torch.arange(N), LABELS].mean(), "cross_entropy", HARD, EVEN),
        (lambda z: F.cross_entropy(z, SOFT), "cross_entropy", SOFT, EVEN),
        (lambda z: F.kl_div(z.log_softmax(-1), SOFT, reduction="batchmean"), "cross_entropy", SOFT, EVEN),
        (lambda z: (WEIGHTS * F.cross_entropy(z, LABELS, reduction="none")).sum(), "cross_entropy", HARD, WEIGHTS),
        (
            lambda z: F.cross_entropy(z, LABELS, weight=CLASS_WEIGHTS),
            "cross_entropy",
            HARD,
            CLASS_WEIGHTS[LABELS] / CLASS_WEIGHTS[LABELS].sum(),
        ),
        (lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1), "cross_entropy", HARD * 0.9 + 0.1 / C, EVEN),
        (lambda z: F.cross_entropy(z, LABELS) + F.cross_entropy(z, LABELS.flip(0)), None, None, 2 * EVEN),
        (lambda z: 0.25 * F.cross_entropy(z.flip(0), LABELS.flip(0)) + 3, "cross_entropy", HARD, EVEN / 4),
        (lambda z: F.binary_cross_entropy_with_logits(z, BITS), "binary_cross_entropy", BITS, EVEN / C),
        (lambda z: F.binary_cross_entropy(z.sigmoid(), SOFT), "binary_cross_entropy", SOFT, EVEN / C),
        (lambda z: F.mse_loss(z, NUMBERS), "mse", NUMBERS, 2 * EVEN / C),
        (lambda z: (z - NUMBERS).square().sum(), "mse", NUMBERS, torch.full((N,), 2.0)),
    ],
)
def test_a_loss_in_any_words_says_its_targets_and_weights(loss, kind, targets, weights):
    reading = read(loss)
    assert reading.kind == (kind or "cross_entropy")
    torch.testing.assert_close(reading.weights, weights, atol=1e-5, rtol=1e-4)
    expected = (HARD + HARD.flip(0)) / 2 if targets is None else targets
    torch.testing.assert_close(reading.targets, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda z: F.binary_cross_entropy_with_logits(z[:, 0], BITS[:, 0], pos_weight=torch.tensor(3.0)), "binary"),
        (lambda z: (WEIGHTS * (z[:, 0] - NUMBERS[:, 0]).square()).mean(), "mse"),
    ],
)
def test_one_output_is_enough_to_tell_losses_apart(loss, kind):
    assert read(loss, outputs=1).kind.startswith(kind)


def test_samples_that_the_loss_passes_over_have_no_weight():
    reading = read(lambda z: F.cross_entropy(z, torch.where(LABELS == 2, -100, LABELS)))
    assert torch.equal(reading.weights == 0, LABELS == 2)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, LABELS) + 1e-2 * z.square().mean(),
        lambda z: F.cross_entropy(z / 2, LABELS),
        lambda z: F.cross_entropy(z + CLASS_WEIGHTS, LABELS),
        lambda z: F.cross_entropy(z - 0.5 * HARD, LABELS),
        lambda z: F.cross_entropy(z, LABELS) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
        lambda z: F.cross_entropy(z, LABELS) + 4 * F.kl_div((z / 2).log_softmax(-1), SOFT, reduction="batchmean"),
        lambda z: ((1 - z.softmax(-1)[torch.arange(N), LABELS]) * F.cross_entropy(z, LABELS, reduction="none")).mean(),
        lambda z: (z.detach().softmax(-1)[:, 0] * F.cross_entropy(z, LABELS, reduction="none")).mean() + z.mean(),
        lambda z: F.cross_entropy(z[:, :3], LABELS % 3),
        lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(z).t(), torch.arange(N)),
        lambda z: F.huber_loss(z, NUMBERS),
        lambda z: F.l1_loss(z, NUMBERS),
        lambda z: F.multi_margin_loss(z, LABELS),
        lambda z: -F.cross_entropy(z, LABELS),
        lambda z: z.mean(),
    ],
)
def test_other_losses_are_refused(loss):
    with pytest.raises(LossNotReadError):
        read(loss)


@pytest.mark.parametrize(
    "loss",
    [lambda z: F.binary_cross_entropy_with_logits(z[:, 0] / 3, BITS[:, 0]), lambda z: F.huber_loss(z, NUMBERS[:, :1])],
)
def test_other_losses_of_one_output_are_refused(loss):
    with pytest.raises(LossNotReadError):
        read(loss, outputs=1)


def test_outputs_that_are_all_but_certain_are_left_out_instead_of_misread():
    z = (torch.randn(N, C) * 8).requires_grad_()
    reading = read_loss(F.cross_entropy(z * 1, LABELS), [z])
    assert 0 < int(reading.known.sum()) < N
    torch.testing.assert_close(reading.targets[reading.known], HARD[reading.known], atol=1e-3, rtol=0)


def test_a_loss_in_half_precision_is_read():
    z = torch.randn(N, C).bfloat16().requires_grad_()
    reading = read_loss(F.cross_entropy((z * 1).float(), LABELS), [z])
    torch.testing.assert_close(reading.weights, EVEN, rtol=2e-2, atol=0)
