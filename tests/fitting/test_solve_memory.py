"""What a solve in a fit holds: head inputs, path activations and targets, once each, and a constant beside them."""

import pytest
import torch
from fits import make_trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.fitting import head_data
from glai_lightning.fitting.solving import HeadSolve
from glai_lightning.solvers import LogisticSolver, RidgeSolver

D, H, C = 32, 64, 3


def peak_of_solve(samples, solver, monkeypatch):
    """Return the most bytes of tensors that were allocated in a solve at one time."""
    peaks = []

    def run(self, *arguments):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            report = solve(self, *arguments)
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        peaks.append(peak)
        return report

    solve = HeadSolve.run
    inputs = torch.randn(samples, D)
    targets = inputs[:, :C].abs().argmax(1)
    training, validation = (
        DataLoader(TensorDataset(inputs[:rows], targets[:rows]), batch_size=512) for rows in (samples, 512)
    )
    with monkeypatch.context() as patched:
        patched.setattr(HeadSolve, "run", run)
        callback = StructureFreezeCallback(freeze_at_epoch=1, solver=solver, stop_after_solve=True)
        make_trainer(callback).fit(SupervisedModule(mlp_head(D, H, C)), training, validation)
    return peaks[0]


@pytest.mark.parametrize("solver", [LogisticSolver(l2=1e-3, max_passes=2), RidgeSolver(l2=1e-3)])
@pytest.mark.parametrize("held", [True, False])
def test_a_solve_holds_inputs_activations_and_targets_once(monkeypatch, solver, held):
    if not held:
        monkeypatch.setattr(head_data, "INPUTS_IN_MEMORY", 0)
    few, many = 6_000, 16_000
    small, large = (peak_of_solve(samples, solver, monkeypatch) for samples in (few, many))
    # float32 numbers, and a label of int64; in every pass nothing but a sample of bounded size.
    of_samples = (many - few) * (4 * (D + H) + 8)
    assert large - small <= (1.02 * of_samples if held else 2**20)
    assert small <= few * (4 * (D + H) + 8) + 2**23
