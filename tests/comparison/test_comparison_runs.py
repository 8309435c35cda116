"""The file of finished runs."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from glai_lightning.comparison.runs import Run, RunsFile
from glai_lightning.fitting.fit_record import EpochRecord, Parameters, SolveRecord

CONFIGURATION = {"config": {"fit": {"data": {"batch_size": 32}}}, "machine": {"cores": 2}}


def make_run(variant="mlp", seed=0, **changes):
    run = Run(
        variant=variant,
        seed=seed,
        epochs=[EpochRecord(0, 0.5, 0.4, 1.2, 0.7), EpochRecord(1, 1.0, 0.8, 1.1, 0.8, 0.05)],
        test_score=0.75,
        finished_seconds=1.1,
        finished_cpu_seconds=0.9,
        parameters=Parameters(100, 50, 400),
    )
    return dataclasses.replace(run, **changes)


def test_finished_runs_are_found_again(tmp_path):
    runs = [
        make_run(),
        make_run("output+solve", solve=SolveRecord(0.1, 0.2, 3, 4, 0.5, 0.6)),
        make_run(seed=1, test_score=None),
    ]
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


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_first_line_that_was_cut_short_is_written_again(tmp_path, length):
    path = tmp_path / "runs.jsonl"
    RunsFile(path, CONFIGURATION)
    whole = path.read_text()
    path.write_text(whole[:length])
    RunsFile(path, CONFIGURATION).append(make_run())
    assert path.read_text().startswith(whole)
    assert list(RunsFile(path, CONFIGURATION).runs) == [("mlp", 0)]


def test_a_target_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(MisconfigurationException, match=r"Expected '.*taken/runs.jsonl' to be a file that can be read"):
        RunsFile(tmp_path / "taken" / "runs.jsonl", CONFIGURATION)


def test_a_folder_that_was_deleted_meanwhile_is_named(tmp_path):
    file = RunsFile(tmp_path / "to" / "runs.jsonl", CONFIGURATION)
    shutil.rmtree(tmp_path / "to")
    with pytest.raises(MisconfigurationException, match=r"to/runs.jsonl' .* but got: No such file or directory"):
        file.append(make_run())


def test_a_full_disk_is_said_and_what_was_written_before_is_kept(tmp_path):
    file = RunsFile(tmp_path / "runs.jsonl", CONFIGURATION)
    file.append(make_run())
    file.path = Path("/dev/full")
    with pytest.raises(MisconfigurationException, match=r"No space left on device. Runs that were finished before"):
        file.append(make_run(seed=1))
    assert list(RunsFile(tmp_path / "runs.jsonl", CONFIGURATION).runs) == [("mlp", 0)]


def test_runs_of_another_configuration_are_not_mixed_in(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunsFile(path, CONFIGURATION).append(make_run())
    before = path.read_text()
    changed = {"config": {"fit": {"data": {"batch_size": 64}}}, "machine": {"cores": 4}}
    with pytest.raises(MisconfigurationException, match=r"differs in `config.fit.data.batch_size`, `machine.cores`"):
        RunsFile(path, changed)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["a\nb\n", "[]\n", "\xff\n", '{"config": {}}\n{"variant": "mlp"}\n', "\n"])
def test_another_file_is_not_taken_for_runs(tmp_path, text):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(MisconfigurationException, match=r"Expected .* to (hold the runs of a comparison|be of this)"):
        RunsFile(path, CONFIGURATION)
    assert path.read_text() == text
