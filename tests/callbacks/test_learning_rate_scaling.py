import pytest
import torch
from fits import CLASSES, FEATURES, HIDDEN, make_data, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import LearningRateScaling

EPOCHS = 3

SCHEDULERS = {
    "none": None,
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (epoch + 1)),
    "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5, 1), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[1],
    ),
}


class Rates(Callback):
    """Writes down the learning rate of every step."""

    def __init__(self, path):
        self.path, self.rates = path, []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(self.rates, self.path)


def rates(folder, schedule, processes, *callbacks, ckpt_path=None):
    module = SupervisedModule(
        mlp_head(FEATURES, HIDDEN, CLASSES),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.04, momentum=0.9),
        lr_scheduler=SCHEDULERS[schedule],
    )
    # One batch an epoch in each process: a step and an epoch are the same to a scheduler.
    loader = DataLoader(TensorDataset(*make_data(32)), batch_size=32 // processes)
    options = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    trainer = make_trainer(
        LearningRateScaling(), Rates(folder / "rates.pt"), *callbacks, max_epochs=EPOCHS, log_every_n_steps=1, **options
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return torch.load(folder / "rates.pt")


def test_one_process_keeps_its_rates(tmp_path):
    assert rates(tmp_path, "none", 1) == [0.04] * EPOCHS


@pytest.mark.processes
def test_two_processes_train_at_twice_the_rate_under_any_schedule_and_after_a_resume(tmp_path):
    for schedule in SCHEDULERS:
        alone = rates(tmp_path, schedule, 1)
        saved = ModelCheckpoint(tmp_path / schedule, save_top_k=-1, filename="{epoch}")
        together = rates(tmp_path, schedule, 2, saved)
        assert together == pytest.approx([2 * rate for rate in alone]), schedule
        resumed = rates(tmp_path, schedule, 2, ckpt_path=tmp_path / schedule / "epoch=0.ckpt")
        assert resumed == pytest.approx(together[1:]), schedule
