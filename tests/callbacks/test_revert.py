import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import GLAIHead, SupervisedModule, mlp_head
from glai_lightning.callbacks import FitReport, StructureFreezeCallback, StructureRevert
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver

PATHS = ("output", "tangent", "independent")


def sgd(module, steps):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adam(module, steps):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)}


class Scripted(SomebodysModule):
    """Validates as a script says: one score for every validation, the last one for all that follow."""

    def __init__(self, scores=(), make_optimizer=adam, head=None):
        super().__init__(head)
        self.scores, self.make_optimizer = list(scores), make_optimizer

    def validation_step(self, batch, batch_idx):
        score = self.scores[min(self.trainer.current_epoch, len(self.scores) - 1)]
        self.log("score", score, batch_size=1)

    def configure_optimizers(self):
        return self.make_optimizer(self, 200)


class Notes(Callback):
    def __init__(self):
        self.frozen, self.metrics, self.rates = [], {}, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module):
        self.frozen.append(isinstance(pl_module.blocks["head"], GLAIHead))
        self.metrics[trainer.current_epoch] = {k: float(v) for k, v in trainer.callback_metrics.items()}


class HeadAt(Callback):
    """Copies the head, and what the optimizer knows of it, at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            head, optimizer = pl_module.blocks["head"], trainer.optimizers[0]
            self.kind = type(head)
            self.weights = copy.deepcopy(head.state_dict())
            self.trainable = [p.requires_grad for p in head.parameters()]
            self.identities = [id(p) for p in head.parameters()]
            self.groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
            self.memory = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in head.parameters()])
            self.number_remembered = len(optimizer.state)


def freezing(name=HEAD, **options):
    return StructureFreezeCallback(
        name,
        **{
            "churn_tolerance": 0.0,
            "freeze_at_epoch": 2,
            "solver": None,
            "min_steps": 0,
            "stop_after_solve": False,
            **options,
        },
    )


def judging(**options):
    return StructureRevert("score", **options)


def fit(freeze, revert, scores, *callbacks, max_epochs=6, **options):
    module, notes = Scripted(scores, **options), Notes()
    judges = [] if revert is None else [revert]
    trainer = make_trainer(*callbacks[:1], freeze, *judges, *callbacks[1:], notes, max_epochs=max_epochs)
    trainer.fit(module, make_loader(), make_loader(32))
    return module, trainer, notes


FALLS = [0.5, 0.8, 0.7, 0.7, 0.9]


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_the_head_goes_back_to_the_mlp_of_the_freeze_with_its_optimizer_state(paths, make_optimizer, caplog):
    callback, before, after = freezing(paths=paths), HeadAt(2), HeadAt(4)
    head = mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True)
    with caplog.at_level("INFO"):
        module, _, notes = fit(callback, judging(), FALLS, before, after, make_optimizer=make_optimizer, head=head)
    assert before.kind is after.kind is nn.Sequential
    assert notes.frozen == [False, False, True, False, False, False]
    assert list(before.weights) == list(after.weights)
    assert all(torch.equal(value, after.weights[key]) for key, value in before.weights.items())
    assert (before.groups, before.identities) == (after.groups, after.identities)
    assert after.trainable == [True] * len(after.trainable)
    assert before.number_remembered == after.number_remembered
    for one, other in zip(before.memory, after.memory, strict=True):
        assert one.keys() == other.keys() != set()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not torch.equal(module.blocks["head"][0].weight, before.weights["0.weight"])
    assert "`score` is 0.7, 0.7 since it was frozen, and was 0.8 before" in caplog.text
    never = fit(freezing(freeze_at_epoch=None), None, FALLS, make_optimizer=make_optimizer)[2]
    assert notes.rates == never.rates
    assert (callback.frozen, callback.freeze_epoch, callback.freeze_reason) == (False, None, None)
    assert len(callback.churn_history) == 4
    assert all(module.training for module in module.blocks.modules())


def test_what_is_logged():
    notes = fit(freezing(), judging(), FALLS)[2]
    logged = {key: [notes.metrics[epoch][f"structure/{key}"] for epoch in range(6)] for key in ("frozen", "reverts")}
    assert logged == {"frozen": [0, 0, 1, 0, 0, 0], "reverts": [0, 0, 0, 1, 1, 1]}
    assert [notes.metrics[epoch]["structure/freeze_epoch"] for epoch in range(6)] == [-1, -1, 2, -1, -1, -1]
    without = fit(freezing(), None, FALLS)[2]
    assert "structure/reverts" not in without.metrics[5]


@pytest.mark.parametrize(
    ("scores", "options", "frozen_at_end"),
    [
        ([0.5, 0.8, 0.7, 0.8], {}, True),
        ([0.5, 0.8, 0.797], {}, True),
        ([0.5, 0.8, 0.79], {"tolerance": 0.02}, True),
        ([0.5, 0.8, 0.79], {}, False),
        ([0.5, 0.8, 0.7, 0.7, 0.9], {"patience": 3}, True),
        ([0.5, 0.8, 0.7, 0.9], {"patience": 1}, False),
        ([0.5, 0.8, 0.9], {"mode": "min"}, False),
        ([0.5, 0.8, 0.7], {"mode": "min"}, True),
        ([0.5, 0.8, math.nan], {}, False),
        ([0.5, math.nan, math.nan], {}, False),
        ([0.5, math.nan, 0.1], {}, True),
    ],
)
def test_a_freeze_is_proven_by_one_validation_that_is_as_good(scores, options, frozen_at_end):
    callback, revert = freezing(), judging(**options)
    fit(callback, revert, scores, max_epochs=5)
    assert callback.frozen is frozen_at_end
    assert not revert.is_judging(HEAD)
    assert revert.reverts[HEAD] == (not frozen_at_end)


def test_what_was_kept_is_let_go_of_once_the_freeze_is_proven():
    callback, revert, kept = freezing(), judging(), []

    class Kept(Callback):
        def on_validation_end(self, trainer, pl_module):
            kept.append("weights" in str(revert.state_dict()))

        def on_train_epoch_start(self, trainer, pl_module):
            kept.append("weights" in str(revert.state_dict()))

    module, notes = Scripted([0.5, 0.8, 0.7, 0.8]), Notes()
    make_trainer(callback, revert, Kept(), notes, max_epochs=5, num_sanity_val_steps=0).fit(
        module, make_loader(), make_loader()
    )
    assert kept == [False] * 4 + [True, True, True, False, False, False]


@pytest.mark.parametrize("after_epoch", [True, False])
def test_a_head_that_loses_in_the_last_epoch_goes_back_before_the_last_save(tmp_path, after_epoch):
    callback = freezing()
    saving = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=after_epoch)
    module, _, notes = fit(callback, judging(), FALLS, saving, max_epochs=4)
    assert notes.frozen == [False, False, True, False]
    assert not callback.frozen
    assert type(module.blocks["head"]) is nn.Sequential
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not module.blocks["head"]._forward_pre_hooks
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_works_wherever_it_stands_in_the_list_of_callbacks(place):
    callbacks = [freezing(), Notes()]
    callbacks.insert(place, judging())
    module = Scripted(FALLS)
    trainer = make_trainer(*callbacks)
    trainer.fit(module, make_loader(), make_loader(32))
    (notes,) = (callback for callback in callbacks if isinstance(callback, Notes))
    assert notes.frozen == [False, False, True, False, False, False]
    assert trainer.callback_metrics["structure/reverts"] == 1
    assert type(module.blocks["head"]) is nn.Sequential


def test_a_fit_that_ends_before_the_proof_says_so(caplog):
    with caplog.at_level("INFO"):
        callback = freezing()
        fit(callback, judging(), FALLS, max_epochs=3)
    assert "ends before the freeze of 'blocks.head' is proven: `score` is 0.7 since" in caplog.text
    assert callback.frozen


def test_it_waits_twice_as_long_after_every_time_and_is_not_forced_again():
    # Churn always agrees to freeze, and every validation of a frozen head is worse.
    class WorseWhileFrozen(Scripted):
        def validation_step(self, batch, batch_idx):
            self.log("score", 0.0 if isinstance(self.blocks["head"], GLAIHead) else 1.0, batch_size=1)

    settles = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "freeze_at_epoch": None}
    callback, revert, notes = freezing(**settles), judging(), Notes()
    make_trainer(callback, revert, notes, max_epochs=20).fit(WorseWhileFrozen(), make_loader(), make_loader(32))
    runs = "".join("F" if frozen else "m" for frozen in notes.frozen)
    # Noted after the verdict, so that of two frozen epochs the second ends as an MLP.
    assert runs == "m" + "Fm" + "mm" + "Fm" + "mmmm" + "Fm" + "mmmmmmm"
    assert revert.reverts[HEAD] == 3
    forced, notes = freezing(), Notes()
    make_trainer(forced, judging(), notes, max_epochs=12).fit(WorseWhileFrozen(), make_loader(), make_loader(32))
    assert "".join("F" if frozen else "m" for frozen in notes.frozen) == "mmFmmmmmmmmm"


def test_after_it_went_back_patience_counts_new_checks_only():
    options = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "freeze_at_epoch": None}
    scores = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    notes = fit(freezing(patience=4, **options), judging(patience=1), scores, max_epochs=10)[2]
    assert "".join("F" if frozen else "m" for frozen in notes.frozen) == "mmmmmmmmmF"


class Rings(LightningModule):
    """Three rings, which a few hidden units tell apart only where they were trained to."""

    def __init__(self, make_optimizer, epochs):
        super().__init__()
        seed_everything(3, verbose=False)
        self.head = mlp_head(2, 6, 3)
        self.make_optimizer, self.epochs = make_optimizer, epochs

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.head(batch[0])
        self.log("accuracy", (logits.argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.make_optimizer(self, self.epochs * 5)


def rings(samples=320):
    generator = torch.Generator().manual_seed(1)
    angle = torch.rand(samples, generator=generator) * 2 * math.pi
    target = torch.arange(samples) % 3
    radius = target + 0.6 + 0.4 * torch.rand(samples, generator=generator)
    inputs = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return DataLoader(TensorDataset(inputs, target), batch_size=64)


def accuracy(make_optimizer, epochs, *callbacks, **options):
    trainer = make_trainer(*callbacks, max_epochs=epochs, **options)
    trainer.fit(Rings(make_optimizer, epochs), rings(), rings())
    return float(trainer.callback_metrics["accuracy"])


accuracy_of_the_mlp = functools.cache(accuracy)


STEP_ONE = {
    "asked for": {"freeze_at_epoch": 0},
    "by churn": {"check_every_n_steps": 1, "min_epochs": 0, "churn_tolerance": 1.0, "relative_tolerance": 1.0},
}
UNSOLVED = {"solver": None, "min_steps": 0}


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize(("make_optimizer", "how"), [(sgd, "asked for"), (adam, "by churn")])
def test_a_freeze_forced_at_step_one_ends_as_good_as_without_it(paths, make_optimizer, how):
    class Once(StructureFreezeCallback):
        def should_freeze(self, head):
            return len(head.churn_history) == 1

    epochs, options = 50, {"paths": paths, **STEP_ONE[how], **UNSOLVED}
    never = accuracy_of_the_mlp(make_optimizer, epochs)
    forced = accuracy(make_optimizer, epochs, Once(**options))
    revert = StructureRevert("accuracy")
    with_revert = accuracy(make_optimizer, epochs, Once(**options), revert)
    assert forced < never - 0.05
    assert with_revert > never - 0.02
    assert revert.reverts["head"] == 1


def test_a_validation_before_the_first_step_after_a_freeze_says_nothing():
    # Validation and check both follow step 2, at which nothing has been trained frozen.
    class Counts(Scripted):
        validations = 0

        def validation_step(self, batch, batch_idx):
            scores = [0.9, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
            self.log("score", scores[min(Counts.validations, 7)], batch_size=1)
            Counts.validations += 1

    callback = freezing(
        check_every_n_steps=2, min_epochs=0, freeze_at_epoch=None, churn_tolerance=1.0, relative_tolerance=1.0
    )
    steps = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            steps.append(isinstance(pl_module.blocks["head"], GLAIHead))

    trainer = make_trainer(callback, judging(), Steps(), max_epochs=1, val_check_interval=1, num_sanity_val_steps=0)
    trainer.fit(Counts(), make_loader(batch_size=16), make_loader(160, 160))
    # Frozen after step 2, at a score of 0.9 after step 1; worse after steps 3 and 4, and back. It waits for two
    # validations, freezes again at a score of 0.5, and stays.
    assert steps == [False, True, True, True, False, False, True, True, True, True]


@pytest.mark.parametrize("when", ["before the validation", "after the validation"])
def test_a_checkpoint_on_the_step_of_a_freeze_and_a_validation_resumes_to_the_same_end(tmp_path, when):
    class ByStep(Scripted):
        def validation_step(self, batch, batch_idx):
            frozen = isinstance(self.blocks["head"], GLAIHead)
            self.log("score", 0.1 if frozen and self.global_step < 12 else 0.5 + 0.01 * self.global_step, batch_size=1)

    def run(*checkpoints, ckpt_path=None):
        seed_everything(5, verbose=False)
        settles = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "probe_size": 16, "min_epochs": 0}
        callback, revert = freezing(freeze_at_epoch=None, check_every_n_steps=2, **settles), judging(patience=1)
        module = ByStep()
        trainer = make_trainer(callback, revert, *checkpoints, max_epochs=5, val_check_interval=2)
        trainer.fit(module, datamodule=features(), ckpt_path=ckpt_path)
        return module.state_dict(), callback, revert

    options = {"every_n_train_steps": 2} if when == "before the validation" else {"save_on_train_epoch_end": False}
    weights, callback, revert = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **options))
    assert revert.reverts[HEAD] >= 1
    cuts = 0
    for cut in sorted(tmp_path.glob("*.ckpt")):
        saved = torch.load(cut, weights_only=True)
        (state,) = (v for k, v in saved["callbacks"].items() if "StructureRevert" in k)
        trial = state["heads"][HEAD]["trial"]
        if when == "before the validation" and (trial is None or trial["step"] != saved["global_step"]):
            # Lightning leaves out the validation that would follow, and with it a score.
            continue
        cuts += 1
        resumed, resumed_callback, resumed_revert = run(ckpt_path=cut)
        assert str(resumed_callback.state_dict()) == str(callback.state_dict()), cut
        assert str(resumed_revert.state_dict()) == str(revert.state_dict()), cut
        assert all(torch.equal(value, resumed[key]) for key, value in weights.items()), cut
    assert cuts >= 2


def features():
    inputs, targets = make_data(200)
    arrays = {"x_train": inputs[:170], "y_train": targets[:170], "x_test": inputs[170:], "y_test": targets[170:]}
    return FeaturesDataModule(arrays=arrays, batch_size=32, seed=3)


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize("when", ["after the epoch", "after validation", "in the middle of an epoch"])
def test_a_fit_cut_before_while_and_after_the_freeze_is_judged_ends_bitwise_the_same(
    tmp_path, paths, make_optimizer, when
):
    def run(*checkpoints, ckpt_path=None):
        seed_everything(5, verbose=False)
        # One batch is enough for a check, also after a cut.
        settles = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "probe_size": 16}
        callback = freezing(paths=paths, freeze_at_epoch=1, **settles)
        revert = judging()
        module = Scripted([0.8, 0.7, 0.7, 0.9, 0.9, 0.8], make_optimizer)
        module.blocks["head"] = mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True)
        trainer = make_trainer(callback, revert, *checkpoints, max_epochs=6)
        trainer.fit(module, datamodule=features(), ckpt_path=ckpt_path)
        return module.state_dict(), trainer.optimizers[0].state_dict(), callback, revert

    options = {
        "after the epoch": {"save_on_train_epoch_end": True},
        "after validation": {"save_on_train_epoch_end": False},
        # Never after an epoch's last batch: a fit resumed from there is not validated by Lightning, with or without us.
        "in the middle of an epoch": {"every_n_train_steps": 7},
    }[when]
    weights, optimizer, callback, revert = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **options))
    assert callback.frozen
    assert callback.freeze_epoch == 5
    assert revert.reverts[HEAD] == 1
    cuts = sorted(tmp_path.glob("*.ckpt"))
    assert len(cuts) >= 4
    judged = 0
    for cut in cuts:
        (state,) = (v for k, v in torch.load(cut, weights_only=True)["callbacks"].items() if "StructureRevert" in k)
        judged += any(head["trial"] is not None for head in state["heads"].values())
        resumed_weights, resumed_optimizer, resumed, resumed_revert = run(ckpt_path=cut)
        assert list(weights) == list(resumed_weights)
        assert all(torch.equal(value, resumed_weights[key]) for key, value in weights.items())
        assert resumed_optimizer["param_groups"] == optimizer["param_groups"]
        assert resumed_optimizer["state"].keys() == optimizer["state"].keys()
        for position, entries in optimizer["state"].items():
            assert all(torch.equal(v, resumed_optimizer["state"][position][k]) for k, v in entries.items())
        assert str(resumed.state_dict()) == str(callback.state_dict())
        assert str(resumed_revert.state_dict()) == str(revert.state_dict())
    assert judged >= 2


class SaveEveryRank(Callback):
    def __init__(self, folder):
        self.folder, self.frozen = folder, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.frozen.append(isinstance(pl_module.head, GLAIHead))

    def on_train_end(self, trainer, pl_module):
        optimizer = trainer.optimizers[0].state_dict()
        state = {"weights": pl_module.state_dict(), "frozen": self.frozen, "optimizer": optimizer["state"]}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


class EachRankItsScore(SupervisedModule):
    """A score that is not synchronised: worse in the second process alone, by enough for the mean."""

    def on_validation_epoch_end(self):
        worse = 0.2 if self.trainer.global_rank == 1 and self.trainer.current_epoch >= 2 else 0.0
        self.log("score", 0.8 - worse, sync_dist=False)


@pytest.mark.processes
@pytest.mark.parametrize("paths", PATHS)
def test_two_processes_go_back_together_and_stay_identical(tmp_path, paths):
    seed_everything(0, verbose=False)
    backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
    module = EachRankItsScore(mlp_head(FEATURES, HIDDEN, CLASSES), backbone, freeze_backbone=False)
    loader = DataLoader(TensorDataset(*make_data(160)), batch_size=16, shuffle=True)
    callback = freezing("head", paths=paths)
    trainer = make_trainer(callback, judging(), SaveEveryRank(tmp_path), max_epochs=6, devices=2, strategy="ddp_fork")
    trainer.fit(module, loader, make_loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["frozen"] == second["frozen"] == [False, False, True, False, False, False]
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    assert first["optimizer"].keys() == second["optimizer"].keys() == set(range(6))
    for position, entries in first["optimizer"].items():
        assert all(torch.equal(v, second["optimizer"][position][k]) for k, v in entries.items())


class FirstRankAlone(SupervisedModule):
    def on_validation_epoch_end(self):
        if self.trainer.is_global_zero:
            self.log("score", 0.8)


@pytest.mark.processes
def test_a_metric_that_one_process_lacks_stops_them_all():
    trainer = make_trainer(freezing("head"), judging(), devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match="Expected `monitor` to name a metric that the validation logs"):
        trainer.fit(FirstRankAlone(mlp_head(FEATURES, HIDDEN, CLASSES)), make_loader(), make_loader())


def test_a_solve_that_makes_things_worse_is_undone_before_the_fit_stops():
    callback = freezing(solver=LogisticSolver(max_passes=5), stop_after_solve=True)
    _, trainer, notes = fit(callback, judging(), [0.8, 0.1, 0.1, 0.9], max_epochs=6)
    # Solved at the end of epoch 1, and worse in the validations of epochs 1 and 2.
    assert notes.frozen == [False, True, False, False, False, False]
    assert trainer.current_epoch == 6
    assert callback.solve_report is None


def test_stopping_after_the_solve_waits_for_the_proof():
    for scores, epochs in (([0.8, 0.8], 2), ([0.8, 0.1, 0.8], 3)):
        callback = freezing(solver=LogisticSolver(max_passes=5), stop_after_solve=True)
        _, trainer, _ = fit(callback, judging(), scores, max_epochs=6)
        assert trainer.current_epoch == epochs
        assert callback.frozen
        assert callback.solve_report is not None


def test_one_of_several_heads_goes_back():
    class Two(Scripted):
        def __init__(self):
            super().__init__([0.8, 0.8, 0.8, 0.1, 0.1, 0.8])
            self.blocks["other"] = mlp_head(FEATURES, 8, CLASSES)

        def forward(self, x):
            return super().forward(x) + self.blocks["other"](x)

    class OneAfterTheOther(StructureFreezeCallback):
        def should_freeze(self, head):
            return len(head.churn_history) == {HEAD: 3, "blocks.other": 1}[head.name]

    callback, notes = OneAfterTheOther("blocks.*", solver=None, min_steps=0), Notes()
    make_trainer(callback, judging(), notes).fit(Two(), make_loader(), make_loader(32))
    assert [notes.metrics[epoch]["structure/frozen/blocks.head"] for epoch in range(6)] == [0, 0, 0, 1, 0, 0]
    assert [notes.metrics[epoch]["structure/frozen/blocks.other"] for epoch in range(6)] == [0, 1, 1, 1, 1, 1]
    assert notes.metrics[5]["structure/reverts/blocks.head"] == 1
    assert notes.metrics[5]["structure/reverts/blocks.other"] == 0


def test_a_metric_that_the_validation_does_not_log_is_an_error_in_the_first_one():
    steps = []
    revert = StructureRevert("accuracy")
    module = Scripted([0.5])
    module.on_train_batch_end = lambda *_: steps.append(1)
    with pytest.raises(MisconfigurationException, match=r"but got 'accuracy'. Logged are: \['loss', 'score'\]|'score'"):
        make_trainer(freezing(), revert).fit(module, make_loader(), make_loader(32))
    assert len(steps) == 5


def test_a_monitor_without_validation_is_refused_before_training():
    with pytest.raises(MisconfigurationException, match="Expected a fit with validation"):
        make_trainer(freezing(), judging()).fit(Scripted([0.5]), make_loader())


def test_sanity_checking_is_not_a_validation():
    revert = judging(patience=1)
    fit(freezing(freeze_at_epoch=0), revert, [0.5], max_epochs=2)
    assert revert.reverts[HEAD] == 1


def test_a_new_fit_forgets_what_was_kept_for_the_optimizer_of_the_last():
    callback, revert = freezing(), judging()
    module, _, _ = fit(callback, revert, FALLS, max_epochs=3)
    assert revert.is_judging(HEAD)
    make_trainer(callback, revert, max_epochs=3).fit(module, make_loader(), make_loader(32))
    assert callback.frozen
    assert not revert.is_judging(HEAD)


def test_it_is_refused_without_a_freeze_to_judge():
    with pytest.raises(MisconfigurationException, match="to have a `StructureFreezeCallback` beside `StructureRevert`"):
        make_trainer(judging()).fit(Scripted([0.5]), make_loader(), make_loader(32))


def test_the_fit_report_tells_of_a_head_that_went_back():
    report = FitReport(score="score")
    fit(freezing(), judging(), FALLS, report)
    assert [epoch.frozen for epoch in report.record.epochs][:3] == [False, False, True]
    assert not report.record.frozen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "best"}, "Expected `mode` to be 'min' or 'max', but got 'best'."),
        ({"tolerance": -1}, "Expected `tolerance` to be a finite number in [0, inf], but got -1."),
        ({"patience": 0}, "Expected `patience` to be an integer of at least 1, but got 0."),
        ({"monitor": 3}, "Expected `monitor` to be the name of a metric, but got 3."),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException) as caught:
        StructureRevert(**{"monitor": "score", **arguments})
    assert str(caught.value) == message
