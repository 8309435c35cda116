"""A fit that freezes in its middle, beside everything that people put into a fit."""

import copy
import itertools

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from interruptions import Series
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import GLAIHead, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.solvers import LogisticSolver

PATHS = ("output", "tangent", "independent")
FREEZE, EPOCHS, BATCHES = 2, 4, 5

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, 3e-3, weight_decay=1e-3),
    "fused Adam": lambda p: torch.optim.Adam(p, 3e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "LBFGS with line search": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3, line_search_fn="strong_wolfe"),
}


class AtFreeze(Callback):
    """Keeps what the frozen parameters were when the head was frozen, and the loss of every epoch."""

    def __init__(self):
        self.frozen, self.losses = {}, []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == FREEZE:
            head = pl_module.blocks["head"]
            self.frozen = {t: t.detach().clone() for units in head.structure for t in units.tensors().values()}

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["loss"]))


def module_with(make_optimizer, **config):
    """Return a module with an optimizer of its parameters, and a scheduler and what belongs to it in its config."""

    class Module(SomebodysModule):
        def training_step(self, batch, batch_idx):
            self.log("constant", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            return {"optimizer": optimizer, **{key: make(optimizer) for key, make in config.items()}}

    torch.manual_seed(1)
    return Module()


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_stands_still_and_the_rest_goes_on_learning(name, paths):
    at_freeze = AtFreeze()
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None)
    make_trainer(freeze, at_freeze, max_epochs=EPOCHS).fit(module_with(OPTIMIZERS[name]), make_loader())
    assert len(at_freeze.frozen) >= 2
    assert all(torch.equal(parameter, value) for parameter, value in at_freeze.frozen.items())
    assert at_freeze.losses[-1] < at_freeze.losses[0]


SCHEDULERS = {
    "StepLR": lambda o: {"scheduler": lr_scheduler.StepLR(o, 1, 0.5)},
    "OneCycleLR": lambda o: {
        "scheduler": lr_scheduler.OneCycleLR(o, [1e-2, 3e-2], total_steps=EPOCHS * BATCHES),
        "interval": "step",
    },
    "CosineAnnealingLR": lambda o: {
        "scheduler": lr_scheduler.CosineAnnealingLR(o, EPOCHS * BATCHES),
        "interval": "step",
    },
    "CosineAnnealingWarmRestarts": lambda o: {"scheduler": lr_scheduler.CosineAnnealingWarmRestarts(o, 2)},
    "ReduceLROnPlateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
        "monitor": "constant",
    },
    "LambdaLR": lambda o: {"scheduler": lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (1 + n)])},
    "warm-up, then cosine": lambda o: {
        "scheduler": lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.1, total_iters=BATCHES), lr_scheduler.CosineAnnealingLR(o, 3 * BATCHES)],
            milestones=[BATCHES],
        ),
        "interval": "step",
    },
}


def rates_of(name, **freeze):
    def two_groups(parameters):
        body, *rest = parameters
        return torch.optim.AdamW([{"params": [body], "lr": 1e-2}, {"params": rest, "lr": 3e-2}])

    series = Series()
    callback = StructureFreezeCallback(HEAD, **{"solver": None, "stop_after_solve": False, "min_steps": 0, **freeze})
    options = {"max_epochs": EPOCHS, "logger": series, "log_every_n_steps": 1}
    module = module_with(two_groups, lr_scheduler=SCHEDULERS[name])
    make_trainer(callback, LearningRateMonitor("step"), **options).fit(module, make_loader())
    rows = [{key: value for key, value in row.items() if key.startswith("lr-")} for _, row in series.rows]
    return callback.frozen, [row for row in rows if row]


