"""``glai predict`` and ``glai test``, as a user runs them after a fit."""

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from glai_lightning import SupervisedModule
from glai_lightning.cli.main import main

RECIPE = str(Path(__file__).parent.parent.parent / "recipes" / "supervised.yaml")
SHORT = ["--trainer.max_epochs=2", "--model.head.hidden_features=64", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
CHECKPOINT = "runs/supervised/version_0/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Return a folder with a finished fit and unlabelled rows in files of all kinds."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", RECIPE, *SHORT, *QUIET]) == 0
        rows = load_digits().data[:40]
        np.savez("rows.npz", x=rows)
        np.savez("narrow.npz", x=rows[:, :7])
        np.savez("labelled.npz", x_train=rows)
        np.savetxt("rows.csv", rows, delimiter=",")
        header = ",".join(f"pixel_{n}" for n in range(64))
        np.savetxt("named.csv", rows, delimiter=",", header=header, comments="")
        Path("words.csv").write_text("a,b\n1,two\n")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(fitted, monkeypatch):
    monkeypatch.chdir(fitted)
    Path("predictions.csv").unlink(missing_ok=True)


def predict(*arguments):
    return main(["predict", *arguments])


def read(path="predictions.csv"):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities(rows):
    return np.array([[float(row[f"probability_{n}"]) for n in range(10)] for row in rows])


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, "best", "last"])
def test_unlabelled_rows_are_labelled_with_their_probabilities(checkpoint, capsys):
    assert predict("--ckpt_path", checkpoint, "--data", "rows.npz") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Predictions of 40 inputs: predictions.csv"
    rows = read()
    assert [int(row["row"]) for row in rows] == list(range(40))
    assert probabilities(rows).sum(1) == pytest.approx(np.ones(40), abs=1e-4)
    assert [int(row["label"]) for row in rows] == probabilities(rows).argmax(1).tolist()
    assert np.mean([int(row["label"]) == y for row, y in zip(rows, load_digits().target, strict=False)]) > 0.8


def test_the_same_rows_have_the_same_predictions_in_every_kind_of_file():
    predicted = []
    for data in ("rows.npz", "rows.csv", "named.csv"):
        assert predict(f"--ckpt_path={CHECKPOINT}", f"--data={data}") == 0
        predicted.append(probabilities(read()))
    assert np.allclose(predicted[0], predicted[1])
    assert np.allclose(predicted[0], predicted[2])


def test_predictions_are_written_as_arrays_too():
    assert predict("--ckpt_path=best", "--data=rows.csv", "--to=predictions.npz") == 0
    with np.load("predictions.npz") as arrays:
        assert arrays["probabilities"].shape == (40, 10)
        assert arrays["row"].tolist() == list(range(40))
        assert arrays["label"].tolist() == arrays["classes"][arrays["probabilities"].argmax(1)].tolist()


def test_the_data_of_a_configuration_is_predicted_for():
    assert predict("--config", RECIPE, *SHORT, *QUIET, "--ckpt_path", CHECKPOINT, "--to=test.csv") == 0
    assert len(read("test.csv")) == 360


def test_tests_and_predictions_leave_no_folders_of_logs():
    before = sorted(Path("runs").rglob("*"))
    assert main(["test", "--ckpt_path=best", *QUIET]) == 0
    assert predict("--ckpt_path=best", "--data=rows.npz") == 0
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predict", "--data=rows.npz"], "Expected `--ckpt_path` to name a checkpoint, or 'best'"),
        (["predict", "--config", RECIPE], "`glai predict` would run on random weights"),
        (["test"], "`glai test` would run on random weights"),
        (["test", "--config", RECIPE], "`glai test` would run on random weights"),
        (["predict", "--ckpt_path=nowhere.ckpt"], "but got 'nowhere.ckpt', which does not exist"),
        (["predict", "--ckpt_path=rows.npz"], "Expected 'rows.npz' to be a checkpoint"),
        (["predict", "--ckpt_path=best", "--data=narrow.npz"], "Expected the head to take the 7 features"),
        (["predict", "--ckpt_path=best", "--data=labelled.npz"], "Expected 'labelled.npz' to hold `x`"),
        (["predict", "--ckpt_path=best", "--data=nowhere.npz"], "but got 'nowhere.npz'"),
        (["predict", "--ckpt_path=best", "--data=words.csv"], "Expected 'words.csv' to hold 2 numbers in each row"),
        (["predict", "--ckpt_path=best", "--data=rows.npz", "--to=a.txt"], "to end with .csv or .npz"),
    ],
)
def test_what_cannot_be_predicted_is_answered_with_a_sentence(arguments, sentence, capsys):
    assert main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line


@pytest.mark.parametrize("arguments", [["--data=rows.npz"], ["--config", RECIPE]])
@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("nowhere/a.csv", "Expected `--to` to lie in an existing folder, but got 'nowhere/a.csv'."),
        ("folder.csv", "Expected `--to` to be a file, but got the folder 'folder.csv'."),
        ("/proc/a.csv", "Expected `--to` to be a file that can be written, but got '/proc/a.csv'."),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_predicted(
    arguments, to, sentence, capsys, monkeypatch
):
    Path("folder.csv").mkdir(exist_ok=True)
    monkeypatch.setattr(SupervisedModule, "predict_step", lambda *args, **kwargs: pytest.fail("It predicts."))
    assert predict(f"--ckpt_path={CHECKPOINT}", f"--to={to}", *arguments) == 1
    assert f"error: {sentence}" in capsys.readouterr().err.splitlines()
