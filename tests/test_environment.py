"""Imports: torchvision's in the tests' environment, and those of the package where it lies in a clone."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

CLONE = Path(__file__).parent.parent


USE_TORCHVISION = (
    "import importlib.util; importlib.util.find_spec('torchvision'); "
    "import torchvision.transforms, torchvision.models, lightning.pytorch; torchvision.models.resnet18()"
)


def import_torchvision_first():
    assert "torch" not in sys.modules
    exec(f"import torchvision; {USE_TORCHVISION}")


def test_torchvision_is_imported_first_in_a_spawned_process():
    process = multiprocessing.get_context("spawn").Process(target=import_torchvision_first)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_all_parts_are_imported_in_a_clone_that_is_not_installed_and_torchvision_after_them():
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]; "
        "import glai_lightning.callbacks, glai_lightning.datamodules, glai_lightning.recipes; "
        f"print(glai_lightning.callbacks.FitReport.__module__); {USE_TORCHVISION}"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=CLONE, capture_output=True, text=True, check=True)
    assert ran.stdout == "glai_lightning.callbacks.fit_report\n"
