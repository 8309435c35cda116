"""GreenLightningAI heads for PyTorch Lightning: freeze a head's structure in mid-fit, train only what is linear.

The engine imports torch alone; everything that needs Lightning is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from glai_lightning._clone import find_parts_beside
from glai_lightning.heads.churn import ChurnProbe, pattern_churn, structure_settled
from glai_lightning.heads.finding import FoundHead, find_heads
from glai_lightning.heads.frozen import GLAIHead, freeze_structure
from glai_lightning.heads.gated import glu_head, polyglu_head
from glai_lightning.heads.mlp import mlp_head
from glai_lightning.heads.paths import matched_hidden_features
from glai_lightning.heads.patterns import activation_patterns
from glai_lightning.heads.random_features import eugen_head, random_feature_head
from glai_lightning.solvers.refit import distil_eugen, rectify

find_parts_beside()

if TYPE_CHECKING:
    from glai_lightning.modules.head_module import HeadModule
    from glai_lightning.modules.loading import load_frozen
    from glai_lightning.modules.prototypical import PrototypicalModule
    from glai_lightning.modules.simclr import SimCLRModule
    from glai_lightning.modules.supervised import SupervisedModule

__version__ = "0.2.0"

__all__ = [
    "ChurnProbe",
    "FoundHead",
    "GLAIHead",
    "HeadModule",
    "HeadSearchModule",
    "PrototypicalModule",
    "SimCLRModule",
    "SupervisedModule",
    "activation_patterns",
    "distil_eugen",
    "eugen_head",
    "find_heads",
    "freeze_structure",
    "glu_head",
    "load_frozen",
    "matched_hidden_features",
    "mlp_head",
    "pattern_churn",
    "polyglu_head",
    "random_feature_head",
    "rectify",
    "structure_settled",
]

_LOADED_ON_USE = {
    "HeadModule": "glai_lightning.modules.head_module",
    "HeadSearchModule": "glai_lightning.modules.search",
    "PrototypicalModule": "glai_lightning.modules.prototypical",
    "SimCLRModule": "glai_lightning.modules.simclr",
    "SupervisedModule": "glai_lightning.modules.supervised",
    "load_frozen": "glai_lightning.modules.loading",
}


def __getattr__(name: str) -> Any:
    if name in _LOADED_ON_USE:
        return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
