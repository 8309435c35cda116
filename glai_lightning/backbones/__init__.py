"""Backbones: models of other libraries by name, with their preprocessing, and a small convolutional one."""

from glai_lightning.backbones.convolutional import WithChannel as WithChannel
from glai_lightning.backbones.convolutional import conv_backbone
from glai_lightning.backbones.images import TimmBackbone, TorchvisionBackbone
from glai_lightning.backbones.texts import SentenceTransformersBackbone, TransformersBackbone

__all__ = [
    "SentenceTransformersBackbone",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransformersBackbone",
    "conv_backbone",
]
