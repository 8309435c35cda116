"""``glai solve``: a checkpoint from statistics, with samples added and forgotten, as a user runs it."""

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from fits import CLASSES, FEATURES, make_data, save_unfitted
from PIL import Image
from torch import nn

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.cli.main import main
from glai_lightning.fitting.table_columns import TableColumns
from glai_lightning.solvers import PathStatistics

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a checkpoint of a module for rows that its fit standardised, and files of samples."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = SupervisedModule(mlp_head(FEATURES, 16, CLASSES))
    module.classes, module.inputs_standardised = NAMES, True
    rows, labels = make_data(240)
    module.standardise.set(rows.mean(0), rows.std(0))
    save_unfitted(module, "fit.ckpt")
    for name, part in (("first", slice(120)), ("second", slice(120, None)), ("all", slice(None))):
        np.savez(f"{name}.npz", x=rows[part].numpy(), y=np.array(NAMES)[labels[part].numpy()])
    np.savez("new.npz", x_train=rows[:40].numpy() + 20.0, y_train=np.array(["dog"] * 40))
    return tmp_path


def solve(*arguments, statistics="sums.pt", to="solved.ckpt"):
    return main(["solve", "--ckpt_path=fit.ckpt", f"--statistics={statistics}", f"--to={to}", *arguments])


def outputs(checkpoint):
    module = SupervisedModule.load_from_checkpoint(checkpoint)
    return module.predict(make_data(30, seed=1)[0]).probabilities


def test_samples_that_are_added_in_turn_and_forgotten_give_the_model_of_what_is_left(folder, capsys):
    assert solve("--add", "first.npz") == 0
    assert solve("--add", "second.npz", "--to", "both.ckpt") == 0
    assert solve("--add", "all.npz", "--l2", "0.01", statistics="whole.pt", to="whole.ckpt") == 0
    assert solve("--l2", "0.01", to="both.ckpt") == 0
    torch.testing.assert_close(outputs("both.ckpt"), outputs("whole.ckpt"), rtol=1e-4, atol=1e-5)
    assert solve("--forget", "second.npz") == 0
    assert capsys.readouterr().out.splitlines()[-2:][0] == "Forgot 120 samples of 'second.npz'."
    assert PathStatistics(None).load("sums.pt").samples == 120
    labels = SupervisedModule.load_from_checkpoint("whole.ckpt").predict(make_data(30, seed=0)[0]).labels
    assert np.mean([label == NAMES[n % 3] for n, label in enumerate(labels)]) > 0.9


def test_a_new_class_gets_an_output_and_its_name(folder):
    assert solve("--add", "all.npz", "--add", "new.npz", "--validation", "all.npz", "--class_weights=balanced") == 0
    module = SupervisedModule.load_from_checkpoint("solved.ckpt")
    assert module.classes == [*NAMES, "dog"]
    assert set(module.predict(make_data(40)[0] + 20.0).labels) == {"dog"}
    # Sites exchange statistics, not samples.
    assert solve("--add", "first.npz", "--add", "sums.pt", statistics="merged.pt") == 0
    assert PathStatistics(None).load("merged.pt").samples == 120 + 280


def of_a_table():
    """A module for a column of numbers and one of categories, and its samples by the names of their columns."""
    kinds = np.array(["ant", "bee"] * 20)
    frame = pandas.DataFrame(
        {"kind": kinds, "size": (kinds == "bee") * 9.0 + np.arange(40) % 3, "hue": ["a", "b"] * 20}
    )
    module = SupervisedModule(mlp_head(3, 16, 2))
    module.table = TableColumns(["size"], ["hue"], fills=[1.0, "a"], known=[["a", "b"]], rare=[[]])
    frame.to_csv("samples.csv", index=False)
    return module, ["samples.csv", "--label_column", "kind"], frame.drop(columns="kind"), kinds


def of_numbers():
    rows, labels = make_data(40)
    frame = pandas.DataFrame(rows.numpy()).add_prefix("column")
    # Labels from 1 on, as floats: the fit made names of them.
    frame.assign(label=labels.numpy() + 1.0).to_csv("samples.csv", index=False)
    module = SupervisedModule(mlp_head(FEATURES, 16, CLASSES))
    module.classes = ["1", "2", "3"]
    return module, ["samples.csv"], rows, (labels + 1).numpy().astype(str)


class Brightness(nn.Module):
    """A backbone that reads images."""

    def forward(self, images):
        return images.float().mean((2, 3))


