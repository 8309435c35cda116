"""``glai compare``, run as a user runs it: in a folder of their own."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glai_lightning.cli.compare import EXIT_CODES
from glai_lightning.cli.main import main

RECIPE = str(Path(__file__).parent.parent.parent / "recipes" / "supervised.yaml")
TINY = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--model.head.hidden_features=16"]
TINY += ["--trainer.limit_train_batches=8"]
SCORED = ["--score=val/accuracy", "--mode=max"]
FOLDER = Path("runs/comparison/supervised")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _without_plots(request, monkeypatch):
    """Drawing takes longer than the tiny fits do."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("glai_lightning.comparison.protocol.write_plots", lambda comparison, folder: [])


@pytest.fixture
def plots():
    """For a test that reads plots."""


def run(*arguments, config=RECIPE):
    return main(["compare", "--config", str(config), *TINY, *arguments])


def read(folder=FOLDER):
    return json.loads((folder / "comparison.json").read_text())


def error_of(capsys, *arguments, config=RECIPE):
    assert run("--variants=mlp,output", "--seeds=1", *arguments, config=config) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_recipe_is_compared_and_the_exit_code_is_the_verdict(capsys, plots):
    code = run("--seeds=2", "--variants=mlp,random+solve")
    comparison = read()
    assert code == EXIT_CODES[comparison["verdict"]["outcome"]]
    assert [(run["variant"], run["seed"]) for run in comparison["runs"]] == [
        *(("mlp", 0), ("random+solve", 0), ("mlp", 1), ("random+solve", 1)),
    ]
    printed = capsys.readouterr().out
    assert comparison["verdict"]["sentence"] in printed
    assert "best val/accuracy" in printed
    plots = {"score_over_seconds", "finished_head"}
    assert {path.name for path in Path().rglob("*") if path.is_file() and path.parent.name != "tensorboard"} == {
        *("runs.jsonl", "comparison.json", "comparison.md", *(f"{plot}.png" for plot in plots)),
    }
    images = EventAccumulator(str(FOLDER / "tensorboard")).Reload().Tags()["images"]
    assert set(images) == {f"comparison/{plot}" for plot in plots}
    # The same command has nothing left to run.
    before = (FOLDER / "runs.jsonl").read_text()
    assert run("--seeds=2", "--variants=mlp,random+solve") == code
    assert (FOLDER / "runs.jsonl").read_text() == before
    # It replaces its plots.
    assert len(list((FOLDER / "tensorboard").iterdir())) == 1


def test_seeds_begin_at_the_configured_one_and_reach_the_data():
    run("--seeds=1", "--variants=mlp,random+solve", "--seed_everything=7", "--to=here")
    first = read(Path("here"))["runs"][0]
    run("--seeds=1", "--variants=mlp,random+solve", "--seed_everything=8", "--to=there")
    assert (first["seed"], read(Path("there"))["runs"][0]["seed"]) == (7, 8)
    assert first["epochs"][0]["train_loss"] != read(Path("there"))["runs"][0]["epochs"][0]["train_loss"]


def test_lightnings_own_optimizer_argument_trains_a_head_of_matched_width():
    assert run("--seeds=1", "--variants=mlp,independent", "--optimizer=AdamW", "--optimizer.lr=0.01") in (0, 3, 4)
    mlp, independent = read()["runs"]
    assert independent["epochs"][1]["train_loss"] < independent["epochs"][0]["train_loss"]
    assert mlp["parameters"]["total"] != independent["parameters"]["total"]


def test_the_solver_can_be_chosen(capsys):
    solver = ["--solver=glai_lightning.solvers.LogisticSolver", "--solver.l2=0.5"]
    assert run("--seeds=1", "--variants=mlp,random+solve", *solver) == 3
    assert "LogisticSolver(l2=0.5" in read()["config"]["comparison"]["solver"]
    mistaken = ["--solver=glai_lightning.solvers.LogisticSolver", "--solver.l2=-1", "--to=there"]
    assert "Expected `l2`" in error_of(capsys, *mistaken)


