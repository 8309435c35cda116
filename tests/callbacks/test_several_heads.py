import copy

import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HIDDEN, make_data, make_loader, make_trainer
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import GLAIHead, mlp_head
from glai_lightning.callbacks import FitReport, StructureFreezeCallback, StructureMonitor
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver

PATHS = ("output", "tangent", "independent")


class Stacked(LightningModule):
    """A prediction head that stands on a projection head, as in BYOL; a loss on the second alone."""

    def __init__(self):
        super().__init__()
        self.proj = mlp_head(FEATURES, HIDDEN, FEATURES)
        self.pred = mlp_head(FEATURES, 16, CLASSES, batch_norm=True)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.pred(self.proj(batch[0])), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class SideBySide(LightningModule):
    """Two heads on the same inputs, with a loss each, below a ModuleDict."""

    def __init__(self):
        super().__init__()
        scale = nn.Linear(8, 1).requires_grad_(False)
        self.heads = nn.ModuleDict(
            {"kinds": mlp_head(FEATURES, HIDDEN, CLASSES), "first": mlp_head(FEATURES, 8, 2), "scale": scale}
        )

    def training_step(self, batch, batch_idx):
        kinds = F.cross_entropy(self.heads["kinds"](batch[0]), batch[1])
        return kinds + F.cross_entropy(self.heads["first"](batch[0]), (batch[1] == 0).long())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class OneAfterTheOther(StructureFreezeCallback):
    """Freezes its heads at an epoch each."""

    def __init__(self, epochs, **options):
        super().__init__(list(epochs), **options)
        self.epochs = epochs

    def should_freeze(self, head):
        return len(head.churn_history) >= self.epochs[head.name]