def of_images():
    kinds = np.array(["dark", "light"] * 4)
    (images := Path("images")).mkdir()
    for number, kind in enumerate(kinds):
        (images / kind).mkdir(exist_ok=True)
        Image.new("L", (8, 8), 200 * (kind == "light") + number).save(images / kind / f"{number}.png")
    order = np.argsort(kinds, kind="stable")
    pixels = torch.stack([torch.full((3, 8, 8), 200 * (kinds[n] == "light") + n, dtype=torch.uint8) for n in order])
    return SupervisedModule(mlp_head(3, 16, 2), Brightness()), ["images"], pixels, kinds[order]


class Lengths(nn.Module):
    """A backbone that reads texts."""

    def tokenize(self, texts):
        return texts

    def forward(self, texts):
        return torch.tensor([[float(len(text)), float(text.count("a"))] for text in texts])


def of_texts():
    texts, kinds = ["a fine day", "rain, rain, rain again"] * 4, np.array(["pro", "contra"] * 4)
    pandas.DataFrame({"text": texts, "label": kinds}).to_csv("samples.csv", index=False)
    return SupervisedModule(mlp_head(2, 16, 2), Lengths()), ["samples.csv"], texts, kinds


@pytest.mark.parametrize("make", [of_a_table, of_numbers, of_images, of_texts])
def test_samples_are_read_in_every_form_that_a_fit_takes(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module, given, inputs, labels = make()
    module.classes = module.classes or sorted(set(labels.tolist()))
    monkeypatch.setattr("glai_lightning.cli.solve.load_module", lambda *_: module)
    save_unfitted(module, "fit.ckpt")
    assert solve("--add", *given) == 0
    assert PathStatistics(None).load("sums.pt").samples == len(labels)
    assert np.mean(np.array(module.predict(inputs).labels) == labels) > 0.9


def test_numbers_that_outputs_do_not_have_become_names():
    module = SupervisedModule(mlp_head(FEATURES, 16, CLASSES))
    rows, labels = make_data(60)
    statistics = PathStatistics(module.feature_map()).update(rows, labels)
    module.set_solution(statistics.solve(), statistics.classes)
    assert module.classes is None
    statistics.update(rows + 20.0, torch.full((60,), 7))
    module.set_solution(statistics.solve(), statistics.classes)
    assert module.classes == ["0", "1", "2", "7"]
    assert set(module.predict(rows + 20.0).labels) == {"7"}
    assert module.num_classes == 4


def test_a_module_is_made_from_its_configuration_too(folder):
    (folder / "config.yaml").write_text(
        "model:\n  class_path: glai_lightning.SupervisedModule\n  init_args:\n    head:\n"
        f"      class_path: glai_lightning.mlp_head\n      init_args: {{in_features: {FEATURES}, hidden_features: 16, "
        f"out_features: {CLASSES}}}\n"
    )
    assert solve("--add", "all.npz", "--config", "config.yaml") == 0
    assert solve("--add", "all.npz", statistics="described.pt", to="described.ckpt") == 0
    torch.testing.assert_close(outputs("solved.ckpt"), outputs("described.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected `--add` to name samples where there are no statistics yet"),
        (["--add", "no.npz"], "no.npz"),
        (["--add", "fit.ckpt"], "Expected 'fit.ckpt' to hold statistics, but it holds something else"),
        (["--add", "narrow.npz"], "Expected rows of 8 numbers in 'narrow.npz', but got 5"),
        (["--add", "rows.npz"], "Expected 'rows.npz' to hold as many targets `y` as rows `x`"),
        (["--add", "first.npz", "--forget", "second.npz"], "Expected to forget"),
        (["--add", "first.npz", "--head", "forest"], "Expected `head` to be 'ridge', 'lda' or 'prototypes'"),
        (
            ["--ckpt_path", "nothing.ckpt", "--add", "first.npz"],
            "which does not exist",
        ),
        (["--add", "."], "Expected a folder of images for each class in '.', but got 'one.png' in none"),
        (["--add", "rows.csv"], "Expected 'rows.csv' to have the columns 'label', but got 'a', 'b'"),
        (["--add", "rows.csv", "--label_column", "a"], "Expected rows of 8 numbers in 'rows.csv', but got 1"),
        (["--to", "no/solved.ckpt", "--add", "first.npz"], "Expected `--to` to lie in an existing folder"),
    ],
)
def test_what_cannot_be_solved_is_a_sentence_and_writes_nothing(folder, capsys, arguments, message):
    np.savez("narrow.npz", x=np.zeros((3, 5), np.float32), y=np.arange(3))
    np.savez("rows.npz", x=np.zeros((3, 5), np.float32))
    Path("rows.csv").write_text("a,b\n1,2\n")
    Image.new("L", (8, 8)).save("one.png")
    assert solve(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "sums.pt").exists()
    assert not (folder / "solved.ckpt").exists()