def test_somebodys_module_is_compared_by_the_score_and_the_head_that_are_named():
    trainer = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    somebody = {"model": {"class_path": "cli_classes.WithItsOwnData"}, "trainer": trainer}
    Path("somebody.yaml").write_text(yaml.safe_dump(somebody))
    arguments = ["--score=val_loss", "--mode=min", "--head=blocks.head", "--variants=mlp,output", "--seeds=1"]
    assert main(["compare", "--config", "somebody.yaml", *arguments]) == 3
    comparison = read(Path("comparison/somebody"))
    assert (comparison["score"], comparison["mode"], comparison["test_score"]) == ("val_loss", "min", None)


def test_a_configuration_that_a_fit_has_saved_can_be_compared():
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.fast_dev_run=false", "--trainer.limit_test_batches=0"]
    main(["fit", "--config", RECIPE, *TINY, *quiet])
    saved = Path("runs/supervised/version_0/config.yaml")
    assert main(["compare", "--config", str(saved), "--variants=mlp,output", "--seeds=1", "--to=here"]) == 3
    assert read(Path("here"))["test_score"] is None


def test_a_changed_configuration_is_not_mixed_with_finished_runs(capsys):
    run("--variants=mlp,output", "--seeds=1")
    assert "differs in `config.fit.data.init_args.batch_size`" in error_of(capsys, "--data.batch_size=64")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants=mlp,nothing"], "Expected `variants` to be some of 'mlp', 'output+solve'"),
        (["--heads=glue"], "Expected `heads` to be some of 'mlp', 'gelu', 'silu', 'tanh', 'glu', 'polyglu', 'eugen',"),
        (["--seeds=0"], "Expected `seeds` to be an integer of at least 1, but got 0."),
        (["--score=val/loss"], "Expected `--mode` to say whether the best 'val/loss' is the largest"),
        (["--score=val/beauty", "--mode=max"], "Expected the validation score 'val/beauty' to be logged"),
        (["--head=heart"], "Expected `head` to name a module of `SupervisedModule`, but got 'heart'."),
        (
            [
                "--trainer.callbacks=glai_lightning.callbacks.StructureFreezeCallback",
                "--trainer.callbacks.head=h*",
                *SCORED,
            ],
            "Expected `--head` to name the one head of a comparison, but the callback has 'h*'",
        ),
        (["--trainer.callbacks=null"], "Expected `--score` and `--mode` to name the validation score"),
        (["--to=taken/there"], "Expected 'taken/there/runs.jsonl' to be a file that can be read and written, but got"),
        (["--ckpt_path=last"], "Expected every fit of a comparison to start from the beginning"),
        (["--model.head.in_features=7"], "Expected the head to take the 64 features of the data"),
    ],
)
def test_what_cannot_be_compared_is_answered_with_a_sentence(arguments, sentence, capsys):
    Path("taken").write_text("")
    assert sentence in error_of(capsys, *arguments)


def test_arguments_that_cannot_be_parsed_end_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--seeds=many")
    assert stop.value.code == 2
    assert "seeds" in capsys.readouterr().err


def test_an_interrupt_from_the_keyboard_keeps_finished_runs_and_says_how_to_go_on():
    def compare():
        # What is started in the background of a shell ignores interrupts, and what it starts inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open("errors.txt", "w", buffering=1) as sys.stderr:
            run("--variants=mlp,output", "--seeds=50")

    process = multiprocessing.get_context("fork").Process(target=compare)
    process.start()
    runs = FOLDER / "runs.jsonl"
    while not (runs.exists() and runs.read_text().count("\n") > 2):
        assert process.is_alive()
        time.sleep(0.1)
    # Python loses an interrupt that arrives in a finaliser: somebody presses the keys again.
    while process.is_alive():
        os.kill(process.pid, signal.SIGINT)
        process.join(2)
    assert process.exitcode != 0
    assert "the same command goes on from there" in Path("errors.txt").read_text()
    assert runs.read_text().endswith("}\n")
