"""The file of finished runs."""

import dataclasses

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from glai_lightning.comparison.runs import Epoch, Parameters, Run, RunsFile

CONFIGURATION = {"config": {"fit": {"data": {"batch_size": 32}}}, "machine": {"cores": 2}}


def make_run(variant="mlp", seed=0, **changes):
    run = Run(
        variant=variant,
        seed=seed,
        epochs=[Epoch(0, 0.5, 0.4, 1.2, 0.7, None, False), Epoch(1, 1.0, 0.8, 1.1, 0.8, 0.05, False)],
        finished_seconds=1.1,
        finished_cpu_seconds=0.9,
        best_seconds=1.0,
        best_cpu_seconds=0.8,
        training_seconds=0.6,
        training_cpu_seconds=0.5,
        best_val_score=0.8,
        best_epoch=1,
        test_score=0.75,
        evaluations=2,
        freeze_epoch=None,
        parameters=Parameters(100, 50, 400),
        step_cpu_seconds=0.001,
        peak_memory_bytes=1_000_000,
        bookkeeping_cpu_seconds=0.002,
    )
    return dataclasses.replace(run, **changes)


def test_finished_runs_are_found_again(tmp_path):
    runs = [make_run(), make_run("output", energy_watt_hours=0.2), make_run(seed=1, test_score=None)]
    file = RunsFile(tmp_path / "new" / "runs.jsonl", CONFIGURATION)
    for run in runs:
        file.append(run)
    found = RunsFile(tmp_path / "new" / "runs.jsonl", CONFIGURATION).runs
    assert found == {(run.variant, run.seed): run for run in runs}


def test_a_run_that_was_cut_short_while_it_was_written_is_run_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    file = RunsFile(path, CONFIGURATION)
    file.append(make_run())
    whole = path.read_text()
    file.append(make_run(seed=1))
    path.write_text(path.read_text()[:-20])
    resumed = RunsFile(path, CONFIGURATION)
    assert list(resumed.runs) == [("mlp", 0)]
    assert path.read_text() == whole
    resumed.append(make_run(seed=2))
    assert list(RunsFile(path, CONFIGURATION).runs) == [("mlp", 0), ("mlp", 2)]


def test_runs_of_another_configuration_are_not_mixed_in(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunsFile(path, CONFIGURATION).append(make_run())
    before = path.read_text()
    changed = {"config": {"fit": {"data": {"batch_size": 64}}}, "machine": {"cores": 4}}
    with pytest.raises(MisconfigurationException, match=r"differs in `config.fit.data.batch_size`, `machine.cores`"):
        RunsFile(path, changed)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["a\nb\n", "[]\n", '{"config": {}}\n{"variant": "mlp"}\n', "\n"])
def test_another_file_is_not_taken_for_runs(tmp_path, text):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(MisconfigurationException, match=r"Expected .* to (hold the runs of a comparison|be of this)"):
        RunsFile(path, CONFIGURATION)
    assert path.read_text() == text
