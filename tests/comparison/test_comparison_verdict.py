"""The verdict by non-inferiority."""

import numpy as np
import pytest

from glai_lightning.comparison import Run, text_report
from glai_lightning.comparison.verdict import summarise
from glai_lightning.fitting.fit_record import EpochRecord

SEEDS = range(5)


def make_run(variant, seed, seconds, score):
    epochs = [EpochRecord(0, seconds, seconds, val_score=score, frozen=variant != "mlp")]
    finished = {"finished_seconds": seconds, "finished_cpu_seconds": seconds}
    return Run(
        variant=variant, seed=seed, epochs=epochs, test_score=score, frozen=variant != "mlp", freeze_epoch=1, **finished
    )


def compared(ratio=2.0, differences=(0.0,) * 5, margin=0.003, mode="max", **others):
    """Return a comparison in which the solved side is so many times as fast, and differs so in score."""
    spread = np.random.default_rng(0).normal(0, 0.02, len(differences))
    runs = []
    for seed, (difference, by) in enumerate(zip(differences, spread, strict=True)):
        runs += [make_run("mlp", seed, 2.0, 0.9), make_run("output+solve", seed, 2.0 / (ratio + by), 0.9 + difference)]
        runs += [make_run(name, seed, 1.0, score) for name, score in others.items()]
    described = {"config": {}, "machine": {"threads": 1}, "score": "val/accuracy", "mode": mode, "clock": "cpu_seconds"}
    return summarise(runs, margin=margin, test_score="test/accuracy", **described)


NOISY = (-0.020, 0.030, -0.040, 0.015, -0.025)


@pytest.mark.parametrize(
    ("ratio", "differences", "outcome"),
    [
        (2.0, (0.0,) * 5, "faster"),
        (2.0, (0.01, 0.012, 0.009, 0.011, 0.01), "faster"),
        (2.0, (-0.001, -0.0012, -0.0009, -0.0011, -0.001), "faster"),
        (2.0, (-0.023, -0.0231, -0.0229, -0.023, -0.023), "worse"),
        (2.0, NOISY, "no difference"),
        (1.0, (0.0,) * 5, "no difference"),
        (0.5, (0.01,) * 5, "slower"),
    ],
)
def test_faster_needs_a_score_that_is_not_worse_by_more_than_the_margin(ratio, differences, outcome):
    assert compared(ratio, differences).verdict.outcome == outcome


def test_a_mean_loss_that_is_noisy_is_not_called_faster():
    verdict = compared(3.0, tuple(np.array(NOISY) - 0.015)).verdict
    assert verdict.outcome == "no difference"
    assert "the score may be worse by more than the margin" in verdict.sentence


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_equal_scores_never_flip_a_verdict(ratio):
    outcomes = set()
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.0005, 5)
        outcomes.add(compared(ratio, tuple(noise - noise.mean())).verdict.outcome)
    assert outcomes == {"faster"}


def test_a_wider_margin_is_passed_more_easily():
    assert compared(2.0, NOISY, margin=0.1).verdict.outcome == "faster"


def test_a_single_seed_shows_nothing():
    verdict = compared(2.0, (0.0,)).verdict
    assert verdict.outcome == "no difference"
    assert "a single seed says nothing of chance" in verdict.sentence


def test_where_the_smallest_score_is_best_a_larger_one_is_worse():
    assert compared(2.0, (0.02, 0.021, 0.019, 0.02, 0.02), mode="min").verdict.outcome == "worse"


def test_the_first_line_says_times_seeds_p_and_the_difference_with_its_interval_and_margin():
    first = text_report(compared(2.0, (0.01, 0.012, 0.009, 0.011, 0.01))).splitlines()[0]
    assert first.startswith("Faster, and not worse: output+solve finished 2.0")
    for part in ("5 seeds", "p 0.062", "test/accuracy +0.0104 (+0.0090 to +0.0118)", "margin 0.003"):
        assert part in first


def test_the_baselines_are_named_beside_the_verdict():
    report = text_report(compared(2.0, **{"annealed": 0.91, "random+solve": 0.88}))
    assert "The MLP " in report
    assert "of output+solve" in report
    assert "output+solve had finished after " in report
    assert "Beside annealed: " in report
    assert "test/accuracy -0.0100 (-0.0100 to -0.0100)" in report
    assert "Beside random+solve: " in report
