"""Callbacks for any LightningModule that has an MLP head."""

from glai_lightning.callbacks.fit_report import FitReport
from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.callbacks.structure_monitor import StructureMonitor
from glai_lightning.callbacks.structure_revert import StructureRevert

__all__ = ["FitReport", "StructureFreezeCallback", "StructureMonitor", "StructureRevert"]
