"""Small fits of modules that know nothing of this package."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import mlp_head

FEATURES, HIDDEN, CLASSES = 8, 32, 3


def make_data(samples: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=generator) * 2
    targets = torch.arange(samples) % CLASSES
    return centres[targets] + torch.randn(samples, FEATURES, generator=generator), targets


def make_loader(samples: int = 160, batch_size: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(*make_data(samples)), batch_size=batch_size)


class SomebodysModule(LightningModule):
    """A module as people write them: a trained body, a head below another module, two parameter groups."""

    def __init__(self, head: nn.Module | None = None, body: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES) if body else nn.Identity()
        self.blocks = nn.ModuleDict({"head": mlp_head(FEATURES, HIDDEN, CLASSES) if head is None else head})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["head"](torch.tanh(self.body(x)))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        # Reaches into the head as user code does, and would fail on a head that answers to other names.
        decayed = [self.blocks["head"][0].weight]
        rest = [p for p in self.parameters() if p.requires_grad and all(p is not d for d in decayed)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


HEAD = "blocks.head"


def save_unfitted(module: LightningModule, path: str) -> None:
    """Write the checkpoint of a module that was not fitted."""
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def make_trainer(*callbacks, max_epochs: int = 6, **options) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("ModelCheckpoint" in type(callback).__name__ for callback in callbacks),
    }
    return Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **{**defaults, **options})
