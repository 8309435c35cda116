import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from glai_lightning import GLAIHead, SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.fitting.solving import HeadSolve
from glai_lightning.solvers import LogisticSolver, RidgeSolver


def solving(name=HEAD, **options):
    defaults = {"freeze_at_epoch": 2, "churn_tolerance": 0.0, "solver": LogisticSolver(max_passes=30)}
    defaults |= {"min_steps": 0, "stop_after_solve": False}
    return StructureFreezeCallback(name, **{**defaults, **options})


def fixed_module(head=None):
    return SomebodysModule(head, body=False)


class Epochs(Callback):
    def __init__(self):
        self.frozen, self.metrics, self.validated = [], [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(isinstance(pl_module.blocks["head"], GLAIHead))

    def on_train_epoch_end(self, trainer, pl_module):
        self.frozen.append(isinstance(pl_module.blocks["head"], GLAIHead))
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def test_the_solved_head_is_validated_logged_and_checkpointed_before_the_fit_stops(tmp_path):
    callback, epochs = solving(stop_after_solve=True), Epochs()
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = fixed_module()
    trainer = make_trainer(callback, epochs, checkpoints, max_epochs=9)
    trainer.fit(module, make_loader(), make_loader())
    assert trainer.current_epoch == 2
    assert callback.frozen
    assert callback.freeze_epoch == 2
    assert epochs.frozen == epochs.validated == [False, True]
    assert epochs.metrics[-1]["structure/frozen"] == 1
    assert epochs.metrics[-1]["structure/freeze_epoch"] == 2
    inputs, targets = make_data()
    assert epochs.metrics[-1]["val_loss"] == pytest.approx(F.cross_entropy(module(inputs), targets).item(), rel=1e-4)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("paths", ["output", "independent"])
def test_the_solve_is_that_of_the_solver_on_the_data_of_the_fit(paths):
    solver = LogisticSolver(l2=1e-2, max_passes=200, tolerance=1e-7)
    callback = solving(solver=solver, paths=paths, stop_after_solve=True)
    module = fixed_module(mlp_head(FEATURES, 6, CLASSES))
    make_trainer(callback, max_epochs=9).fit(module, make_loader())
    head = module.blocks["head"]
    solved = [p.detach().clone() for p in head.parameters()]
    inputs, targets = make_data()
    report = solver.solve(head, torch.tanh(inputs), targets)
    assert callback.solve_report.loss == pytest.approx(report.loss, rel=1e-5)
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(head.parameters(), solved, strict=True))


def test_without_stopping_the_optimizer_goes_on_from_the_solved_weights():
    class Weights(Callback):
        at_start = None

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                optimizer = trainer.optimizers[0]
                self.at_start = pl_module.blocks["head"][2].weight.detach().clone()
                self.forgotten = pl_module.blocks["head"][2].weight not in optimizer.state

    callback, weights, epochs = solving(), Weights(), Epochs()
    module = fixed_module()
    make_trainer(callback, weights, epochs, max_epochs=5).fit(module, make_loader())
    assert epochs.frozen == [False, True, True, True, True]
    assert weights.forgotten
    assert not torch.equal(weights.at_start, module.blocks["head"][2].weight)


def test_a_head_that_settles_by_itself_is_solved():
    callback = solving(freeze_at_epoch=None, churn_tolerance=1.0, relative_tolerance=0.6, stop_after_solve=True)
    module = fixed_module()
    make_trainer(callback, max_epochs=12).fit(module, make_loader())
    assert callback.freeze_epoch == len(callback.churn_history)
    assert callback.solve_report.loss < callback.solve_report.start_loss


def test_frozen_from_the_start_the_random_structure_is_solved_after_its_first_epoch():
    callback = solving(freeze_at_epoch=0, stop_after_solve=True)
    trainer = make_trainer(callback, max_epochs=5)
    trainer.fit(fixed_module(), make_loader())
    assert callback.freeze_epoch == 0
    assert trainer.current_epoch == 1
    assert callback.solve_report is not None


