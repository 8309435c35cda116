"""Many heads on the same inputs in one fit: each frozen and solved on its own, the best of them kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer, expect_number
from glai_lightning.fitting.conversion import rewrap
from glai_lightning.fitting.embedded import Embedded
from glai_lightning.fitting.sizes import count_trainable
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.patterns import layout_of
from glai_lightning.modules.description import describe
from glai_lightning.modules.head_module import OptimizerFactory
from glai_lightning.modules.supervised import SupervisedModule


class HeadSearchModule(LightningModule):
    """A classifier with several heads, all trained at once by one optimizer on the same inputs.

    The loss is the sum of the heads' cross-entropies, so that each head is trained as if it were alone.
    ``StructureFreezeCallback("heads.*")`` freezes and solves each on its own. After each validation ``val/accuracy`` is
    that of the best head, and ``val/accuracy/<name>`` that of each. At the end of the fit a table is printed, and the
    best head is saved as a checkpoint of ``SupervisedModule``.

    Args:
        heads: the heads by name, of any widths and kinds, with an output for each class.
        backbone: a frozen module from inputs to embeddings (batch, D); ``None`` where the inputs are rows (batch, D).
        rates: learning rates of heads by their names; the others have that of the optimizer.
        optimizer: makes the optimizer from parameter groups, one for each head.
        keep: how many heads to train to the end. After each validation the worse half of the heads is dropped, by
            accuracy, until so many are left (successive halving, Jamieson and Talwalkar 2015, arXiv 1502.07943). Heads
            that are frozen are not dropped. ``None`` keeps all.
        to: file for the checkpoint of the best head; by default ``best_head.ckpt`` in the folder of the first logger.

    Attributes:
        dropped: heads that were dropped, with the number of the epoch after which that was.

    Raises:
        TypeError: if a head or the backbone is no module.
        ValueError: if there is no head, heads differ in their number of outputs, a rate is that of no head, or ``keep``
            is below 1.

    Example:
        >>> from glai_lightning import mlp_head
        >>> module = HeadSearchModule({"narrow": mlp_head(4, 8, 3), "wide": mlp_head(4, 64, 3)}, rates={"wide": 3e-4})
        >>> module(torch.zeros(2, 4))["wide"].shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        heads: dict[str, nn.Module],
        backbone: nn.Module | None = None,
        *,
        rates: dict[str, float] | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        keep: int | None = None,
        to: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(heads, Mapping) or not all(isinstance(head, nn.Module) for head in heads.values()):
            raise UserTypeError(f"Expected `heads` to be modules by their names, but got {heads!r}.")
        if backbone is not None and not isinstance(backbone, nn.Module):
            raise UserTypeError(f"Expected `backbone` to be a module, but got {backbone!r}.")
        outputs = {name: layout_of(head).output.out_features for name, head in heads.items()}
        if len(set(outputs.values())) != 1:
            raise UserValueError(f"Expected `heads` with one number of outputs, but got {outputs}.")
        for name, rate in (rates or {}).items():
            if name not in heads:
                raise UserValueError(f"Expected `rates` of the heads {list(heads)}, but got one of {name!r}.")
            expect_number(f"rates[{name!r}]", rate, low=0.0)
        if keep is not None:
            expect_integer("keep", keep, least=1)
        self.heads = nn.ModuleDict(dict(heads))
        self.backbone = backbone
        self.freeze_backbone = True
        self.rates = dict(rates or {})
        self.optimizer = optimizer
        self.keep = keep
        self.dropped: dict[str, int] = {}
        self.to_file = to
        classes = next(iter(outputs.values()))
        self.accuracies = nn.ModuleDict({name: MulticlassAccuracy(classes, average="micro") for name in heads})
        self.scores: dict[str, float] = {}
        self._described = {name: describe(head) for name, head in heads.items()}
        if backbone is not None:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "HeadSearchModule":
        """Set the mode of the heads; the backbone stays in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def forward(self, x: Any) -> dict[str, Tensor]:
        """Return the outputs (batch, C) of all heads that were not dropped, by their names."""
        if isinstance(x, Embedded):
            x = x.values
        elif self.backbone is not None:
            with torch.no_grad():
                x = self.backbone(x)
        return {name: head(x) for name, head in self.heads.items() if name not in self.dropped}

    @property
    def dropped_heads(self) -> set[str]:
        """Qualified names of the heads that were dropped; callbacks leave them alone."""
        return {f"heads.{name}" for name in self.dropped}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the heads' mean cross-entropies over a batch ``(inputs, labels)``."""
        inputs, labels = batch
        loss = torch.stack([F.cross_entropy(outputs, labels) for outputs in self(inputs).values()]).sum()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Measure the accuracy of each head; return the loss."""
        inputs, labels = batch
        outputs = self(inputs)
        loss = torch.stack([F.cross_entropy(each, labels) for each in outputs.values()]).sum()
        for name, each in outputs.items():
            self.accuracies[name](each, labels)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Measure the accuracy of each head; return the loss."""
        return self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies, and that of the best head."""
        self.scores = self._log_accuracies("val")
        ends = self.trainer.should_stop or self.current_epoch + 1 == self.trainer.max_epochs
        if self.keep is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and not ends:
            self._drop_worse(self.keep)
        self.log("val/accuracy", max(self.scores.values()), prog_bar=True, sync_dist=True)

    def _drop_worse(self, keep: int) -> None:
        best = sorted(self.scores, key=lambda name: -self.scores[name])
        worse = [name for name in best[max(keep, len(best) // 2) :] if not isinstance(self.heads[name], GLAIHead)]
        self.dropped |= dict.fromkeys(worse, self.current_epoch)
        self._stop_dropped()

    def _stop_dropped(self) -> None:
        for parameter in (p for name in self.dropped for p in self.heads[name].parameters()):
            parameter.requires_grad_(False)
            parameter.grad = None
        rewrap(self.trainer)

    def on_fit_start(self) -> None:
        """Leave heads that were dropped before the checkpoint out again."""
        if self.dropped:
            self._stop_dropped()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put into a checkpoint which heads were dropped."""
        checkpoint["dropped_heads"] = self.dropped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take out of a checkpoint which heads were dropped."""
        dropped = checkpoint.get("dropped_heads", {})
        self.dropped = {name: dropped[name] for name in self.heads if name in dropped}

    def on_test_epoch_end(self) -> None:
        """Log the accuracies, and that of the head that was best in validation."""
        scores = self._log_accuracies("test")
        if self.best is not None:
            self.log("test/accuracy", scores[self.best], sync_dist=True)

    def _log_accuracies(self, stage: str) -> dict[str, float]:
        scores = {}
        for name, accuracy in self.accuracies.items():
            if name in self.dropped:
                continue
            assert isinstance(accuracy, Metric)
            scores[name] = float(accuracy.compute())
            accuracy.reset()
        # Each was computed over all processes already.
        self.log_dict({f"{stage}/accuracy/{name}": score for name, score in scores.items()}, sync_dist=True)
        return scores

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, with a group for each head."""
        groups = []
        for name, head in self.heads.items():
            rate = {"lr": self.rates[name]} if name in self.rates else {}
            groups.append({"params": [p for p in head.parameters() if p.requires_grad], **rate})
        return self.optimizer(groups)  # type: ignore[arg-type]

    @property
    def best(self) -> str | None:
        """Name of the head with the best accuracy in the last validation, the first of several; ``None`` without."""
        return max(self.scores, key=lambda name: self.scores[name]) if self.scores else None

    def best_module(self) -> SupervisedModule:
        """Return the best head with the backbone, as a module of its own; nothing is copied.

        Raises:
            ValueError: if there was no validation.
        """
        if self.best is None:
            raise UserValueError("Expected a validation of the heads before the best of them is asked for.")
        module = SupervisedModule(self.heads[self.best], self.backbone, standardise_embeddings=False)
        # A head that is frozen cannot be described any more.
        module._described_head = self._described[self.best]
        data = getattr(self._trainer, "datamodule", None)
        module.take_data(data)
        names = getattr(data, "classes", None)
        module.classes = list(names) if isinstance(names, list) else None
        return module

    def on_fit_end(self) -> None:
        """Print the table of the heads, and save the best of them."""
        # All processes ask for the folder: the first one broadcasts it.
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        if self.best is None or not self.trainer.is_global_zero:
            return
        path = Path(folder, "best_head.ckpt") if self.to_file is None else Path(self.to_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        module = self.best_module()
        checkpoint = {
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "pytorch-lightning_version": lightning.__version__,
            "state_dict": module.state_dict(),
            module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
        }
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, path)
        print(f"\n{self.table()}\nThe best head, {self.best!r}, is in {path}", flush=True)

    def table(self) -> str:
        """Return a table of the heads, the best first."""
        rows = [("head", "inputs-hidden-outputs", "trainable", "frozen", "val accuracy")]
        for name in sorted(self.scores, key=lambda name: -self.scores[name]):
            head = self.heads[name]
            sizes = "-".join(str(width) for width in layout_of(head).widths)
            frozen = "yes" if isinstance(head, GLAIHead) else "no"
            rows.append((name, sizes, f"{count_trainable(head):,}", frozen, f"{self.scores[name]:.4f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, *(f"Dropped after epoch {epoch}: {name}" for name, epoch in self.dropped.items())])
