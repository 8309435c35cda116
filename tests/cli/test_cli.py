"""The ``glai`` command, run as a user runs it: in a folder of their own."""

import csv
import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from interruptions import in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from glai_lightning import GLAIHead, SupervisedModule, mlp_head
from glai_lightning.cli.help import COMMANDS
from glai_lightning.cli.main import main
from glai_lightning.cli.recipes import list_recipes

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SUPERVISED = str(RECIPES / "supervised.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.max_epochs=4", "--model.head.hidden_features=64"]
DRY = [*QUIET, "--trainer.fast_dev_run=true"]
VERSION = Path("runs/supervised/version_0")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(*arguments):
    assert main(["fit", "--config", SUPERVISED, *SHORT, *arguments]) == 0


def fit_in(folder, *arguments):
    """Fit in a folder, and return what was printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        fit(*arguments)
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished fit, for tests that only read, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / VERSION, fit_in(folder)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Return the folder that a resumed fit made, beside that of the fit that it resumes, and what it printed."""
    folder = tmp_path_factory.mktemp("resumed")
    fit_in(folder, "--trainer.max_epochs=1")
    printed = fit_in(folder, "--ckpt_path", str(VERSION / "checkpoints" / "last.ckpt"))
    return folder / VERSION.parent / "version_1", printed


OVERLAY = RECIPES / "multi_gpu.yaml"
# They need data of the user: test_named_backbone_recipes.py runs them.
ON_OWN_DATA = {RECIPES / "images.yaml", RECIPES / "texts.yaml"}


@pytest.mark.parametrize(
    "recipe", sorted(set(RECIPES.glob("*.yaml")) - {OVERLAY} - ON_OWN_DATA), ids=lambda path: path.stem
)
def test_every_shipped_recipe_freezes_itself_and_is_tested(recipe, capsys):
    assert main(["fit", "--config", str(recipe), *QUIET]) == 0
    table = capsys.readouterr().out.split("Fit report")[1]
    assert "frozen after" in table
    assert "(best.ckpt)" in table


def test_a_fit_leaves_logs_checkpoints_plots_and_configuration_in_one_folder(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.csv", "config.yaml", "structure_churn.png", "score_over_seconds.png", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]


def test_the_second_fit_goes_into_a_folder_of_its_own(resumed):
    folder, _ = resumed
    assert (folder / "metrics.csv").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"version_0", "version_1"}