class Augmented(Dataset):
    def __init__(self):
        self.inputs, self.targets = make_data()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + 0.1 * torch.randn(FEATURES) * random.random() * np.random.rand(), self.targets[
            index
        ]


class Tracked(LightningModule):
    """Everything that a second pass could leave a trace in."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.Dropout(0.2))
        self.head = mlp_head(FEATURES, HIDDEN, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.draws = []

    def training_step(self, batch, batch_idx):
        logits = self.head(self.backbone(batch[0]))
        self.accuracy.update(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.head(self.backbone(batch[0])), batch[1]))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.draws.append(batch[0].sum().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def fit_tracked(callback, loader, **options):
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    module = Tracked()

    class Log(Callback):
        def __init__(self):
            self.logged = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    log = Log()
    trainer = make_trainer(callback, log, max_epochs=3, **options)
    trainer.fit(module, loader(), make_loader())
    return module, log.logged, torch.get_rng_state()


def solve_and_forget(self, trainer, slot, read, kept=None):
    """Run the whole pass and the solve, then put the weights of before back: what is left is the trace."""
    head = slot.module
    before = {key: value.clone() for key, value in head.state_dict().items()}
    states = {p: dict(trainer.optimizers[0].state[p]) for p in head.parameters() if p in trainer.optimizers[0].state}
    report = solve(self, trainer, slot, read)
    head.load_state_dict(before)
    for parameter, state in states.items():
        trainer.optimizers[0].state[parameter] = state
    return report


solve = HeadSolve.run


LOADERS = {
    "shuffled": lambda: DataLoader(TensorDataset(*make_data()), batch_size=32, shuffle=True),
    "with a generator of its own": lambda: DataLoader(
        TensorDataset(*make_data()), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "augmented": lambda: DataLoader(Augmented(), batch_size=32, shuffle=True),
    "persistent workers": lambda: DataLoader(
        TensorDataset(*make_data()), batch_size=32, shuffle=True, num_workers=1, persistent_workers=True
    ),
}


@pytest.mark.filterwarnings("ignore:The head will be solved over inputs that are not fixed")
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("within_epoch", [False, True], ids=["at the end of an epoch", "within an epoch"])
def test_the_pass_leaves_no_trace(name, within_epoch, monkeypatch):
    monkeypatch.setattr(HeadSolve, "run", solve_and_forget)
    when = (
        {"check_every_n_steps": 3, "churn_tolerance": 1.0, "relative_tolerance": 1.0, "min_epochs": 0}
        if within_epoch
        else {"freeze_at_epoch": 1, "churn_tolerance": 0.0}
    )
    when |= {"min_steps": 0, "stop_after_solve": False}
    with_solve = fit_tracked(StructureFreezeCallback("head", solver=LogisticSolver(), **when), LOADERS[name])
    without = fit_tracked(StructureFreezeCallback("head", solver=None, **when), LOADERS[name])
    assert with_solve[0].draws == without[0].draws
    assert torch.equal(with_solve[2], without[2])
    if within_epoch:
        # Both freeze at the same step, so that the rest of the fit must be the same too.
        assert with_solve[1] == without[1]
        assert all(
            torch.equal(value, without[0].state_dict()[key]) for key, value in with_solve[0].state_dict().items()
        )


def test_binary_targets_and_samples_to_ignore():
    class Binary(SomebodysModule):
        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(-1), (batch[1] == 0).float())

        def validation_step(self, batch, batch_idx):
            return None

    callback = solving(stop_after_solve=True)
    make_trainer(callback).fit(Binary(mlp_head(FEATURES, HIDDEN, 1), body=False), make_loader())
    assert callback.solve_report.loss < callback.solve_report.start_loss

    class Ignoring(SomebodysModule):
        def training_step(self, batch, batch_idx):
            targets = torch.where(batch[1] == 2, -100, batch[1])
            return F.cross_entropy(self(batch[0]), targets)

    callback = solving(stop_after_solve=True)
    make_trainer(callback).fit(Ignoring(body=False), make_loader())
    assert callback.solve_report.loss < callback.solve_report.start_loss


def test_regression_is_solved_by_ridge():
    inputs = torch.randn(200, FEATURES)
    targets = inputs.abs().sum(1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, 1), task="regression")
    callback = solving("head", solver=RidgeSolver(), stop_after_solve=True)
    trainer = make_trainer(callback)
    trainer.fit(module, loader, loader)
    assert callback.solve_report.reason == "closed_form"
    assert callback.solve_report.score > callback.solve_report.start_score
    assert float(trainer.callback_metrics["val/mse"]) == pytest.approx(-callback.solve_report.score, rel=1e-3)


class Unknown(SomebodysModule):
    def training_step(self, batch, batch_idx):
        return F.multi_margin_loss(self(batch[0]), batch[1])


class Squared(SomebodysModule):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], CLASSES).float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Squared, "Expected `solver` to be a `RidgeSolver`"),
        (
            lambda body: SomebodysModule(
                nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES)), body
            ),
            "but got `BatchNorm1d` after it",
        ),
    ],
)
def test_a_head_that_cannot_be_solved_is_refused_on_the_first_batch(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(solving()).fit(make(body=False), make_loader())


def test_a_second_fit_after_a_solve_trains_on():
    callback = solving(stop_after_solve=True)
    module = fixed_module()
    make_trainer(callback, max_epochs=4).fit(module, make_loader())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, make_loader())
    assert trainer.global_step == 2 * 5


def test_a_solve_that_finds_nothing_better_says_so(caplog):
    callback = solving(stop_after_solve=True, solver=LogisticSolver(l2=1e6), verbose=True)
    with caplog.at_level("INFO", "glai_lightning"):
        make_trainer(callback).fit(fixed_module(), make_loader(), make_loader(64))
    assert "None were better than those before, which stay." in caplog.text


def test_what_the_head_is_solved_for_can_be_said_by_a_method():
    class Said(StructureFreezeCallback):
        def inputs_and_targets(self, batch, batch_idx, stage, head):
            return torch.tanh(head.pl_module.body(batch[0])), batch[1]

    callback = Said(HEAD, freeze_at_epoch=1, solver=LogisticSolver(), stop_after_solve=True)
    module = Unknown(body=False)
    make_trainer(callback).fit(module, make_loader(), make_loader())
    assert callback.solve_report.score is not None


def test_validation_without_a_loss_is_left_out_and_said(caplog):
    class Scored(SomebodysModule):
        def validation_step(self, batch, batch_idx):
            self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def random_state_after(solver):
        torch.manual_seed(0)
        callback = solving(solver=solver, stop_after_solve=False)
        make_trainer(callback).fit(Scored(body=False), make_loader(), make_loader())
        return torch.get_rng_state(), callback.solve_report

    unsolved, _ = random_state_after(None)
    assert "validation data" not in caplog.text
    with caplog.at_level("INFO"):
        solved, report = random_state_after(LogisticSolver())
    assert "does not look at the validation data" in caplog.text
    assert torch.equal(solved, unsolved)
    assert report.held_out > 0


def test_with_validation_the_solved_head_is_never_worse_on_it():
    callback = solving(stop_after_solve=True, solver=LogisticSolver(l2=100.0))
    make_trainer(callback).fit(fixed_module(), make_loader(), make_loader(64))
    assert callback.solve_report.score >= callback.solve_report.start_score


@pytest.mark.parametrize(
    ("make", "loader", "message"),
    [
        (SomebodysModule, make_loader, "layers outside the head are trained"),
        (
            lambda: SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES), nn.Dropout(0.5), freeze_backbone=False),
            make_loader,
            "dropout outside the head",
        ),
        (fixed_module, LOADERS["augmented"], "drawn at random"),
    ],
)
def test_inputs_that_are_not_fixed_are_warned_of(make, loader, message):
    module = make()
    callback = solving("head" if isinstance(module, SupervisedModule) else HEAD, stop_after_solve=True)
    with pytest.warns(UserWarning, match=message):
        make_trainer(callback).fit(module, loader())
    assert callback.solve_report is not None


def test_fixed_inputs_are_not_warned_of(recwarn):
    make_trainer(solving(stop_after_solve=True)).fit(fixed_module(), make_loader())
    assert not [warning for warning in recwarn if "not fixed" in str(warning.message)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_checks_within_an_epoch_freeze_between_optimizer_steps(accumulate):
    frozen_after = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if isinstance(pl_module.blocks["head"], GLAIHead):
                frozen_after.append((trainer.current_epoch, batch_idx, trainer.global_step))

    callback = StructureFreezeCallback(
        HEAD, churn_tolerance=1.0, relative_tolerance=1.0, min_epochs=0, check_every_n_steps=2, solver=None, min_steps=0
    )
    module = fixed_module()
    trainer = make_trainer(callback, Steps(), max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, make_loader(batch_size=16))
    assert frozen_after[0] == (0, 2 * accumulate - 1, 2)
    assert callback.freeze_epoch == 0
    assert len(callback.churn_history) == 1


def test_a_solve_within_an_epoch_is_validated_and_stops_the_fit():
    callback = StructureFreezeCallback(
        HEAD,
        churn_tolerance=1.0,
        relative_tolerance=1.0,
        min_epochs=0,
        check_every_n_steps=2,
        solver=LogisticSolver(),
        stop_after_solve=True,
        min_steps=0,
    )
    epochs, module = Epochs(), fixed_module()
    trainer = make_trainer(callback, epochs, max_epochs=5)
    trainer.fit(module, make_loader(batch_size=16), make_loader())
    assert trainer.global_step == 2
    assert epochs.validated == [True]
    inputs, targets = make_data()
    assert epochs.metrics[-1]["val_loss"] == pytest.approx(F.cross_entropy(module(inputs), targets).item(), rel=1e-4)


def test_a_solve_that_reads_the_data_in_every_pass_finds_the_same_weights(monkeypatch):
    import glai_lightning.fitting.head_data as solving_module

    heads = []
    for limit in (2**30, 0):
        monkeypatch.setattr(solving_module, "INPUTS_IN_MEMORY", limit)
        torch.manual_seed(0)
        module = fixed_module()
        solver = LogisticSolver(l2=1e-2, max_passes=100, tolerance=1e-6)
        make_trainer(solving(solver=solver, stop_after_solve=True)).fit(module, make_loader())
        heads.append(module.blocks["head"])
    torch.testing.assert_close(heads[0][2].weight, heads[1][2].weight, atol=2e-3, rtol=1e-2)


def test_a_fit_resumed_after_its_solve_stops_where_it_stopped(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = fixed_module()
    make_trainer(solving(stop_after_solve=True), checkpoints, max_epochs=6).fit(module, make_loader(), make_loader())
    for cut in ("epoch=0.ckpt", "epoch=1.ckpt"):
        torch.manual_seed(0)
        resumed = fixed_module()
        trainer = make_trainer(solving(stop_after_solve=True), max_epochs=6)
        trainer.fit(resumed, make_loader(), make_loader(), ckpt_path=tmp_path / cut)
        assert trainer.current_epoch == 2
        assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"check_every_n_steps": 0}, "Expected `check_every_n_steps` to be an integer of at least 1, but got 0."),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException) as caught:
        StructureFreezeCallback(**arguments)
    assert str(caught.value) == message


def test_tangent_paths_are_left_to_the_optimizer():
    with pytest.raises(MisconfigurationException, match="but got 'tangent'"):
        make_trainer(solving(paths="tangent")).fit(fixed_module(), make_loader())
