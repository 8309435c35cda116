"""Fits in several processes: all of them freeze together, end with the same weights, and with those of one process."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import distributed_fits
import pytest
import torch
from distributed_fits import DistributedFit, largest_difference, read_processes

from glai_lightning import GLAIHead

pytestmark = pytest.mark.processes

SOLVED_AND_NOT = [
    ("output", False),
    ("output", True),
    ("tangent", False),
    ("independent", False),
    ("independent", True),
]
STRATEGIES = ["ddp_fork", "ddp_fork_find_unused_parameters_true", "static graph"]

EVERY_STRATEGY = [
    DistributedFit(strategy, paths=paths, solver=solver, body=body)
    for strategy, (paths, solver), body in product(STRATEGIES, SOLVED_AND_NOT, [True, False])
]
EVERYTHING_ELSE = [
    replace(DistributedFit(paths=paths, solver=solver), **changes)
    for changes, (paths, solver) in product(
        [
            {"count": 4},
            {"accumulate": 2},
            {"check_every_n_steps": 3},
            {"check_every_n_steps": 2, "accumulate": 2},
            {"norm": "batch"},
            {"norm": "sync"},
        ],
        SOLVED_AND_NOT,
    )
]


def fit_in(folder, fit, **options):
    folder.mkdir()
    module = fit.run(folder, **options)
    return module, read_processes(folder, fit.count)


@pytest.mark.parametrize("fits", [EVERY_STRATEGY, EVERYTHING_ELSE], ids=["every strategy", "everything else"])
def test_processes_freeze_together_and_stay_identical_to_the_last_bit(tmp_path, fits):
    for number, fit in enumerate(fits):
        module, (first, *others) = fit_in(tmp_path / str(number), fit)
        assert first["freeze_epoch"] is not None, fit
        assert first["freeze_epoch"] < 5, fit
        assert (first["solved"] is not None) == fit.solver, fit
        for other in others:
            assert largest_difference(first, other) == 0.0, fit
            assert {k: v for k, v in other.items() if k not in ("weights", "optimizer")} == {
                k: v for k, v in first.items() if k not in ("weights", "optimizer")
            }, fit
        # The module of the process that asked for the fit ends where the others did.
        assert isinstance(module.head, GLAIHead), fit
        assert all(torch.equal(value, first["weights"][name]) for name, value in module.named_parameters()), fit
    print(f"cells: {len(fits)} fits in several processes, largest difference between processes 0.0")


def test_two_processes_end_where_one_ends_that_reads_the_batches_of_both(tmp_path):
    # As many samples as make up whole batches of both.
    fits = [
        replace(fit, optimizer=torch.optim.SGD, samples=192)
        for fit in EVERYTHING_ELSE
        if fit.count == 2 and fit.norm != "batch"
    ]
    largest = 0.0
    for number, fit in enumerate(fits):
        # An iterative solve turns rounding in float32 into more where hundreds of weights meet as many samples.
        precision = "64-true" if fit.solver else "32-true"
        _, (shared, _) = fit_in(tmp_path / f"shared{number}", fit, precision=precision)
        _, (alone,) = fit_in(tmp_path / f"alone{number}", fit.in_one_process(), precision=precision)
        assert shared["freeze_epoch"] == alone["freeze_epoch"] is not None, fit
        assert shared["churn_history"] == pytest.approx(alone["churn_history"]), fit
        difference = largest_difference(shared, alone, kinds=["weights"])
        assert difference <= 1e-5, fit
        largest = max(largest, difference)
    print(f"cells: {len(fits)} fits in two processes against one, largest difference {largest:.0e}")


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_strategies_that_start_python_again_keep_processes_identical_too(tmp_path, strategy):
    script = Path(distributed_fits.__file__)
    subprocess.run([sys.executable, str(script), str(tmp_path), strategy], check=True, timeout=200)
    first, second = read_processes(tmp_path, 2)
    assert first["freeze_epoch"] == second["freeze_epoch"] is not None
    assert first["solved"] == second["solved"] is not None
    assert largest_difference(first, second) == 0.0