@pytest.mark.parametrize("paths", ["output", "independent"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_a_fit_that_does_not_freeze(name, paths):
    frozen, rates = rates_of(name, paths=paths, freeze_at_epoch=FREEZE)
    never_frozen, expected = rates_of(name, churn_tolerance=0.0)
    assert (frozen, never_frozen) == (True, False)
    assert rates == expected
    assert all(len(row) == 2 for row in rates)
    assert len(rates) == EPOCHS * BATCHES
    assert rates[0] != rates[-1]


@pytest.mark.parametrize("paths", PATHS)
def test_weight_decay_goes_on_in_its_group_alone(paths):
    rate, decay = 0.1, 0.5

    class OnlyDecays(SomebodysModule):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

        def configure_optimizers(self):
            head = self.blocks["head"]
            decayed = [head[0].weight, head[2].weight]
            rest = [p for p in self.parameters() if all(p is not d for d in decayed)]
            return torch.optim.AdamW(
                [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}], rate
            )

    class Values(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == FREEZE:
                self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    values, module = Values(), OnlyDecays()
    make_trainer(
        StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None), values, max_epochs=EPOCHS
    ).fit(module, make_loader())
    factor = (1 - rate * decay) ** ((EPOCHS - FREEZE) * BATCHES)
    shrinks = {
        "output": {f"{HEAD}.2.weight"},
        "tangent": {f"{HEAD}.0.weight", f"{HEAD}.2.weight"},
        "independent": {f"{HEAD}.2.path_weights"},
    }[paths]
    for name, parameter in module.named_parameters():
        expected = values.before[name] * (factor if name in shrinks else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=0.0)


class NotesClipping(SomebodysModule):
    """Keeps the gradients of every step, before and after they are clipped."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        before = self.gradients()
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        self.steps.append((trained, before, self.gradients()))


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_over_what_is_trained(algorithm, paths):
    limit, module = 0.02, NotesClipping()
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "max_epochs": EPOCHS}
    make_trainer(StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None), **options).fit(
        module, make_loader()
    )
    assert len(module.steps) == EPOCHS * BATCHES
    for trained, before, after in module.steps:
        assert set(before) == set(after) == trained
        norm = torch.cat([gradient.flatten() for gradient in before.values()]).norm()
        for name, gradient in before.items():
            clipped = gradient.clamp(-limit, limit) if algorithm == "value" else gradient * min(1, limit / norm)
            torch.testing.assert_close(after[name], clipped, rtol=1e-3, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed is bf16-mixed where there is no GPU")
@pytest.mark.parametrize("paths", PATHS)
def test_half_precision_goes_on_with_its_loss_scale(paths):
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None)
    at_freeze = AtFreeze()
    trainer = make_trainer(freeze, at_freeze, max_epochs=EPOCHS, precision="16-mixed", accelerator="gpu", devices=1)
    trainer.fit(SomebodysModule(), make_loader())
    assert freeze.frozen
    assert at_freeze.losses[-1] < at_freeze.losses[0]


def test_early_stopping_counts_on_across_the_freeze():
    def stopped_after(**freeze):
        module = module_with(OPTIMIZERS["AdamW"])
        stopping = EarlyStopping("constant", patience=3)
        trainer = make_trainer(
            StructureFreezeCallback(HEAD, solver=None, min_steps=0, **freeze), stopping, max_epochs=9
        )
        trainer.fit(module, make_loader())
        return trainer.current_epoch

    assert stopped_after(freeze_at_epoch=FREEZE) == stopped_after(churn_tolerance=0.0) == 4


def evaluate(paths, file):
    """Validate a checkpoint in a process that has seen nothing of its fit."""
    trainer = make_trainer(StructureFreezeCallback(HEAD, paths=paths, solver=None, min_steps=0))
    (result,) = trainer.validate(SomebodysModule(), make_loader(60), ckpt_path=file, verbose=False)
    return result["val_loss"]


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole checkpoints", "weights only"])
@pytest.mark.parametrize("paths", PATHS)
def test_the_best_checkpoints_from_both_sides_of_the_freeze_load(tmp_path, paths, weights_only):
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=3, save_weights_only=weights_only)
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None)
    make_trainer(freeze, best, max_epochs=EPOCHS).fit(SomebodysModule(), make_loader(), make_loader(60))
    assert {int(file[-6]) for file in best.best_k_models} == {1, 2, 3}
    for file, score in best.best_k_models.items():
        assert evaluate(paths, file) == pytest.approx(float(score), rel=1e-6)


@pytest.mark.parametrize("paths", PATHS)
def test_the_best_checkpoint_may_be_from_before_the_freeze(tmp_path, paths):
    # The first epoch is the best: the largest loss.
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None)
    trainer, module = make_trainer(freeze, best, max_epochs=EPOCHS), SomebodysModule()
    trainer.fit(module, make_loader(), make_loader(60))
    (result,) = trainer.validate(module, make_loader(60), ckpt_path="best", verbose=False)
    assert result["val_loss"] == pytest.approx(float(best.best_model_score), rel=1e-5)


def test_the_best_checkpoint_may_be_frozen_where_the_head_was_given_back(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    freeze = StructureFreezeCallback(HEAD, freeze_at_epoch=FREEZE, solver=None)
    trainer, module = make_trainer(freeze, best, max_epochs=EPOCHS), SomebodysModule()
    trainer.fit(module, make_loader(), make_loader(60))
    freeze.unfreeze()
    (result,) = trainer.validate(module, make_loader(60), ckpt_path="best", verbose=False)
    assert result["val_loss"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    assert isinstance(module.blocks["head"], GLAIHead)


@pytest.mark.parametrize("paths", PATHS)
def test_the_same_trainer_fits_on(paths):
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=None)
    trainer, module = make_trainer(freeze, max_epochs=EPOCHS), module_with(OPTIMIZERS["SGD"])
    trainer.fit(module, make_loader())
    head = module.blocks["head"]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit_loop.max_epochs = EPOCHS + 2
    trainer.fit(module, make_loader())
    assert module.blocks["head"] is head
    assert (freeze.frozen, freeze.freeze_epoch) == (True, FREEZE)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in module.named_parameters() if p.requires_grad}


class Finetuned(SomebodysModule):
    """A module whose backbone is trained from some epoch on."""

    def __init__(self):
        super().__init__()
        self.backbone, self.body = self.body, nn.Identity()

    def forward(self, x):
        return super().forward(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def fit_finetuned(paths, freeze_first, freeze_at, ckpt_path=None, *more):
    torch.manual_seed(2)
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=freeze_at, solver=None)
    both = [freeze, BackboneFinetuning(2, lambda epoch: 1.5)]
    module = Finetuned()
    trainer = make_trainer(*(both if freeze_first else both[::-1]), *more, max_epochs=5)
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("freeze_at", [0, 1, 3])
@pytest.mark.parametrize(
    ("paths", "freeze_first"),
    [("output", True), ("output", False), ("tangent", True), ("tangent", False), ("independent", False)],
)
def test_a_backbone_may_be_finetuned_from_some_epoch_on(tmp_path, paths, freeze_first, freeze_at):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, trainer = fit_finetuned(paths, freeze_first, freeze_at, None, saved)
    assert all(p.requires_grad for p in module.backbone.parameters())
    assert len(trainer.optimizers[0].param_groups) == 2
    trained = {name for name, p in module.blocks.named_parameters() if p.requires_grad}
    for cut in sorted(tmp_path.glob("*.ckpt"))[:-1]:
        resumed, trainer = fit_finetuned(paths, freeze_first, freeze_at, cut)
        assert {name for name, p in resumed.blocks.named_parameters() if p.requires_grad} == trained
        assert len(trainer.optimizers[0].param_groups) == 2
        if int(cut.stem[-1]) < 2:
            # After that Lightning itself resumes with a backbone that is not trained (#21901).
            assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())


def test_finetuning_behind_independent_paths_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match="Expected `BackboneFinetuning` to stand before the structure"):
        fit_finetuned("independent", True, 1)


class Tuned(SomebodysModule):
    lr, batch_size = 1e-3, 8

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*make_data()), self.batch_size)

    val_dataloader = train_dataloader


FINDERS = {
    "lr_find": lambda trainer, module: Tuner(trainer).lr_find(module, num_training=10),
    "scale_batch_size": lambda trainer, module: Tuner(trainer).scale_batch_size(
        module, max_trials=2, steps_per_trial=3
    ),
}


@pytest.mark.parametrize("options", [{"freeze_at_epoch": 0}, {"check_every_n_steps": 1, "min_epochs": 0}], ids=str)
@pytest.mark.parametrize("finder", FINDERS)
def test_nothing_happens_while_the_tuner_runs(tmp_path, finder, options):
    freeze = StructureFreezeCallback(
        HEAD, churn_tolerance=1.0, relative_tolerance=1.0, solver=None, min_steps=0, **options
    )
    module = Tuned()
    trainer = make_trainer(freeze, max_epochs=2, default_root_dir=tmp_path)
    before = copy.deepcopy(module.state_dict())
    FINDERS[finder](trainer, module)
    assert type(module.blocks["head"]) is nn.Sequential
    assert not freeze.frozen
    assert freeze.churn_history == []
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    trainer.fit(module)
    assert freeze.frozen
    assert freeze.freeze_epoch == 0


@pytest.mark.parametrize("finder_first", [True, False])
@pytest.mark.parametrize(
    "make_finder",
    [lambda: LearningRateFinder(num_training_steps=10), lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2)],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_finders_may_be_callbacks_of_the_same_fit(tmp_path, make_finder, finder_first):
    freeze, module = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None), Tuned()
    both = [make_finder(), freeze]
    make_trainer(*(both if finder_first else both[::-1]), max_epochs=3, default_root_dir=tmp_path).fit(module)
    assert freeze.freeze_epoch == 1
    assert len(freeze.churn_history) == 1
    assert isinstance(module.blocks["head"], GLAIHead)


AVERAGING = {
    "WeightAveraging": WeightAveraging,
    "EMAWeightAveraging": EMAWeightAveraging,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=1e-3),
}


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("first", [True, False])
def test_callbacks_that_average_weights_are_refused_by_name(name, first):
    both = [StructureFreezeCallback(HEAD, solver=None, min_steps=0), AVERAGING[name]()]
    with pytest.raises(
        MisconfigurationException, match=f"averages weights beside the structure freeze, but got `{name}`"
    ):
        make_trainer(*(both if first else both[::-1])).fit(SomebodysModule(), make_loader())


class _Head(torch.nn.Module):
    """dynamo does not compile a bare Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = mlp_head(FEATURES, HIDDEN, CLASSES)

    def forward(self, x):
        return self.layers(x)

    def __getitem__(self, index):
        return self.layers[index]


class Compiled(SomebodysModule):
    """A module without `self.log`, which dynamo does not get through."""

    def __init__(self, how, backend):
        super().__init__(_Head())
        self.how, self.backend, self.losses = how, backend, []

    def configure_model(self):
        if self.how == "module.compile() in configure_model":
            self.compile(backend=self.backend)
        if self.how == "head.compile() in configure_model":
            self.blocks["head"].compile(backend=self.backend)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


class CountsRuns:
    """A backend of torch.compile that runs the graphs as they are, and counts the runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, example_inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


COMPILED = [
    "head.compile() in configure_model",
    "module.compile() in configure_model",
    "head.compile()",
    "torch.compile(module)",
]


@pytest.mark.parametrize("solver", [None, LogisticSolver(max_passes=4)], ids=["no solver", "a solver"])
@pytest.mark.parametrize("paths", ["output", "independent"])
@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.filterwarnings("ignore:The head will be solved")
def test_what_is_compiled_runs_compiled_to_the_last_step(how, paths, solver):
    def losses_of(how, backend):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = Compiled(how, backend)
        if how == "head.compile()":
            module.blocks["head"].compile(backend=backend)
        given = torch.compile(module, backend=backend) if how == "torch.compile(module)" else module
        runs = []

        class Runs(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                runs.append(backend.runs)

        freeze = StructureFreezeCallback(
            HEAD, paths=paths, freeze_at_epoch=FREEZE, solver=solver, stop_after_solve=False
        )
        make_trainer(freeze, Runs(), max_epochs=EPOCHS).fit(given, make_loader())
        assert freeze.frozen
        assert isinstance(module.blocks["head"], GLAIHead)
        # A second fit of the same module, in the same process.
        again = StructureFreezeCallback(HEAD, paths=paths, solver=solver, min_steps=0, stop_after_solve=False)
        make_trainer(again, max_epochs=1).fit(given, make_loader())
        return module.losses, runs

    eager, none = losses_of("not at all", CountsRuns())
    compiled, runs = losses_of(how, CountsRuns())
    assert none == [0] * EPOCHS
    assert compiled == pytest.approx(eager, rel=1e-5)
    steps = [now - before for before, now in itertools.pairwise(runs)]
    # Until the head is solved, the first step of an epoch is seen uncompiled.
    assert min(steps) >= BATCHES - (solver is not None)
    assert min(steps[FREEZE - 1 :]) >= BATCHES


def test_a_head_compiled_by_inductor_goes_on_compiled():
    torch._dynamo.reset()
    module = SomebodysModule()
    module.blocks["head"].compile()
    freeze = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    make_trainer(freeze, max_epochs=2, limit_train_batches=1).fit(module, make_loader())
    assert freeze.frozen
    assert module.blocks["head"]._compiled_call_impl is not None


def test_a_head_wrapped_by_torch_compile_is_refused_with_what_works():
    module = module_with(OPTIMIZERS["SGD"])
    module.blocks["head"] = torch.compile(module.blocks["head"], backend="eager")
    with pytest.raises(
        MisconfigurationException, match=r"wrapped by `torch.compile\(head\)`. Call `head.compile\(\)` instead"
    ):
        make_trainer(StructureFreezeCallback(HEAD, solver=None, min_steps=0)).fit(module, make_loader())


class OfTheTwin(pytorch_lightning.LightningModule):
    """A module of ``pytorch_lightning``."""

    def __init__(self):
        super().__init__()
        self.head = mlp_head(FEATURES, HIDDEN, CLASSES)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.head(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.9)]


@pytest.mark.parametrize("solver", [None, LogisticSolver(max_passes=4)], ids=["no solver", "a solver"])
@pytest.mark.parametrize("paths", ["output", "independent"])
def test_a_trainer_and_callbacks_of_the_twin_freeze_and_resume_bitwise(tmp_path, paths, solver):
    def run(ckpt_path=None, *more):
        torch.manual_seed(3)
        freeze = StructureFreezeCallback(paths=paths, freeze_at_epoch=FREEZE, solver=solver, stop_after_solve=False)
        module = OfTheTwin()
        # A callback of `lightning.pytorch` and those of its twin in one list.
        callbacks = [freeze, pytorch_lightning.callbacks.EarlyStopping("val_loss", patience=9), *more]
        trainer = pytorch_lightning.Trainer(
            max_epochs=EPOCHS,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(more),
        )
        trainer.fit(module, make_loader(), make_loader(60), ckpt_path=ckpt_path)
        assert freeze.frozen
        assert float(trainer.callback_metrics["structure/freeze_epoch"]) == freeze.freeze_epoch
        return module

    module = run(None, pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    assert isinstance(module.head, GLAIHead)
    for cut in sorted(tmp_path.glob("*.ckpt"))[:-1]:
        resumed = run(cut)
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())


def test_averaging_callbacks_of_the_twin_are_refused_by_name():
    twins = [
        StructureFreezeCallback(solver=None, min_steps=0),
        pytorch_lightning.callbacks.StochasticWeightAveraging(1e-3),
    ]
    trainer = pytorch_lightning.Trainer(callbacks=twins, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="`StochasticWeightAveraging`"):
        trainer.fit(OfTheTwin(), make_loader())
