"""A fit cut anywhere, by anything, and resumed ends to the last bit where the one that was never cut does."""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_trainer
from interruptions import Cut, Interruption, InterruptionError, Outcome, Series, in_processes, mismatches
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver, RidgeSolver

EPOCHS = 5

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, 2e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=2),
}


@dataclass(frozen=True)
class Setting:
    """What a fit is made of."""

    module: str
    optimizer: str
    paths: str
    solver: LogisticSolver | RidgeSolver | None = None
    check_every_n_steps: int | None = None
    loader: str = "our"
    processes: int = 1

    def __str__(self):
        checks = "checks per epoch" if self.check_every_n_steps is None else "checks within epochs"
        solver = "no solver" if self.solver is None else type(self.solver).__name__
        parts = [
            f"{self.module} module",
            self.optimizer,
            f"{self.paths} paths",
            solver,
            checks,
            f"{self.loader} loader",
        ]
        return ", ".join([*parts, f"{self.processes} process{'es' if self.processes > 1 else ''}"])

    @property
    def head(self):
        return "head" if self.module == "our" else HEAD

    def make_module(self):
        seed_everything(5, verbose=False)
        make_optimizer = OPTIMIZERS[self.optimizer]
        if self.module == "our":
            head = mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True)
            one_cycle = functools.partial(
                torch.optim.lr_scheduler.OneCycleLR,
                max_lr=5e-3,
                total_steps=40,
                cycle_momentum=self.optimizer != "LBFGS",
            )
            return SupervisedModule(head, optimizer=make_optimizer, lr_scheduler=one_cycle)

        class Module(SomebodysModule):
            def configure_optimizers(self):
                if self.optimizer_name == "AdamW":
                    return super().configure_optimizers()
                optimizer = make_optimizer(self.parameters())
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

        Module.optimizer_name = self.optimizer
        return Module()

    def make_freeze(self):
        tolerance = {"churn_tolerance": 1.0, "relative_tolerance": 0.95, "min_epochs": 2}
        if self.check_every_n_steps is not None:
            # Settled in the middle of an epoch.
            tolerance |= {"relative_tolerance": 1.0, "patience": 4}
        return StructureFreezeCallback(
            self.head,
            paths=self.paths,
            solver=self.solver,
            check_every_n_steps=self.check_every_n_steps,
            # So few that the last batch before a check holds them: a check is then the same after any cut.
            probe_size=8 if self.processes == 1 else 4,
            min_steps=0,
            stop_after_solve=False,
            verbose=False,
            **tolerance,
        )

    def make_data(self):
        if self.loader == "our":
            inputs, targets = make_data(200)
            arrays = {
                "x_train": inputs[:170],
                "y_train": targets[:170],
                "x_test": inputs[170:],
                "y_test": targets[170:],
            }
            return {"datamodule": FeaturesDataModule(arrays=arrays, batch_size=32 // self.processes, seed=3)}
        shuffled = StatefulDataLoader(TensorDataset(*make_data(140)), batch_size=32, shuffle=True)
        return {
            "train_dataloaders": shuffled,
            "val_dataloaders": DataLoader(TensorDataset(*make_data(60, seed=1)), batch_size=32),
        }

    def run(self, folder, name, *, cut=None, save=None, ckpt_path=None):
        """Fit, from the start or from a checkpoint, to the end or to a cut."""
        torch.set_num_threads(1)
        freeze = self.make_freeze()
        callbacks = [freeze, LearningRateMonitor("step"), Outcome(str(folder / name), freeze)]
        if save is not None:
            callbacks.append(ModelCheckpoint(folder / name, save_last=True, **save))
        if cut is not None:
            callbacks.append(Interruption(cut))
        options = {"strategy": "ddp", "devices": self.processes} if self.processes > 1 else {}
        trainer = make_trainer(
            *callbacks, max_epochs=EPOCHS, logger=Series(), log_every_n_steps=1, num_sanity_val_steps=2, **options
        )
        trainer.fit(self.make_module(), **self.make_data(), ckpt_path=ckpt_path)

    def outcomes(self, folder, name):
        return [torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in range(self.processes)]


AFTER_EPOCH, AFTER_VALIDATION = {"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}
ON_EXCEPTION = {"save_on_exception": True}


def cuts(setting, frozen_from, steps_per_epoch):
    """Yield cuts before, at and after the freeze and at the end of epochs, each with when checkpoints are saved."""
    # Lightning itself does not bring a StatefulDataLoader back from a checkpoint that was saved between the last batch
    # of an epoch and its validation, or in `on_train_epoch_end`.
    ours = setting.loader == "our"
    after_epoch = AFTER_EPOCH if ours else AFTER_VALIDATION
    at_steps = {"every_n_train_steps": 2 if ours else 6}
    for offset in (-3, 0, 4):
        step = frozen_from + offset
        yield Cut("exception", "on_train_batch_start", step), after_epoch
        yield Cut("SIGTERM", "on_train_batch_start", step), ON_EXCEPTION
        yield Cut("SIGKILL", "on_train_batch_end", step), at_steps
        if setting.processes == 1:
            yield Cut("exception", "on_before_optimizer_step", step), at_steps
    if setting.processes > 1:
        return
    for epoch in range(1, EPOCHS):
        step = epoch * steps_per_epoch
        yield Cut("exception", "on_train_epoch_end", step), AFTER_VALIDATION
        yield Cut("SIGTERM", "on_validation_epoch_start", step), ON_EXCEPTION
        if epoch > 1:
            yield Cut("SIGKILL", "on_validation_end", step), at_steps


def interrupt(setting, folder, name, cut, save):
    """Run a fit into a cut, in this process where it can be survived."""

    def run():
        setting.run(folder, name, cut=cut, save=save)

    if setting.processes > 1 or cut.kind == "SIGKILL":
        codes = in_processes(run, setting.processes)
        assert set(codes) == {{"exception": 1, "SIGTERM": 143, "SIGKILL": -9}[cut.kind]}, codes
        return
    with pytest.raises(InterruptionError if cut.kind == "exception" else SIGTERMException):
        run()


def run_whole(setting, folder, name, **options):
    if setting.processes == 1:
        setting.run(folder, name, **options)
    else:
        assert set(in_processes(lambda: setting.run(folder, name, **options), setting.processes)) == {0}
    return setting.outcomes(folder, name)


LOGISTIC, RIDGE = LogisticSolver(max_passes=6), RidgeSolver()
SETTINGS = [
    Setting("our", "SGD", "output"),
    Setting("our", "AdamW", "independent", LOGISTIC),
    Setting("our", "LBFGS", "output"),
    Setting("our", "AdamW", "output", RIDGE),
    Setting("our", "AdamW", "output", LOGISTIC, check_every_n_steps=3),
    Setting("our", "Adam", "tangent", check_every_n_steps=3),
    Setting("somebody's", "SGD", "tangent"),
    Setting("somebody's", "LBFGS", "independent"),
    Setting("somebody's", "SGD", "independent", check_every_n_steps=3),
    Setting("somebody's", "AdamW", "output", loader="torchdata"),
    Setting("somebody's", "Adam", "output", LOGISTIC, check_every_n_steps=3, loader="torchdata"),
    Setting("our", "AdamW", "output", check_every_n_steps=3, processes=2),
    Setting("somebody's", "Adam", "tangent", processes=2),
    Setting("our", "AdamW", "output", LOGISTIC, processes=2),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_fit_cut_anywhere_ends_where_the_uninterrupted_one_does(setting, tmp_path, record_property, caplog):
    caplog.set_level("ERROR", "lightning.pytorch")
    whole = run_whole(setting, tmp_path, "whole")
    frozen_from, steps_per_epoch = whole[0]["frozen_from"], whole[0]["ended"]["steps"] // EPOCHS
    assert steps_per_epoch < frozen_from < EPOCHS * steps_per_epoch
    found, cells = {}, 0
    for number, (cut, save) in enumerate(cuts(setting, frozen_from, steps_per_epoch)):
        interrupt(setting, tmp_path, str(number), cut, save)
        resumed = run_whole(setting, tmp_path, f"{number} resumed", ckpt_path=tmp_path / str(number) / "last.ckpt")
        cells += 1
        wrong = list(itertools.chain.from_iterable(map(mismatches, whole, resumed)))
        if wrong:
            found[cut] = wrong
    record_property("resume cells", cells)
    record_property("resume mismatches", len(found))
    assert not found
