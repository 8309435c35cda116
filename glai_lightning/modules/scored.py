"""Lightning's training, validation and test step, for a module that says what a batch tells its metrics."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from glai_lightning.modules.head_module import HeadModule


class ScoredModule(HeadModule):
    """A head whose batches are all measured in one way, in training, validation and test.

    A subclass calls ``_set_metrics`` in its constructor and overrides ``measure``. Each metric is logged once an epoch,
    as ``train/loss`` or ``val/accuracy``. The arguments are those of ``HeadModule``.
    """

    def _set_metrics(self, make: Callable[[str], Mapping[str, Metric]]) -> None:
        """Set the metrics of each stage: the mean loss, and what ``make`` returns for 'train', 'val' and 'test'."""
        for stage in ("train", "val", "test"):
            self.add_module(f"{stage}_metrics", nn.ModuleDict({"loss": MeanMetric(), **make(stage)}))

    def measure(self, batch: Any) -> Mapping[str, tuple[Any, ...]]:
        """Return what a batch tells the metrics: for each name the arguments of the metric's ``update``.

        The first argument of 'loss' is the loss of the batch, 0-d, which training minimises.
        """
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Measure a batch, and return its loss."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "test")

    def _step(self, batch: Any, stage: str) -> Tensor:
        measured = self.measure(batch)
        metrics: nn.ModuleDict = getattr(self, f"{stage}_metrics")
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric.update(*(part.detach() if isinstance(part, Tensor) else part for part in measured[name]))
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=stage != "train")
        loss: Tensor = measured["loss"][0]
        return loss
