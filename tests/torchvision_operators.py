"""Lets torchvision be imported beside a torch build that its compiled library cannot load into.

Run as a script, it installs itself into the environment of the interpreter that runs it: every process of that
environment then mends `import torchvision`, whatever it imports first. The package itself does nothing of the kind.

Some package registries carry one torchvision wheel, built for CUDA. Beside a CPU-only torch its shared library does not
load. `torchvision::nms` and `torchvision::qnms` are then never declared, and `import torchvision` fails while it
registers their shapes ("operator torchvision::nms does not exist"). torchmetrics imports torchvision where it is
installed, so `import lightning` fails as well. It is enough to declare the two schemas before that: transforms, models
and datasets work, and only the operators themselves are absent. Where torch and torchvision match, nothing is declared.
"""

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))


class DeclareBeforeTorchvision:
    """A finder that leaves finding to the others, and has the operators declared before torchvision is executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Find torchvision as it is found without this, and wrap what executes it."""
        if name != "torchvision" or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (declare_missing_operators(module), execute(module))[1]
        return spec


def declare_missing_operators(torchvision):
    """Declare torchvision's operators if its compiled library does not load into this torch."""
    import torch

    library = next(Path(torchvision.__path__[0]).glob("_C*.so"), None)
    if library is None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(library)
    except OSError:
        # Declarations end with the object that made them.
        torchvision._declared_operators = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            torchvision._declared_operators.define(schema)


def install(site_packages):
    """Install this file into an environment, and let each of its processes import it at its start."""
    shutil.copyfile(__file__, site_packages / "torchvision_operators.py")
    (site_packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")


if __name__ == "__main__":
    install(Path(sysconfig.get_paths()["purelib"]))
elif DeclareBeforeTorchvision not in sys.meta_path:
    sys.meta_path.insert(0, DeclareBeforeTorchvision)
