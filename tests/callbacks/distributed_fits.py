"""Fits in several processes, and what each of them ended with.

Run as a script, with a folder, a strategy, the kind of BatchNorm and an accelerator, it makes a fit under a strategy
that starts the script again, or spawns what imports it.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fits import CLASSES, FEATURES, make_data, make_trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback, StructureRevert
from glai_lightning.solvers import LogisticSolver

HIDDEN = 12


class SyncBatchNormOnCpu(nn.modules.batchnorm._BatchNorm):
    """PyTorch's own trains on GPUs only. Its forward stays the class's own, by which a head is read."""

    def _check_input_dim(self, x):
        assert x.ndim == 2


def synchronised(x, running_mean, running_var, weight, bias, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return alone(x, running_mean, running_var, weight, bias, False, momentum, eps)
    samples = len(x) * dist.get_world_size()
    total, total_square = all_reduce(torch.stack([x.sum(0), x.square().sum(0)]))
    mean = total / samples
    variance = total_square / samples - mean.square()
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * samples / (samples - 1), momentum)
    return (x - mean) * (variance + eps).rsqrt() * weight + bias


alone = F.batch_norm


class SyncOnCpu(TorchSyncBatchNorm):
    def apply(self, model):
        # The process ends with its fit.
        F.batch_norm = synchronised
        model = super().apply(model)
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = SyncBatchNormOnCpu
        return model

    def revert(self, model):
        for module in model.modules():
            if type(module) is SyncBatchNormOnCpu:
                module.__class__ = nn.SyncBatchNorm
        return super().revert(model)


@dataclass(frozen=True)
class DistributedFit:
    """A fit in several processes.

    Args:
        strategy: name of the strategy, or 'static graph'.
        count: how many processes.
        paths: of the head.
        solver: whether the head is solved once it is frozen.
        body: whether what is below the head is trained.
        norm: 'none', 'batch' for BatchNorm in the head and below, 'sync' for one that is synchronised.
        accumulate: batches before a step of the optimizer.
        check_every_n_steps: of the callback.
        optimizer: class of the optimizer.
        lr: its rate.
        freeze_at_epoch: of the callback.
        revert: whether every freeze is judged a failure, by each process with a score of its own.
        callback: class of the callback.
        samples: of the training data, 191 unless said otherwise: they do not divide evenly among processes.
        rows: batch size in each process.
    """

    strategy: str = "ddp_fork"
    count: int = 2
    paths: str = "output"
    solver: bool = False
    body: bool = True
    norm: str = "none"
    accumulate: int = 1
    check_every_n_steps: int | None = None
    optimizer: type = torch.optim.AdamW
    lr: float = 0.01
    freeze_at_epoch: int | None = None
    revert: bool = False
    callback: type = StructureFreezeCallback
    samples: int = 191
    rows: int = 12

    def __str__(self):
        changed = {name: value for name, value in vars(self).items() if value != getattr(DistributedFit, name)}
        return ", ".join(f"{name}={value}" for name, value in changed.items()) or "all defaults"

    def in_one_process(self):
        """The fit on the same batches, those of all processes put together."""
        return replace(self, strategy="auto", count=1, rows=self.rows * self.count)

    def run(self, folder, **options):
        """Fit, and return the module as the process that asked for the fit has it."""
        seed_everything(0, verbose=False)
        norms = [nn.BatchNorm1d(FEATURES)] if self.norm != "none" else []
        module = SupervisedModule(
            mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=bool(norms)),
            nn.Sequential(nn.Linear(FEATURES, FEATURES), *norms, nn.Tanh()),
            freeze_backbone=not self.body,
            optimizer=partial(self.optimizer, lr=self.lr),
        )
        freeze = self.callback(
            paths=self.paths,
            churn_tolerance=1.0,
            relative_tolerance=0.95,
            min_epochs=0,
            freeze_at_epoch=self.freeze_at_epoch,
            check_every_n_steps=self.check_every_n_steps,
            probe_size=self.samples,
            solver=LogisticSolver(l2=1e-2, max_passes=8) if self.solver else None,
            min_steps=0,
            stop_after_solve=False,
        )
        callbacks = [freeze, StructureRevert("worse", mode="min", patience=1)] if self.revert else [freeze]
        inputs, targets = make_data(self.samples + 51)
        training = TensorDataset(inputs[: self.samples], targets[: self.samples])
        validation = TensorDataset(inputs[self.samples :], targets[self.samples :])
        defaults = {
            "max_epochs": 5,
            "devices": self.count,
            "strategy": self._strategy(),
            "accumulate_grad_batches": self.accumulate,
        }
        if self.norm == "sync" and self.count > 1:
            on_gpus = options.get("accelerator") == "cuda"
            defaults |= {"sync_batchnorm": True} if on_gpus else {"plugins": [SyncOnCpu()]}
        trainer = make_trainer(*callbacks, SaveEveryProcess(folder), **{**defaults, **options})
        # Lightning puts such samplers in place of all others where there are several processes.
        sampler = DistributedSampler(training, num_replicas=1, rank=0) if self.count == 1 else None
        trainer.fit(
            module,
            DataLoader(training, batch_size=self.rows, sampler=sampler),
            DataLoader(validation, batch_size=self.rows),
        )
        return module

    def _strategy(self):
        if self.strategy == "static graph":
            return DDPStrategy(start_method="fork", static_graph=True)
        return self.strategy


def run_as_script(folder, strategy, norm="none", accelerator="cpu"):
    command = [sys.executable, __file__, str(folder), strategy, norm, accelerator]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


class SaveEveryProcess(Callback):
    """Saves what each process ended with, before the processes end."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("worse", float(trainer.current_epoch + trainer.global_rank))

    def on_train_end(self, trainer, pl_module):
        freeze = next(c for c in trainer.callbacks if isinstance(c, StructureFreezeCallback))
        reverts = [c.reverts["head"] for c in trainer.callbacks if isinstance(c, StructureRevert)]
        report = freeze.solve_report
        moments = trainer.optimizers[0].state_dict()["state"]
        ended = {
            "weights": dict(pl_module.named_parameters()) | {f"head.{k}": v for k, v in pl_module.head.named_buffers()},
            "optimizer": {f"{p}.{k}": v for p, state in moments.items() for k, v in state.items() if v is not None},
            "freeze_epoch": freeze.freeze_epoch,
            "reverts": sum(reverts),
            "churn_history": freeze.churn_history,
            "solved": None if report is None else (report.loss, report.start_loss, report.score, report.passes),
            "wrapped": type(trainer.strategy.model).__name__,
        }
        torch.save(ended, self.folder / f"process{trainer.global_rank}.pt")


def read_processes(folder, count):
    return [torch.load(Path(folder) / f"process{rank}.pt", map_location="cpu") for rank in range(count)]


def largest_difference(ended, other, kinds=("weights", "optimizer")):
    """Return the largest difference between what two processes ended with."""
    differences = [0.0]
    for kind in kinds:
        assert ended[kind].keys() == other[kind].keys()
        for name, value in ended[kind].items():
            differences.append((value.double() - other[kind][name].double()).abs().max().item())
    return max(differences)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, strategy, norm, accelerator = sys.argv[1:]
    DistributedFit(strategy, solver=True, norm=norm).run(folder, accelerator=accelerator)
