"""The demo, on a slice of its table."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from glai_lightning import datamodules
from glai_lightning.checks import UserValueError
from glai_lightning.cli.demo import demonstrate
from glai_lightning.cli.main import main
from glai_lightning.datamodules import FeaturesDataModule

LETTERS = Path(datamodules.__file__).parent / "data" / "letter.npz"


@pytest.fixture
def make_data(tmp_path):
    with np.load(LETTERS) as table:
        rows = {name: table[name][:2000] for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "slice.npz", **rows)
    return partial(FeaturesDataModule, tmp_path / "slice.npz", batch_size=32)


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", line.removeprefix(name))]


def test_the_demo_prints_both_fits_and_says_where_its_picture_is(make_data, tmp_path, capsys):
    path = demonstrate(make_data, tmp_path / "new" / "folder", max_epochs=12)
    text = capsys.readouterr().out
    seconds, cpu_seconds, epochs, validation, test = row(text, "never frozen")
    frozen_seconds, frozen_cpu_seconds, frozen_epochs, frozen_validation, frozen_test = row(text, "frozen and solved")
    assert frozen_epochs < epochs <= 12
    # Twenty-six classes, and more than chance.
    assert min(validation, test, frozen_validation, frozen_test) > 50
    faster, cpu_faster, more_validation, more_test = row(text, "difference")
    # Of seconds that are printed with one decimal.
    assert (seconds - 0.05) / (frozen_seconds + 0.05) - 0.05 <= faster
    assert (cpu_seconds - 0.05) / (frozen_cpu_seconds + 0.05) - 0.05 <= cpu_faster
    assert more_validation == pytest.approx(frozen_validation - validation, abs=0.011)
    assert more_test == pytest.approx(frozen_test - test, abs=0.011)
    assert max(map(len, text.splitlines())) <= max(80, len(f"plot: {path}"))
    assert f"plot: {path}" in text
    assert imread(path, format="png").shape[:2] == (450, 800)


def test_the_demo_says_what_the_solve_brought(make_data, tmp_path, capsys):
    demonstrate(make_data, tmp_path, max_epochs=12)
    text = " ".join(capsys.readouterr().out.split())
    before, after, brought = map(
        float,
        re.search(r"accuracy from ([\d.]+) % to ([\d.]+) % in [\d.]+ seconds \(([-+\d.]+) points\)", text).groups(),
    )
    assert after > before
    assert brought == pytest.approx(after - before, abs=0.011)


def test_a_demo_that_freezes_nothing_fails(make_data, tmp_path):
    with pytest.raises(UserValueError, match="frozen and solved within 1 epochs"):
        demonstrate(make_data, tmp_path, max_epochs=1)
    assert not list(tmp_path.glob("*.png"))


def test_the_command_takes_a_folder(monkeypatch, capsys):
    told = []
    monkeypatch.setattr("glai_lightning.cli.demo.demonstrate", lambda make_data, folder: told.append(folder))
    assert main(["demo", "--to", "elsewhere"]) == 0
    assert told == [Path("elsewhere")]
