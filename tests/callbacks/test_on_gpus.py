"""Fits on GPUs: one ends where a CPU does, and several, over nccl, end with the same weights to the last bit."""

import pytest
import torch
from distributed_fits import DistributedFit, largest_difference, read_processes, run_as_script

pytestmark = pytest.mark.processes

GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize("solver", [False, True])
@pytest.mark.parametrize("paths", ["output", "independent"])
def test_a_fit_on_a_gpu_ends_where_one_on_a_cpu_does(tmp_path, paths, solver):
    fit = DistributedFit("auto", count=1, paths=paths, solver=solver, optimizer=torch.optim.SGD, lr=0.1)
    ended = {}
    for accelerator in ("cpu", "cuda"):
        (tmp_path / accelerator).mkdir()
        fit.run(tmp_path / accelerator, accelerator=accelerator, precision="64-true")
        (ended[accelerator],) = read_processes(tmp_path / accelerator, 1)
    assert ended["cuda"]["freeze_epoch"] == ended["cpu"]["freeze_epoch"] is not None
    assert largest_difference(ended["cuda"], ended["cpu"], kinds=["weights"]) <= 1e-6


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_mixed_float16_survives_the_freeze(tmp_path, paths):
    fit = DistributedFit("auto", count=1, paths=paths)
    module = fit.run(tmp_path, accelerator="cuda", precision="16-mixed")
    (ended,) = read_processes(tmp_path, 1)
    assert ended["freeze_epoch"] is not None
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("norm", ["none", "batch", "sync"])
def test_processes_on_gpus_freeze_together_and_stay_identical_to_the_last_bit(tmp_path, norm):
    run_as_script(tmp_path, "ddp", norm, "cuda")
    first, second = read_processes(tmp_path, 2)
    assert first["freeze_epoch"] == second["freeze_epoch"] is not None
    assert first["solved"] == second["solved"] is not None
    assert largest_difference(first, second) == 0.0
