"""Heads: what a head is, how its structure is measured, and what it becomes when that structure is frozen."""

from glai_lightning.heads.churn import ChurnProbe, pattern_churn, structure_settled
from glai_lightning.heads.frozen import GLAIHead, freeze_in_place, freeze_structure, unfreeze_in_place
from glai_lightning.heads.mlp import mlp_head
from glai_lightning.heads.path_activations import cache_path_activations, output_layers
from glai_lightning.heads.paths import matched_hidden_features
from glai_lightning.heads.patterns import activation_patterns

__all__ = [
    "ChurnProbe",
    "GLAIHead",
    "activation_patterns",
    "cache_path_activations",
    "freeze_in_place",
    "freeze_structure",
    "matched_hidden_features",
    "mlp_head",
    "output_layers",
    "pattern_churn",
    "structure_settled",
    "unfreeze_in_place",
]
