"""LightningModules: any backbone with a pluggable head, and one module for each task."""

from glai_lightning.modules.contrastive import NTXentLoss
from glai_lightning.modules.head_module import HeadModule
from glai_lightning.modules.prototypical import PrototypicalModule
from glai_lightning.modules.search import HeadSearchModule
from glai_lightning.modules.simclr import SimCLRModule
from glai_lightning.modules.supervised import SupervisedModule

__all__ = ["HeadModule", "HeadSearchModule", "NTXentLoss", "PrototypicalModule", "SimCLRModule", "SupervisedModule"]
