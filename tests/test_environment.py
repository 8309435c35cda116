"""Imports: torchvision's in the tests' environment, and those of the package where it lies in a clone."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parent.parent


@pytest.mark.parametrize("first", ["torchvision", "glai_lightning"])
def test_torchvision_is_imported_whatever_is_imported_first(first):
    code = (
        f"import importlib.util, {first}; importlib.util.find_spec('torchvision'); "
        "import torchvision.transforms, torchvision.models, lightning.pytorch; torchvision.models.resnet18()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def import_torchvision():
    import torchvision

    assert torchvision.transforms


def test_torchvision_is_imported_in_a_spawned_process():
    process = multiprocessing.get_context("spawn").Process(target=import_torchvision)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_all_parts_are_imported_in_a_clone_that_is_not_installed():
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]; "
        "import glai_lightning.callbacks, glai_lightning.datamodules, glai_lightning.recipes; "
        "print(glai_lightning.callbacks.FitReport.__module__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=CLONE, capture_output=True, text=True, check=True)
    assert ran.stdout == "glai_lightning.callbacks.fit_report\n"