class Frozen(Callback):
    def __init__(self):
        self.frozen, self.metrics = [], {}

    def on_train_epoch_end(self, trainer, pl_module):
        callback = next(c for c in trainer.callbacks if isinstance(c, StructureFreezeCallback))
        self.frozen.append([isinstance(pl_module.get_submodule(name), GLAIHead) for name in callback.heads])
        self.metrics[trainer.current_epoch] = {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("paths", PATHS)
def test_each_head_freezes_in_its_own_moment_and_the_rest_goes_on_learning(paths):
    callback, frozen = OneAfterTheOther({"pred": 1, "proj": 3}, paths=paths, solver=None, min_steps=0), Frozen()
    module = Stacked()
    make_trainer(callback, frozen, max_epochs=5).fit(module, make_loader())
    assert frozen.frozen == [[False, False], [True, False], [True, False], [True, True], [True, True]]
    assert {name: head.freeze_epoch for name, head in callback.heads.items()} == {"pred": 1, "proj": 3}
    assert [len(head.churn_history) for head in callback.heads.values()] == [1, 3]
    assert callback.frozen
    assert callback.freeze_epoch == 3
    assert callback.freeze_reason.startswith("'pred': churn ")
    assert "; 'proj': churn " in callback.freeze_reason
    assert callback.churn_history == callback.heads["pred"].churn_history
    losses = [frozen.metrics[epoch]["loss"] for epoch in range(5)]
    assert losses == sorted(losses, reverse=True)


def test_until_all_are_frozen_the_callback_is_not():
    callback = OneAfterTheOther({"pred": 1, "proj": 99}, solver=None, min_steps=0)
    make_trainer(callback, max_epochs=3).fit(Stacked(), make_loader())
    assert callback.heads["pred"].frozen
    assert (callback.frozen, callback.freeze_epoch, callback.freeze_reason) == (False, None, None)


def test_the_keys_of_several_heads_carry_their_names_from_the_first_epoch_on(tmp_path):
    callback, frozen = OneAfterTheOther({"pred": 1, "proj": 2}, solver=None, min_steps=0), Frozen()
    logger = CSVLogger(tmp_path)
    make_trainer(callback, frozen, max_epochs=3, logger=logger).fit(Stacked(), make_loader())
    keys = {f"structure/{key}/{name}" for key in ("churn", "frozen", "freeze_epoch") for name in ("pred", "proj")}
    assert {key for key in frozen.metrics[0] if key.startswith("structure/")} == keys
    assert [frozen.metrics[epoch]["structure/frozen/pred"] for epoch in range(3)] == [0, 1, 1]
    assert [frozen.metrics[epoch]["structure/freeze_epoch/proj"] for epoch in range(3)] == [-1, -1, 2]
    assert frozen.metrics[0]["structure/churn/proj"] == pytest.approx(callback.heads["proj"].churn_history[0])
    assert keys <= set((tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(","))


def test_one_name_in_a_list_is_one_head():
    callback, frozen = StructureFreezeCallback(["proj"], freeze_at_epoch=1, solver=None), Frozen()
    make_trainer(callback, frozen, max_epochs=2).fit(Stacked(), make_loader())
    assert {key for key in frozen.metrics[0] if key.startswith("structure/")} == {
        "structure/churn",
        "structure/frozen",
        "structure/freeze_epoch",
    }


@pytest.mark.parametrize("pattern", ["heads.*", "*", "heads.[fk]*"])
def test_a_pattern_stands_for_the_mlp_heads_that_it_matches(pattern):
    callback = StructureFreezeCallback(pattern, freeze_at_epoch=1, solver=None)
    assert not callback.frozen
    assert callback.churn_history == []
    module = SideBySide()
    make_trainer(callback, max_epochs=2).fit(module, make_loader())
    assert list(callback.heads) == ["heads.kinds", "heads.first"]
    assert callback.frozen
    assert type(module.heads["scale"]) is nn.Linear
    # A second fit, whose pattern meets frozen heads.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    again = StructureFreezeCallback(pattern, solver=None, min_steps=0)
    make_trainer(again, max_epochs=1).fit(module, make_loader())
    assert list(again.heads) == ["heads.kinds", "heads.first"]
    assert again.frozen


def test_the_monitor_agrees_on_names_and_leaves_to_the_callback_what_that_logs():
    freeze, monitor, frozen = (
        StructureFreezeCallback("heads.f*", churn_tolerance=0.0, solver=None, min_steps=0),
        StructureMonitor("*"),
        Frozen(),
    )
    make_trainer(freeze, monitor, frozen, max_epochs=2).fit(SideBySide(), make_loader())
    assert list(monitor.churn_history) == ["heads.kinds", "heads.first"]
    assert monitor.churn_history["heads.first"] == freeze.churn_history
    for name, history in monitor.churn_history.items():
        assert frozen.metrics[1][f"structure/churn/{name}"] == pytest.approx(history[1])


def test_heads_with_a_callback_each_are_told_apart_in_the_logs():
    early = StructureFreezeCallback("proj", freeze_at_epoch=1, solver=None)
    late = StructureFreezeCallback("pred", paths="tangent", freeze_at_epoch=2, solver=None)
    frozen = Frozen()
    module = Stacked()
    make_trainer(early, late, frozen, max_epochs=3).fit(module, make_loader())
    assert [frozen.metrics[epoch]["structure/frozen/proj"] for epoch in range(3)] == [0, 1, 1]
    assert [frozen.metrics[epoch]["structure/frozen/pred"] for epoch in range(3)] == [0, 0, 1]
    assert (module.proj.paths, module.pred.paths) == ("output", "tangent")


class SharedHead(Stacked):
    def __init__(self):
        super().__init__()
        self.pred = self.proj


class UncalledHead(Stacked):
    def training_step(self, batch, batch_idx):
        return self.pred(self.proj[0](batch[0])[:, :FEATURES]).sum()


@pytest.mark.parametrize(
    ("make", "head", "message"),
    [
        (Stacked, "heads.*", r"but got 'heads.\*'. Modules that can be used as a head: \['proj', 'pred'\]"),
        (Stacked, ["proj", "head"], r"but got 'head'. Modules that can be used as a head: \['proj', 'pred'\]"),
        (Stacked, ["proj", "proj"], "name every head once, but got 'proj' twice, by 'proj'"),
        (Stacked, ["pr*", "proj"], r"but got 'proj' twice, by 'pr\*' and 'proj'"),
        (Stacked, ["pred", "pred.0"], "to lie apart, but got 'pred.0' inside 'pred'"),
        (SharedHead, ["proj", "pred"], "'proj.0.weight' under 'pred.0.weight' as well"),
        (UncalledHead, ["pred", "proj"], "Expected the head at 'proj' to be called by `training_step`"),
    ],
)
def test_heads_that_cannot_be_told_apart_or_found_are_refused_with_the_module_as_it_was(make, head, message):
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(StructureFreezeCallback(head, solver=None, min_steps=0)).fit(module, make_loader())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(child._forward_pre_hooks for child in module.modules())
    if make is not UncalledHead:
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_two_callbacks_on_one_head_are_refused():
    with pytest.raises(MisconfigurationException, match="'proj' twice"):
        make_trainer(
            StructureFreezeCallback("proj", solver=None, min_steps=0),
            StructureFreezeCallback(["proj", "pred"], solver=None, min_steps=0),
        ).fit(Stacked(), make_loader())


@pytest.mark.parametrize("head", [[], "", ["proj", 3], None, 7])
def test_what_names_no_head_is_refused(head):
    with pytest.raises(MisconfigurationException, match="Expected `head` to be the name of a module, or a list of"):
        StructureFreezeCallback(head, solver=None, min_steps=0)


@pytest.mark.parametrize("head", ["proj", ["proj", "pred"]])
def test_names_are_read_from_yaml(head):
    parser = ArgumentParser()
    parser.add_class_arguments(StructureFreezeCallback, "freeze")
    assert parser.parse_object({"freeze": {"head": head}}).freeze.head == head
    assert parser.instantiate_classes(parser.parse_args([f"--freeze.head={head}"])).freeze.head == head


def features():
    inputs, targets = make_data(200)
    arrays = {"x_train": inputs[:170], "y_train": targets[:170], "x_test": inputs[170:], "y_test": targets[170:]}
    return FeaturesDataModule(arrays=arrays, batch_size=32, seed=3)


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("options", [{"save_on_train_epoch_end": True}, {"every_n_train_steps": 3}])
def test_a_fit_resumed_with_one_head_frozen_and_one_not_ends_bitwise_the_same(tmp_path, paths, options):
    def run(checkpoints=None, ckpt_path=None):
        seed_everything(5, verbose=False)
        module = Stacked()
        # One batch is enough for a check, also after a cut.
        options = {"paths": paths, "solver": None, "min_steps": 0, "probe_size": 8}
        callback = OneAfterTheOther({"pred": 1, "proj": 3}, **options)
        trainer = make_trainer(*[c for c in (callback, checkpoints) if c is not None], max_epochs=4)
        trainer.fit(module, datamodule=features(), ckpt_path=ckpt_path)
        return module.state_dict(), trainer.optimizers[0].state_dict(), callback

    weights, optimizer, callback = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **options))
    cuts = sorted(tmp_path.glob("*.ckpt"))
    assert len(cuts) >= 4
    for cut in cuts:
        resumed_weights, resumed_optimizer, resumed = run(ckpt_path=cut)
        assert list(resumed_weights) == list(weights)
        assert all(torch.equal(value, resumed_weights[key]) for key, value in weights.items())
        assert resumed_optimizer["state"].keys() == optimizer["state"].keys()
        for position, entries in optimizer["state"].items():
            assert all(torch.equal(v, resumed_optimizer["state"][position][k]) for k, v in entries.items())
        for name, head in callback.heads.items():
            whole, cut_state = head.state_dict(), resumed.heads[name].state_dict()
            if "every_n_train_steps" in options:
                # After a cut within an epoch its check is made on the inputs that came after the cut.
                for state in (whole, cut_state):
                    del state["churn_history"], state["freeze_reason"]
            assert whole == cut_state


