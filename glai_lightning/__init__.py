"""GreenLightningAI heads for PyTorch Lightning: freeze a head's structure in mid-fit, train only what is linear.

The engine imports torch alone; everything that needs Lightning is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from glai_lightning import torchvision_operators as torchvision_operators
from glai_lightning.churn import ChurnProbe, pattern_churn, structure_settled
from glai_lightning.heads import GLAIHead, freeze_structure, mlp_head
from glai_lightning.paths import matched_hidden_features
from glai_lightning.patterns import activation_patterns

if TYPE_CHECKING:
    from glai_lightning.modules import HeadModule
    from glai_lightning.prototypical import PrototypicalModule
    from glai_lightning.simclr import SimCLRModule
    from glai_lightning.supervised import SupervisedModule

__version__ = "0.1.0"

__all__ = [
    "ChurnProbe",
    "GLAIHead",
    "HeadModule",
    "PrototypicalModule",
    "SimCLRModule",
    "SupervisedModule",
    "activation_patterns",
    "freeze_structure",
    "matched_hidden_features",
    "mlp_head",
    "pattern_churn",
    "structure_settled",
]

_LOADED_ON_USE = {
    "HeadModule": "glai_lightning.modules",
    "PrototypicalModule": "glai_lightning.prototypical",
    "SimCLRModule": "glai_lightning.simclr",
    "SupervisedModule": "glai_lightning.supervised",
}


def __getattr__(name: str) -> Any:
    if name in _LOADED_ON_USE:
        return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
