"""The demo, on a slice of its table."""

import io
import re
from contextlib import redirect_stdout
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


@pytest.fixture(scope="module")
def make_data(tmp_path_factory):
    with np.load(LETTERS) as table:
        rows = {name: table[name][:2000] for name in ("x_train", "y_train", "x_test", "y_test")}
    path = tmp_path_factory.mktemp("letters") / "slice.npz"
    np.savez(path, **rows)
    return partial(FeaturesDataModule, path, batch_size=32)


@pytest.fixture(scope="module")
def demo(make_data, tmp_path_factory):
    """Return what a demo prints, and its picture."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        picture = demonstrate(make_data, tmp_path_factory.mktemp("demo") / "new" / "folder", max_epochs=12)
    return printed.getvalue(), picture


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", line.removeprefix(name))]


def test_the_demo_prints_both_fits_and_what_lies_between_them(demo):
    text, picture = demo
    seconds, cpu_seconds, epochs, *scores = row(text, "never frozen")
    frozen_seconds, frozen_cpu_seconds, frozen_epochs, *frozen_scores = row(text, "frozen and solved")
    assert frozen_epochs < epochs <= 12
    # Twenty-six classes, and more than chance.
    assert min(*scores, *frozen_scores) > 50
    *faster, more_validation, more_test = row(text, "difference")
    for ratio, one, other in zip(faster, (seconds, cpu_seconds), (frozen_seconds, frozen_cpu_seconds), strict=True):
        # All three are printed with one decimal.
        assert (one - 0.05) / (other + 0.05) - 0.06 <= ratio <= (one + 0.05) / max(other - 0.05, 1e-9) + 0.06
    assert [more_validation, more_test] == pytest.approx(np.subtract(frozen_scores, scores), abs=0.011)
    assert max(len(line) for line in text.splitlines() if str(picture) not in line) <= 80


def test_the_demo_says_what_the_solve_brought(demo):
    text = " ".join(demo[0].split())
    sentence = r"accuracy from ([\d.]+) % to ([\d.]+) % in [\d.]+ seconds \(([-+\d.]+) points\)"
    before, after, brought = map(float, re.search(sentence, text).groups())
    assert after > before
    assert brought == pytest.approx(after - before, abs=0.011)


def test_the_demo_says_where_its_picture_is(demo):
    text, picture = demo
    assert f"plot: {picture}" in text
    assert imread(picture, format="png").shape[:2] == (450, 800)


def test_a_demo_that_freezes_nothing_fails(make_data, tmp_path):
    # In one batch an epoch the optimizer has not made enough steps by then.
    with pytest.raises(UserValueError, match="frozen and solved within 3 epochs"):
        demonstrate(partial(make_data, batch_size=2000), tmp_path, max_epochs=3)
    assert not list(tmp_path.glob("*.png"))


def test_the_command_takes_a_folder(monkeypatch, capsys):
    told = []
    monkeypatch.setattr("glai_lightning.cli.demo.demonstrate", lambda make_data, folder: told.append(folder))
    assert main(["demo", "--to", "elsewhere"]) == 0
    assert told == [Path("elsewhere")]