def test_csv_has_the_structure_of_every_epoch_from_the_first_on(finished):
    with (finished[0] / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["structure/frozen"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert all(row["structure/churn"] and row["structure/freeze_epoch"] for row in rows)


def test_tensorboard_has_the_scalars_and_both_plots(finished):
    events = EventAccumulator(str(finished[0]), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    assert {"structure/churn", "structure/frozen", "structure/freeze_epoch", "val/accuracy"} <= set(tags["scalars"])
    assert len(events.Scalars("structure/churn")) == 4
    assert set(tags["images"]) == {"fit_report/structure_churn", "fit_report/score_over_seconds"}
    assert events.Images("fit_report/structure_churn")[0].width == 800
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    entries = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {"learning_rate", "widths", "paths", "churn_tolerance", "relative_tolerance"} <= set(entries)
    assert entries["learning_rate"].number_value == 0.001
    assert entries["widths"].string_value == "64-64-10"
    # The test after the fit, too, leaves the best score as what stands beside them.
    assert events.Scalars("hp_metric")[-1].value == max(event.value for event in events.Scalars("val/accuracy"))


def test_last_checkpoint_is_of_the_last_epoch_whatever_the_score(finished):
    last = torch.load(finished[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 3


def test_the_table_comes_after_the_test_and_holds_its_scores(finished):
    _, output = finished
    assert output.index("Test metric") < output.index("Fit report")
    assert output.count("Fit report") == 1
    assert "test/accuracy" in output.split("Fit report")[1]


def test_a_frozen_checkpoint_is_tested_validated_and_predicted_from_the_command_line(capsys):
    fit("--trainer.max_epochs=6", "--model.optimizer.lr=0.01")
    checkpoint = str(VERSION / "checkpoints" / "last.ckpt")
    module = SupervisedModule.load_from_checkpoint(checkpoint, head=mlp_head(64, 64, 10))
    assert isinstance(module.head, GLAIHead)
    capsys.readouterr()
    for command in ("test", "validate", "predict"):
        assert main([command, "--config", SUPERVISED, *SHORT, "--ckpt_path", checkpoint]) == 0
    assert "Fit report" not in capsys.readouterr().out


def test_a_fit_resumes_from_the_last_checkpoint(resumed):
    assert torch.load(resumed[0] / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3


def test_the_table_of_a_resumed_fit_tells_of_all_epochs(resumed):
    (epochs,) = [line for line in resumed[1].splitlines() if line.strip().startswith("epochs ")]
    assert sum(int(number) for number in epochs.split()[1:]) == 4


def checkpointing(**changes):
    """Return the configuration of a module that is best after its second epoch, with both checkpoints."""
    kept = [{"filename": "best", "monitor": "val/given", "mode": "max"}, {"filename": "last"}]
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    freeze = {"class_path": "glai_lightning.callbacks.StructureFreezeCallback"}
    freeze["init_args"] = {"head": "blocks.head", "freeze_at_epoch": 1}
    trainer = {
        "accelerator": "cpu",
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": "own"},
        },
        "callbacks": [
            {"class_path": "glai_lightning.callbacks.FitReport"},
            freeze,
            *({"class_path": checkpoint, "init_args": {**one, "enable_version_counter": False}} for one in kept),
        ],
    }
    return {"model": {"class_path": "cli_classes.ScoredByEpoch"}, "trainer": {**trainer, **changes}}


def test_a_resumed_fit_tests_the_best_epoch_that_its_table_names(capsys):
    Path("own.yaml").write_text(yaml.safe_dump(checkpointing()))
    arguments = ["--config", "own.yaml", *QUIET]
    assert main(["fit", *arguments, "--trainer.max_epochs=3"]) == 0
    last = "runs/own/version_0/checkpoints/last.ckpt"
    capsys.readouterr()
    assert main(["fit", *arguments, "--trainer.max_epochs=5", "--ckpt_path", last]) == 0
    table = capsys.readouterr().out.split("Fit report")[1]
    assert "best 0.9000 (epoch 1, frozen)" in table
    assert "2.0000 (best.ckpt)" in table


def test_best_and_last_are_those_of_the_latest_fit(capsys):
    Path("own.yaml").write_text(yaml.safe_dump(checkpointing()))
    for _ in range(2):
        assert main(["fit", "--config", "own.yaml", *QUIET, "--trainer.max_epochs=3"]) == 0
    for name, epochs in (("best", 2.0), ("last", 3.0)):
        capsys.readouterr()
        assert main(["test", "--config", "own.yaml", *QUIET, f"--ckpt_path={name}"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "test/epochs" in line]
        assert str(epochs) in line


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_best_checkpoint_without_an_earlier_fit_is_answered_with_a_sentence(command, capsys):
    assert main([command, "--config", SUPERVISED, *DRY, "--ckpt_path=best"]) == 1
    assert "error: Expected the best checkpoint of an earlier fit in 'runs" in capsys.readouterr().err


def test_the_test_split_can_be_left_alone(capsys):
    fit("--trainer.limit_test_batches=0")
    table = capsys.readouterr().out.split("Fit report")[1]
    assert "test/accuracy" not in table


def test_a_frozen_few_shot_checkpoint_is_tested_with_its_interval(capsys):
    recipe = (RECIPES / "prototypical.yaml").read_text()
    Path("own.yaml").write_text(recipe.replace("paths: output", "freeze_at_epoch: 1"))
    arguments = ["--config", "own.yaml", *QUIET, "--trainer.limit_val_batches=5"]
    arguments += ["--data.train_episodes=20", "--data.eval_episodes=20", "--trainer.max_epochs=2"]
    assert main(["fit", *arguments]) == 0
    checkpoint = "runs/prototypical/version_0/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["callbacks"]
    capsys.readouterr()
    assert main(["test", *arguments, "--ckpt_path", checkpoint]) == 0
    assert "test/accuracy_interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "classes"),
    [
        (["--data.classes.train=[0,1,2]", "--data.classes.val=[3,4]", "--data.classes.test=[5,6]"], {0, 1, 2}),
        (["--data.classes.train=0.4", "--data.classes.val=0.3", "--data.classes.test=0.3"], None),
        (
            ["--data.groups=alphabet", "--data.classes.train=[B]", "--data.classes.val=[A]", "--data.classes.test=[C]"],
            {2, 3, 4},
        ),
    ],
)
def test_classes_are_split_from_the_command_line(arguments, classes, capsys):
    labels = np.arange(140) % 7
    alphabets = np.array(["A", "A", "B", "B", "B", "C", "C"])
    np.savez("samples.npz", x=np.random.default_rng(0).normal(size=(140, 784)), y=labels, alphabet=alphabets)
    given = ["--data=glai_lightning.datamodules.EpisodesDataModule", "--data.path=samples.npz", "--data.ways=2"]
    recipe = str(RECIPES / "prototypical.yaml")
    callback = "--trainer.callbacks+=cli_classes.SaysTrainingClasses"
    assert main(["fit", "--config", recipe, *DRY, *given, *arguments, callback]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained on classes")]
    trained_on = set(map(int, said.split()[3:]))
    assert trained_on == classes if classes else len(trained_on) == 3


def optimizer_and_interval(capsys, *arguments):
    """Run a dry fit with a callback that prints what is trained with."""
    callback = "cli_classes.SaysOptimizer"
    assert main(["fit", "--config", SUPERVISED, *DRY, *arguments, f"--trainer.callbacks+={callback}"]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained with")]
    return said.split()[2:]


def test_the_recipe_trains_with_its_own_optimizer(capsys):
    assert optimizer_and_interval(capsys) == ["AdamW", "0.001"]


def test_the_modules_optimizer_can_be_chosen(capsys):
    arguments = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5"]
    assert optimizer_and_interval(capsys, *arguments) == ["SGD", "0.5"]


def test_the_modules_scheduler_can_be_chosen(capsys):
    scheduler = ["--model.lr_scheduler=torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor=0.5"]
    assert optimizer_and_interval(capsys, *scheduler) == ["AdamW", "0.0005", "epoch"]


def test_lightnings_own_optimizer_argument_replaces_the_modules(capsys):
    assert optimizer_and_interval(capsys, "--optimizer=SGD", "--optimizer.lr=0.5") == ["SGD", "0.5"]


def test_a_cycle_from_the_command_line_is_stepped_after_every_batch(capsys):
    scheduler = ["--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.5", "--lr_scheduler.total_steps=9"]
    said = optimizer_and_interval(capsys, "--optimizer=SGD", "--optimizer.lr=0.5", *scheduler)
    assert (said[0], said[-1]) == ("SGD", "step")


def test_a_fit_with_lightnings_optimizer_freezes(capsys):
    fit("--optimizer=AdamW", "--optimizer.lr=0.01")
    assert "frozen after" in capsys.readouterr().out


def test_any_module_and_data_can_be_named(capsys):
    Path("somebody.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "cli_classes.WithItsOwnData"},
                "trainer": {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
            }
        )
    )
    arguments = ["--trainer.callbacks+=glai_lightning.callbacks.StructureFreezeCallback"]
    arguments += ["--trainer.callbacks.head=blocks.head", "--trainer.callbacks.freeze_at_epoch=1"]
    arguments += ["--trainer.callbacks+=glai_lightning.callbacks.FitReport"]
    assert main(["fit", "--config", "somebody.yaml", *QUIET, *arguments]) == 0
    table = capsys.readouterr().out.split("Fit report")[1]
    assert "frozen after 1 epoch (step 5): asked to freeze" in table
    assert "no plots were written" in table


def parsing_error(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_configuration_that_is_not_there_is_named(capsys):
    assert "File does not exist" in parsing_error(capsys, "fit", "--config", "nowhere.yaml")


def test_a_class_that_is_not_there_is_named(capsys):
    error = parsing_error(capsys, "fit", "--config", SUPERVISED, "--model=nowhere.Module")
    assert "No module named 'nowhere'" in error


def test_a_value_of_another_type_is_named(capsys):
    error = parsing_error(capsys, "fit", "--config", SUPERVISED, "--trainer.max_epochs=many")
    assert "trainer.max_epochs" in error
    assert "many" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.head.hidden_features=0"], "Expected `hidden_features` to be an integer of at least 1, but got 0."),
        (["--data.batch_size=0"], "Expected `batch_size` to be an integer of at least 1, but got 0."),
        (
            ["--data=glai_lightning.datamodules.FeaturesDataModule", "--data.path=nowhere.npz"],
            "Expected `path` to be an existing file, but got 'nowhere.npz'.",
        ),
        (
            [
                "--trainer.callbacks+=glai_lightning.callbacks.StructureFreezeCallback",
                "--trainer.callbacks.churn_tolerance=2",
            ],
            "Expected `churn_tolerance` to be a finite number in [0, 1], but got 2.0.",
        ),
        (
            [
                "--trainer.callbacks+=glai_lightning.callbacks.StructureRevert",
                "--trainer.callbacks.monitor=val/accuracy",
                "--trainer.callbacks.patience=0",
            ],
            "Expected `patience` to be an integer of at least 1, but got 0.",
        ),
        (
            ["--model.head.in_features=7"],
            "Expected the head to take the 64 features of the data, but got a head for 7.",
        ),
        (["--ckpt_path=nowhere.ckpt"], "but got 'nowhere.ckpt', which does not exist."),
        (["--ckpt_path=."], "but got '.', which is not a file."),
        (["--ckpt_path=/dev/null"], "but got '/dev/null', which is not a file."),
        (["--trainer.callbacks+=cli_classes.FillsTheDisk"], "error: No space left on device."),
        (["--trainer.callbacks+=cli_classes.CannotDownload"], "A download failed. <urlopen error Name or service"),
        (
            ["--lr_scheduler=ConstantLR"],
            "Expected `--lr_scheduler` to come with `--optimizer`, without which it has no effect",
        ),
        (
            [
                "--model.lr_scheduler=torch.optim.lr_scheduler.ConstantLR",
                "--optimizer=SGD",
                "--optimizer.lr=0.1",
            ],
            "Expected `--optimizer` to come with `--lr_scheduler`",
        ),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.WeightAveraging"], "but got `WeightAveraging`"),
    ],
)
def test_a_wrong_value_is_answered_with_a_sentence(arguments, sentence, capsys):
    assert main(["fit", "--config", SUPERVISED, *DRY, *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line


def test_an_error_of_user_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="Expected something else"):
        main(["fit", "--config", SUPERVISED, *DRY, "--trainer.callbacks+=cli_classes.Fails"])


def test_debug_shows_the_traceback_of_every_error():
    with pytest.raises(ValueError, match="Expected the recipe to be one of"):
        main(["recipes", "nothing", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fti"], f"Expected a command, {', '.join(COMMANDS)}, but got 'fti'."),
        (
            ["fit", "--trainer.max_epochs=3"],
            "Expected `--config` or `--model` to say what is fitted, but got neither. `glai recipes supervised` copies "
            "a configuration to begin with.",
        ),
        (["fit", "--config=rows.npz"], "Expected `--config` to be a YAML file in UTF-8, but got 'rows.npz'."),
    ],
)
def test_no_command_and_no_configuration_are_answered_with_a_sentence(arguments, sentence, capsys):
    np.savez("rows.npz", x=np.zeros(3))
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_recipes_are_listed_with_their_first_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_recipes())
    assert any("A classifier on feature vectors" in line for line in lines)


def test_every_recipe_has_a_description_and_a_method_card():
    for name, description in list_recipes().items():
        assert description
        assert (RECIPES / f"{name}.md").exists()


def test_a_recipe_is_copied_into_the_current_folder_as_it_is():
    assert main(["recipes", "supervised"]) == 0
    assert Path("supervised.yaml").read_text() == Path(SUPERVISED).read_text()


def test_a_recipe_is_copied_where_it_is_asked_to():
    assert main(["recipes", "supervised", "--to", "my/recipes"]) == 0
    assert Path("my/recipes/supervised.yaml").exists()
    assert not Path("supervised.yaml").exists()


def test_a_copy_replaces_a_file_only_when_told_to(capsys):
    Path("supervised.yaml").write_text("mine")
    assert main(["recipes", "supervised"]) == 1
    assert "give `--overwrite` to replace it" in capsys.readouterr().err
    assert Path("supervised.yaml").read_text() == "mine"
    assert main(["recipes", "supervised", "--overwrite"]) == 0
    assert Path("supervised.yaml").read_text() != "mine"


@pytest.mark.parametrize("name", ["nothing", "../recipes/supervised"])
def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(name, capsys):
    assert main(["recipes", name]) == 1
    assert (
        f"Expected the recipe to be one of {', '.join(map(repr, list_recipes()))}, but got" in capsys.readouterr().err
    )


def test_a_recipe_is_not_copied_into_a_file(capsys):
    Path("taken").write_text("")
    assert main(["recipes", "supervised", "--to", "taken"]) == 1
    assert "Expected `--to` to be a folder, but got the file 'taken'." in capsys.readouterr().err


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_package_runs_as_a_module_and_reports_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["glai_lightning", "fit", "--config", SUPERVISED, *SHORT])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("glai_lightning", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert "Fit report" in capsys.readouterr().out
    assert (VERSION / "metrics.csv").exists()


def test_the_installed_command_answers_a_wrong_value_without_a_traceback(monkeypatch, capsys):
    glai = os.path.join(os.path.dirname(sys.executable), "glai")
    monkeypatch.setattr(sys, "argv", [glai, "fit", "--config", SUPERVISED, *DRY, "--model.head.out_features=0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(glai, run_name="__main__")
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "error: Expected `out_features` to be an integer of at least 1, but got 0."
    assert "Traceback" not in error


def in_two_processes_on_a_cpu(recipe):
    cpu = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.sync_batchnorm=false"]
    configs = ["--config", str(RECIPES / f"{recipe}.yaml"), "--config", str(OVERLAY)]
    return ["fit", *configs, *cpu, "--trainer.max_epochs=1", *QUIET[:2]]


def test_the_overlay_runs_a_recipe_in_two_processes():
    # The command itself, because `ddp` starts it again for the second process.
    glai = os.path.join(os.path.dirname(sys.executable), "glai")
    done = run(glai, *in_two_processes_on_a_cpu("supervised"))
    assert done.returncode == 0, done.stderr
    assert "structure/churn" in Path("runs/supervised/version_0/metrics.csv").read_text()


def test_the_overlay_runs_a_recipe_with_views_in_two_processes():
    def run():
        assert main(in_two_processes_on_a_cpu("simclr")) == 0

    assert in_processes(run, 2, seconds=240) == [0, 0]
    assert "structure/churn" in Path("runs/simclr/version_0/metrics.csv").read_text()