class SaveEveryRank(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        freeze = next(c for c in trainer.callbacks if isinstance(c, StructureFreezeCallback))
        state = {name: (head.freeze_epoch, head.churn_history) for name, head in freeze.heads.items()}
        torch.save({"weights": pl_module.state_dict(), "heads": state}, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.processes
def test_two_processes_freeze_each_head_together_and_stay_identical(tmp_path):
    seed_everything(0, verbose=False)
    callback = OneAfterTheOther({"pred": 1, "proj": 3}, solver=None, min_steps=0)
    loader = DataLoader(TensorDataset(*make_data(160)), batch_size=16, shuffle=True)
    options = {"max_epochs": 5, "devices": 2, "strategy": "ddp_fork"}
    make_trainer(callback, SaveEveryRank(tmp_path), **options).fit(Stacked(), loader)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["heads"] == second["heads"]
    assert [epoch for epoch, _ in first["heads"].values()] == [1, 3]
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())


def test_each_head_is_solved_by_its_own_loss_and_the_fit_stops_after_the_last(recwarn):
    solver = LogisticSolver(l2=1e-2, max_passes=200, tolerance=1e-7)
    epochs = {"heads.kinds": 1, "heads.first": 3}
    callback = OneAfterTheOther(epochs, solver=solver, stop_after_solve=True, min_steps=0)
    module = SideBySide()
    trainer = make_trainer(callback, max_epochs=9)
    trainer.fit(module, make_loader())
    assert trainer.current_epoch == 3
    assert not [warning for warning in recwarn if "not fixed" in str(warning.message)]
    inputs, targets = make_data()
    head = module.heads["first"]
    solved = head[2].weight.detach().clone()
    report = solver.solve(head, inputs, (targets == 0).long())
    assert callback.heads["heads.first"].solve.report.loss == pytest.approx(report.loss, rel=1e-5)
    assert torch.allclose(head[2].weight, solved, atol=1e-3)
    assert callback.heads["heads.kinds"].solve.report.loss < callback.heads["heads.kinds"].solve.report.start_loss


def test_a_head_without_a_loss_of_its_own_is_not_solved():
    callback = StructureFreezeCallback(["proj", "pred"], solver=LogisticSolver(), min_steps=0, stop_after_solve=False)
    with pytest.raises(MisconfigurationException, match="Expected a loss that is a sum over samples"):
        make_trainer(callback).fit(Stacked(), make_loader())


def test_an_override_says_for_each_head_what_it_is_solved_for():
    asked = set()

    class Said(StructureFreezeCallback):
        def inputs_and_targets(self, batch, batch_idx, stage, head):
            asked.add(head.name)
            targets = batch[1] if head.name == "heads.kinds" else (batch[1] == 0).long()
            return batch[0], targets

    callback = Said("heads.*", freeze_at_epoch=1, solver=LogisticSolver())
    make_trainer(callback, max_epochs=2).fit(SideBySide(), make_loader())
    assert asked == set(callback.heads)
    assert all(head.solve.report.loss < head.solve.report.start_loss for head in callback.heads.values())


def test_freeze_and_unfreeze_by_name_between_fits():
    callback = StructureFreezeCallback(["proj", "pred"], churn_tolerance=0.0, solver=None, min_steps=0)
    module = Stacked()
    make_trainer(callback, max_epochs=1).fit(module, make_loader())
    callback.freeze("pred")
    assert [head.frozen for head in callback.heads.values()] == [False, True]
    with pytest.raises(
        MisconfigurationException, match=r"Expected `name` to be one of \['proj', 'pred'\], but got 'p'"
    ):
        callback.freeze("p")
    with pytest.raises(MisconfigurationException, match="Expected the head at 'pred' to be an MLP"):
        callback.freeze("pred")
    callback.freeze()
    assert callback.frozen
    with pytest.raises(MisconfigurationException, match="Expected the head at 'proj' and 'pred' to be an MLP"):
        callback.freeze()
    callback.unfreeze("proj")
    assert type(module.proj) is nn.Sequential
    assert isinstance(module.pred, GLAIHead)
    callback.unfreeze()
    assert not any(head.frozen for head in callback.heads.values())
    with pytest.raises(MisconfigurationException, match="Expected the head at 'pred' to be frozen, but it is an MLP"):
        callback.unfreeze("pred")


@pytest.mark.parametrize("paths", ["tangent", "independent"])
def test_what_no_mlp_equals_cannot_be_unfrozen_and_nothing_is(paths):
    module = Stacked()
    proj = StructureFreezeCallback(["proj", "pred"], freeze_at_epoch=9, solver=None)
    make_trainer(proj, max_epochs=1).fit(module, make_loader())
    proj.freeze("proj")
    proj.paths = paths
    proj.freeze("pred")
    with pytest.raises(ValueError, match=f"but got '{paths}' paths, which no MLP equals"):
        proj.unfreeze()
    assert isinstance(module.proj, GLAIHead)
    assert isinstance(module.pred, GLAIHead)


def test_after_unfreeze_the_mlp_trains_again_and_freezes_again():
    callback, frozen = StructureFreezeCallback(["proj", "pred"], freeze_at_epoch=1, solver=None), Frozen()
    module = Stacked()
    make_trainer(callback, max_epochs=2).fit(module, make_loader())
    callback.unfreeze()
    before = module.proj[0].weight.detach().clone()
    make_trainer(callback, frozen, max_epochs=3).fit(module, make_loader())
    assert frozen.frozen == [[False, False], [True, True], [True, True]]
    assert not torch.equal(module.proj[0].weight, before)


def test_a_name_that_begins_like_another_is_not_taken_for_it():
    class Names(Stacked):
        def __init__(self):
            super().__init__()
            self.proj2 = self.pred
            del self.pred

        @property
        def pred(self):
            return self.proj2

    module = Names()
    make_trainer(
        StructureFreezeCallback("proj2", paths="independent", freeze_at_epoch=0, solver=None), max_epochs=1
    ).fit(module, make_loader())
    state = dict(module.state_dict())  # the metadata, which would say it all, is gone
    loaded = Names()
    make_trainer(StructureFreezeCallback(["proj", "proj2"], solver=None, min_steps=0), max_epochs=0).fit(
        loaded, make_loader()
    )
    loaded.load_state_dict(state)
    assert isinstance(loaded.proj2, GLAIHead)
    assert type(loaded.proj) is nn.Sequential


def test_a_state_dict_of_which_one_head_has_another_size_converts_none():
    module = Stacked()
    make_trainer(StructureFreezeCallback(["proj", "pred"], freeze_at_epoch=0, solver=None), max_epochs=1).fit(
        module, make_loader()
    )
    other = Stacked()
    other.pred = mlp_head(FEATURES, 17, CLASSES, batch_norm=True)
    make_trainer(StructureFreezeCallback(["proj", "pred"], solver=None, min_steps=0), max_epochs=0).fit(
        other, make_loader()
    )
    with pytest.raises(RuntimeError, match="Expected the state dict of a head like that at 'pred'"):
        other.load_state_dict(module.state_dict())
    assert type(other.proj) is nn.Sequential


def test_the_fit_report_speaks_of_all_heads():
    callback, report = OneAfterTheOther({"pred": 1, "proj": 3}, solver=None, min_steps=0), FitReport()
    make_trainer(callback, report, max_epochs=5).fit(Stacked(), make_loader())
    assert report.record.freeze_epoch == 3
    assert [epoch.frozen for epoch in report.record.epochs] == [False] * 3 + [True] * 2
    pred, proj = (head.churn_history for head in callback.heads.values())
    assert [epoch.churn for epoch in report.record.epochs] == [max(pred[0], proj[0]), proj[1], proj[2], None, None]
