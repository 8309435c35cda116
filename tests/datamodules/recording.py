"""A fit that writes down which rows every process reads, for tests of order, position and sharding."""

import lightning.pytorch as pl
import torch

from glai_lightning.datamodules import FeaturesDataModule


class Recorder(pl.LightningModule):
    """Notes the targets of every batch: they are row numbers. Fails in a hook where it is told to."""

    def __init__(self, fail_in_hook=None, fail_at_step=None, write_to=None, save_at_step=None):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.fail_in_hook = fail_in_hook
        self.fail_at_step = fail_at_step
        self.write_to = write_to
        self.save_at_step = save_at_step
        self.read = {"train": [], "val": [], "test": []}

    def fail_if_told_to(self, hook):
        if (hook, self.global_step) == (self.fail_in_hook, self.fail_at_step):
            raise RuntimeError("cut")

    def note(self, split, batch, batch_idx):
        self.read[split].append((self.current_epoch, batch_idx, batch[1].tolist()))

    def on_train_batch_start(self, batch, batch_idx):
        self.fail_if_told_to("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        self.fail_if_told_to("training_step")
        self.note("train", batch, batch_idx)
        return self.linear(batch[0]).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.fail_if_told_to("on_train_batch_end")
        if self.global_step == self.save_at_step:
            self.trainer.save_checkpoint(self.write_to / "saved.ckpt")

    def validation_step(self, batch, batch_idx):
        self.fail_if_told_to("validation_step")
        self.note("val", batch, batch_idx)

    def on_validation_end(self):
        self.fail_if_told_to("on_validation_end")

    def on_train_epoch_end(self):
        self.fail_if_told_to("on_train_epoch_end")
        if self.save_at_step == "epoch_end" and self.current_epoch == 0:
            self.trainer.save_checkpoint(self.write_to / "saved.ckpt")

    def on_train_end(self):
        if self.write_to is not None:
            torch.save(self.read, self.write_to / f"rank{self.global_rank}.pt")

    def test_step(self, batch, batch_idx):
        self.note("test", batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbered_rows(num_rows=24, num_test_rows=7, **options):
    """A datamodule whose targets number the rows; by default 19 to train on, 5 to validate on, batches of 4."""
    rows, test_rows = torch.arange(num_rows), torch.arange(num_test_rows)
    arrays = {"x_train": torch.randn(num_rows, 2), "y_train": rows}
    arrays |= {"x_test": torch.randn(num_test_rows, 2), "y_test": test_rows}
    return FeaturesDataModule(arrays=arrays, **({"batch_size": 4, "seed": 3} | options))


def quiet_trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**(quiet | defaults | options))
