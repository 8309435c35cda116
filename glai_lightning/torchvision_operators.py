"""Lets torchvision be imported beside a torch build that its compiled library cannot load into.

Package registries carry one torchvision wheel, built for CUDA. Beside a CPU-only torch its shared library does not
load, so that ``torchvision::nms`` and ``torchvision::qnms`` are never declared, and ``import torchvision`` then fails
while it registers their shapes ("operator torchvision::nms does not exist"). Because torchmetrics imports torchvision
where it is installed, ``import lightning`` fails with it. Declaring the two schemas, before either is imported, is
enough: transforms, models and datasets work, only the operators themselves stay absent. Where torch and torchvision
match, nothing is declared.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_library() -> Path | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("_C*.so"), None)


def declare_missing_torchvision_operators() -> torch.library.Library | None:
    """Declare torchvision's operators if torch is a CPU build into which torchvision's library does not load.

    Returns:
        The library that holds the declarations, to be kept alive, or ``None`` where nothing had to be declared.
    """
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return None
    library = _compiled_library()
    if library is None:
        return None
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError:
        fragment = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            fragment.define(schema)  # type: ignore[no-untyped-call]
        return fragment
    return None


#: Declarations end with the object that made them.
DECLARED = declare_missing_torchvision_operators()
