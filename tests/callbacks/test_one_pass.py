from types import SimpleNamespace

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, make_data, make_loader
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import mlp_head
from glai_lightning.callbacks import StructureFreezeCallback

HIDDEN, SAMPLES = 16, 150


class Backbone(nn.Module):
    """Counts the samples that it sees, where no reading of a step beside the fit can undo it."""

    def __init__(self, *, norm=False, trains=False, noise=False):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES).requires_grad_(trains)
        self.norm = nn.BatchNorm1d(FEATURES, affine=False) if norm else nn.Identity()
        self.noise = noise
        self.seen = SimpleNamespace(rows=0)

    def forward(self, x):
        self.seen.rows += len(x)
        x = self.norm(torch.tanh(self.linear(x)))
        return x + torch.rand(()) if self.noise else x


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets)


def written_out(logits, targets):
    weights = torch.tensor([1.0, 2.0, 0.5])[targets]
    return -(weights * logits.log_softmax(1)[torch.arange(len(targets)), targets]).mean()


def squared_error(logits, targets):
    return F.mse_loss(logits, F.one_hot(targets, CLASSES).float())


def make_module(base, loss=cross_entropy, **backbone):
    class Module(base):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone(**backbone)
            self.head = mlp_head(FEATURES, HIDDEN, CLASSES, dropout=0.1)

        def features(self, x):
            return self.backbone(x)

        def step(self, batch, name):
            loss_now = loss(self.head(self.features(batch[0]) * 1.5), batch[1])
            self.log(name, loss_now, on_step=False, on_epoch=True)
            return loss_now

        def training_step(self, batch, batch_idx):
            return self.step(batch, "loss")

        def validation_step(self, batch):
            self.step(batch, "val_loss")

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.head.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, self.trainer.estimated_stepping_batches)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    torch.manual_seed(3)
    return Module()


class Trace(Callback):
    """Notes, after each batch of the data loader, all that a fit with and without one pass has in common."""

    def __init__(self):
        self.states, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moments = [v.clone() for state in trainer.optimizers[0].state.values() for v in state.values()]
        weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
        rate = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append([outputs["loss"], *weights, *moments, rate, torch.get_rng_state()])

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append(trainer.callback_metrics["loss"].item())


def freezing(**options):
    return StructureFreezeCallback(**{"min_steps": 0, "freeze_at_epoch": 4, "one_pass": True, **options})


def fit(module, *callbacks, namespace=lightning.pytorch, samples=SAMPLES, loader=None, max_epochs=9, **options):
    options = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, **options}
    options = {"enable_progress_bar": False, "enable_checkpointing": False, **options}
    trainer = namespace.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **options)
    torch.manual_seed(1)
    if loader is None:
        loader = DataLoader(TensorDataset(*make_data(samples)), batch_size=32, shuffle=True)
    trainer.fit(module, loader, make_loader(60))
    return trainer


@pytest.mark.parametrize(
    ("namespace", "loss", "options"),
    [
        (lightning.pytorch, cross_entropy, {}),
        (pytorch_lightning, squared_error, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        (lightning.pytorch, written_out, {"precision": "bf16-mixed"}),
    ],
)
def test_the_first_epoch_is_bitwise_that_of_any_fit_and_the_backbone_sees_the_data_once(namespace, loss, options):
    traces = []
    for one_pass in (True, False):
        module = make_module(namespace.LightningModule, loss)
        trace, freeze = Trace(), freezing(one_pass=one_pass)
        trainer = fit(module, trace, freeze, namespace=namespace, **options)
        traces.append(trace)
        if one_pass:
            steps = 3 if "accumulate_grad_batches" in options else 5
            assert trainer.current_epoch == 1
            assert (trainer.global_step, freeze.freeze_epoch) == (4 * steps, 4)
            assert (
                trainer.optimizers[0].param_groups[0]["lr"]
                == trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
            )
            assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4 * steps
            assert freeze.solve_report.loss < freeze.solve_report.start_loss
            assert module.backbone.seen.rows == 60 + SAMPLES + 60
            record = freeze.one_pass_record
            assert (record.samples, record.passes) == (SAMPLES, 3)
    one, other = traces
    assert one.logged[0] == other.logged[0]
    for state, same in zip(one.states, other.states[: len(one.states)], strict=True):
        assert len(state) == len(same)
        assert all(map(torch.equal, state, same))
