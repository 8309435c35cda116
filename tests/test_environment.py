"""The environment of the tests: torchvision can be imported in all of its processes, with or without the package."""

import multiprocessing
import subprocess
import sys

import pytest


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
