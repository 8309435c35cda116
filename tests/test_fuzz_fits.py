"""Fits at random: each against a fit that freezes by hand in plain PyTorch, and cut and resumed against itself."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, make_data, make_trainer
from interruptions import differences
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from glai_lightning import GLAIHead
from glai_lightning.callbacks import StructureFreezeCallback, StructureRevert
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver, RidgeSolver

#: Random fits of the suite, with those that freeze by hand and those that are resumed; they run in so many tests.
FITS, TESTS = 210, 7
#: Seeds of fits that once ended differently.
PAST = (21, 57, 145)

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, 0.03),
    "momentum": lambda groups: torch.optim.SGD(groups, 0.02, momentum=0.9, nesterov=True),
    "Adam": lambda groups: torch.optim.Adam(groups, 2e-3),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 3e-3),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, 1e-3, momentum=0.5),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, 1e-2),
    "Adamax": lambda groups: torch.optim.Adamax(groups, 2e-3),
}
SCHEDULES = {
    "none": None,
    "step": lambda optimizer, steps: (torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7), "epoch"),
    "cosine": lambda optimizer, steps: (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "step"),
    "warm-up": lambda optimizer, steps: (torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps), "step"),
}


@dataclass
class RandomFit:
    """All that a fit is made of, drawn from a seed."""

    seed: int
    layers: list = field(init=False)

    def __post_init__(self):
        draw = random.Random(self.seed)
        self.paths = draw.choice(["output", "output", "tangent", "independent"])
        by_output = self.paths == "output"
        self.depth = draw.choice([1, 2]) if by_output else 1
        self.batch_norm = by_output and draw.random() < 0.4
        self.slope = draw.choice([0.0, 0.0, 0.1])
        # Before the last Linear it stays with output paths; the others have none.
        self.dropout = draw.choice([0.0, 0.0, 0.3]) if by_output else 0.0
        self.hidden = draw.choice([6, 11])
        self.body = draw.choice(["none", "frozen", "trained"])
        self.optimizer = draw.choice(list(OPTIMIZERS))
        self.schedule = draw.choice(list(SCHEDULES))
        self.decay = draw.choice([0.0, 0.02])
        self.groups = draw.choice([1, 2])
        self.clip = draw.choice([None, None, 0.5])
        self.batch_size = draw.choice([8, 16])
        self.batches = draw.randint(3, 6)
        self.accumulate = draw.choice([1, 1, 2, 3])
        self.val_check_interval = draw.choice([1.0, 1.0, 0.5, 2])
        self.check_every_n_steps = draw.choice([None, None, 1, 2, 3])
        self.epochs = draw.randint(3, 4)
        # Of a fit whose checks lie within epochs the freeze is by churn.
        self.freeze_at_epoch = draw.randint(1, 2) if self.check_every_n_steps is None else None
        self.cut = draw.random()
        solver = draw.choice([None, None, "logistic", "ridge"])
        self.regression = solver == "ridge"
        is_solved = self.body != "trained" and self.freeze_at_epoch is not None and self.paths != "tangent"
        self.solver = solver if is_solved else None
        self.monitor = draw.choice([None, None, "val_loss"])

    def make_module(self):
        seed_everything(self.seed, verbose=False)
        return Fitted(self).double()

    def make_freeze(self):
        return StructureFreezeCallback(
            "head",
            paths=self.paths,
            solver={None: None, "logistic": LogisticSolver(l2=1e-2), "ridge": RidgeSolver(l2=1e-2)}[self.solver],
            stop_after_solve=False,
            freeze_at_epoch=self.freeze_at_epoch,
            check_every_n_steps=self.check_every_n_steps,
            min_epochs=0,
            min_steps=0,
            patience=2,
            churn_tolerance=1.0,
            relative_tolerance=1.0,
            probe_size=self.batch_size,
            verbose=False,
        )

    def data(self):
        inputs, labels = make_data(self.batches * self.batch_size + 30, self.seed)
        # Whole batches: a check right after a cut is made on as many inputs as without it.
        splits = {"train": slice(-30), "val": slice(-30, -15), "test": slice(-15, None)}
        arrays = {f"x_{split}": inputs[rows] for split, rows in splits.items()}
        arrays |= {f"y_{split}": labels[rows] for split, rows in splits.items()}
        return FeaturesDataModule(arrays=arrays, batch_size=self.batch_size, seed=self.seed)

    def run(self, *callbacks, ckpt_path=None):
        """Fit, from the start or from a checkpoint, and return the module and its optimizer."""
        module = self.make_module()
        trainer = make_trainer(
            *callbacks,
            max_epochs=self.epochs,
            accumulate_grad_batches=self.accumulate,
            val_check_interval=self.val_check_interval,
            gradient_clip_val=self.clip,
            num_sanity_val_steps=1,
        )
        trainer.fit(module, datamodule=self.data(), ckpt_path=ckpt_path)
        return module, trainer.optimizers[0]


class Fitted(LightningModule):
    """A head that may have a body before it, with a loss by either of its names."""

    def __init__(self, fit):
        super().__init__()
        self.drawn = fit
        widths, layers = [FEATURES] + [fit.hidden] * fit.depth, []
        for before, width in itertools.pairwise(widths):
            layers += [nn.Linear(before, width), *([nn.BatchNorm1d(width)] if fit.batch_norm else [])]
            layers.append(nn.LeakyReLU(fit.slope) if fit.slope else nn.ReLU())
        layers += [nn.Dropout(fit.dropout)] if fit.dropout else []
        self.body = nn.Identity() if fit.body == "none" else nn.Linear(FEATURES, FEATURES)
        if fit.body == "frozen":
            self.body.requires_grad_(False)
        self.head = nn.Sequential(*layers, nn.Linear(fit.hidden, CLASSES))

    def loss(self, batch):
        outputs, labels = self.head(self.body(batch[0].double())), batch[1]
        if self.drawn.regression:
            return F.mse_loss(outputs, F.one_hot(labels, CLASSES).double())
        return F.cross_entropy(outputs, labels)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        drawn, trained = self.drawn, [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": trained[::2], "weight_decay": drawn.decay}, {"params": trained[1::2]}]
        groups = groups if drawn.groups == 2 else [{"params": trained, "weight_decay": drawn.decay}]
        optimizer = OPTIMIZERS[drawn.optimizer](groups)
        schedule = SCHEDULES[drawn.schedule]
        if schedule is None:
            return optimizer
        scheduler, interval = schedule(optimizer, drawn.epochs * drawn.batches)
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]


class Moment(Callback):
    """Notes with how many optimizer steps taken the head was first met frozen."""

    steps = None

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.steps is None and isinstance(pl_module.head, GLAIHead):
            self.steps = trainer.global_step


class Validations(Callback):
    """Notes how many optimizer steps had been taken at each validation."""

    def __init__(self):
        self.steps = set()

    def on_validation_start(self, trainer, pl_module):
        self.steps.add(trainer.global_step)


class FrozenByHand(nn.Module):
    """The head after a freeze, written out by the formulas for one hidden layer; output paths for any depth."""

    def __init__(self, head, paths):
        super().__init__()
        *front, self.last = head
        self.front, self.paths, first = nn.Sequential(*front), paths, front[0]
        self.slope = getattr(front[-1], "negative_slope", 0.0)
        self.start = [p.detach().clone() for p in (first.weight, first.bias, self.last.weight)]
        self.first = first
        if paths == "independent":
            weight, bias, last = self.start
            self.of_inputs = nn.Parameter(last[:, :, None] * weight)
            self.of_units = nn.Parameter(last * bias)
            self.bias = nn.Parameter(self.last.bias.detach().clone())
        if paths == "output":
            self.front.requires_grad_(False)

    def forward(self, x):
        if self.paths == "output":
            for module in self.front.modules():
                # Dropout right before the last Linear goes on.
                module.train(self.training and module is self.front[-1] and isinstance(module, nn.Dropout))
            return self.last(self.front(x))
        weight, bias, last = self.start
        at_freeze = F.linear(x, weight, bias)
        gates = torch.where(at_freeze > 0, 1.0, self.slope).to(x.dtype)
        if self.paths == "tangent":
            moved = F.linear(gates * self.first(x), last)
            return moved + F.linear(gates * at_freeze, self.last.weight - last, self.last.bias)
        of_paths = torch.einsum("bh,chd,bd->bc", gates, self.of_inputs, x)
        return of_paths + F.linear(gates, self.of_units, self.bias)


class FreezeByHand(Callback):
    """Freezes a head with plain PyTorch before the first batch after a number of optimizer steps."""

    def __init__(self, paths, steps):
        self.paths, self.steps, self.is_done = paths, steps, False

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.is_done or trainer.global_step != self.steps:
            return
        self.is_done = True
        optimizer = trainer.optimizers[0]
        before = set(pl_module.head.parameters())
        pl_module.head = head = FrozenByHand(pl_module.head, self.paths).train()
        if self.paths == "independent":
            head.requires_grad_(False)
            new = {head.last.weight: [head.of_inputs], head.last.bias: [head.of_units, head.bias]}
            for group in optimizer.param_groups:
                group["params"] = [now for p in group["params"] for now in new.get(p, [p])]
            for parameter in (head.of_inputs, head.of_units, head.bias):
                parameter.requires_grad_(True)
        for parameter in before:
            if not parameter.requires_grad:
                parameter.grad = None
                optimizer.state.pop(parameter, None)


def outputs_of(module, fit):
    inputs = make_data(40, fit.seed + 1)[0].double()
    with torch.no_grad():
        return module.eval()(inputs) if isinstance(module, nn.Sequential) else module.head.eval()(module.body(inputs))


def state_of(module, optimizer):
    return {"weights": dict(module.state_dict()), "optimizer": optimizer.state_dict()}


def by_hand_differs(fit, module, moment):
    """Compare a fit that is not solved with one that freezes by hand."""
    if fit.solver is not None or moment.steps is None:
        return None
    other, _ = fit.run(FreezeByHand(fit.paths, moment.steps))
    expected, found = outputs_of(other, fit), outputs_of(module, fit)
    error = float((found - expected).abs().max() / expected.abs().max())
    return f"by hand: {error:.2g}" if not error < 1e-8 else None


def resumed_differs(fit, folder):
    """Compare a fit with one that goes on from a checkpoint at a step."""

    def companions(freeze):
        return [freeze, *([StructureRevert(fit.monitor, "min", tolerance=0.0, patience=1)] if fit.monitor else [])]

    # Lightning saves no state of the random numbers that dropout would draw.
    fit.dropout = 0.0
    save, validations = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), Validations()
    whole = state_of(*fit.run(*companions(fit.make_freeze()), save, validations))
    steps = {int(file.stem.removeprefix("step=")) for file in folder.glob("*.ckpt")}
    # Of a checkpoint that is saved between a batch and its validation Lightning resumes without that validation.
    steps = sorted(steps - validations.steps if fit.monitor else steps)
    if not steps:
        return None
    cut = folder / f"step={steps[int(fit.cut * (len(steps) - 1))]}.ckpt"
    resumed = state_of(*fit.run(*companions(fit.make_freeze()), ckpt_path=cut))
    wrong = differences(whole, resumed)
    return f"resumed: {wrong[:4]}" if wrong else None


def fits_that_differ(seeds, folder):
    """Run the fits of some seeds, and return what differs, by seed, and how many fits there were."""
    differ, fits = {}, 0
    for seed in seeds:
        fit, moment = RandomFit(seed), Moment()
        module, _ = fit.run(fit.make_freeze(), moment)
        found = [by_hand_differs(fit, module, moment), resumed_differs(fit, folder / str(seed))]
        fits += 2 + (folder / str(seed)).exists() + (fit.solver is None and moment.steps is not None)
        if any(found):
            differ[seed] = (list(filter(None, found)), fit)
    return differ, fits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(TESTS))
def test_a_fit_at_random_is_one_frozen_by_hand_and_resumes_to_itself(part, tmp_path, pytestconfig, record_property):
    wanted = (pytestconfig.getoption("--fuzz-fits") or FITS) // TESTS
    seeds, fits = iter([*(PAST if part == 0 else ()), *range(1000 + part, 1_000_000, TESTS)]), 0
    while fits < wanted:
        differ, ran = fits_that_differ([next(seeds)], tmp_path)
        fits += ran
        assert not differ
    record_property("fuzzed fits", fits)
