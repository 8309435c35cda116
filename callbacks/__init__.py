"""Callbacks for any LightningModule that has an MLP head."""

from glai_lightning.callbacks.fit_report import FitReport
from glai_lightning.callbacks.learning_rate_scaling import LearningRateScaling
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.callbacks.structure_monitor import StructureMonitor

__all__ = ["FitReport", "LearningRateScaling", "StructureFreezeCallback", "StructureMonitor"]
