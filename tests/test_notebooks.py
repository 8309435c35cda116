"""The notebooks: their cells run, in one namespace and with random weights, and are stored without output."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def code_cells(notebook):
    cells = json.loads((FOLDER / f"{notebook}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(notebook, **constants):
    """Run the cells, with other values for some of the constants, and return their names."""
    names = {}
    for number, cell in enumerate(code_cells(notebook)):
        # What follows a percent sign is IPython's.
        source = re.sub(r"^(\s*)%.*$", r"\1raise AssertionError", "".join(cell["source"]), flags=re.MULTILINE)
        for name, value in constants.items():
            source = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.MULTILINE)
        exec(compile(source, f"{notebook}, code cell {number}", "exec"), names)
    return names


def test_there_are_three():
    assert NOTEBOOKS == ["one_pass", "own_module", "text_and_new_classes"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_they_are_stored_without_output_and_install_the_package_first(notebook):
    cells = code_cells(notebook)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert "%pip install" in "".join(cells[0]["source"])


def test_a_head_of_ones_own_is_frozen_and_solved_and_becomes_plain_layers_again():
    names = run("own_module", MAX_EPOCHS=4)
    assert names["callback"].frozen
    assert names["accuracy"] > names["plain"] > 0.6


@pytest.mark.filterwarnings("ignore:The weights of `TimmBackbone")
def test_a_backbone_sees_the_training_data_once():
    names = run("one_pass")
    assert names["callback"].one_pass_record.samples == 320
    assert names["trainer"].current_epoch == 1
    assert names["scores"]["test/accuracy"] > 0.5


def test_a_class_comes_later_and_one_is_forgotten():
    names = run("text_and_new_classes")
    assert names["three"] > 0.8
    assert names["four"] > 0.8
    assert names["statistics"].counts == {0: 24, 1: 0, 2: 24, 3: 24}
