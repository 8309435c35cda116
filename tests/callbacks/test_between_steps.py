"""Freezes and reverts happen between optimizer steps, and a head need not be called in every batch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from glai_lightning import GLAIHead, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback, StructureMonitor, StructureRevert
from glai_lightning.solvers import LogisticSolver

SETTLES = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "min_epochs": 0, "min_steps": 0, "solver": None}


class Swings(SomebodysModule):
    """Validates well as an MLP, and badly while it is frozen."""

    def validation_step(self, batch, batch_idx):
        self.log("score", 0.0 if isinstance(self.blocks["head"], GLAIHead) else 1.0, batch_size=1)


class Changes(Callback):
    """Notes at which batch the head changed, and whether gradients were being accumulated then."""

    def __init__(self):
        self.changes, self.inside, self.was = 0, [], False

    def _look(self, trainer, pl_module):
        frozen = isinstance(pl_module.blocks["head"], GLAIHead)
        if frozen is not self.was:
            self.was = frozen
            self.changes += 1
            if trainer.fit_loop._should_accumulate():
                self.inside.append((trainer.current_epoch, trainer.fit_loop.batch_idx))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # By now the loop counts the batch that begins.
        frozen = isinstance(pl_module.blocks["head"], GLAIHead)
        if frozen is not self.was:
            self.was = frozen
            self.changes += 1
            if batch_idx % trainer.accumulate_grad_batches:
                self.inside.append((trainer.current_epoch, batch_idx))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._look(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._look(trainer, pl_module)


@pytest.mark.parametrize(
    ("accumulate", "val_check_interval", "check_every_n_steps"),
    list(itertools.product([2, 3, 4], [1, 3, 5], [None, 1, 2])),
)
def test_no_freeze_and_no_revert_falls_between_batches_whose_gradients_are_added(
    accumulate, val_check_interval, check_every_n_steps
):
    freeze = StructureFreezeCallback(HEAD, check_every_n_steps=check_every_n_steps, **SETTLES)
    changes = Changes()
    trainer = make_trainer(
        freeze,
        StructureRevert("score", patience=1),
        changes,
        max_epochs=6,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_check_interval,
        num_sanity_val_steps=0,
    )
    trainer.fit(Swings(), make_loader(batch_size=16), make_loader(32))
    assert changes.changes >= 2
    assert changes.inside == []


@pytest.mark.parametrize("accumulate", [1, 3, 4, 8])
def test_checks_within_an_epoch_find_inputs_however_many_batches_make_a_step(accumulate):
    freeze = StructureFreezeCallback(
        HEAD, check_every_n_steps=1, churn_tolerance=0.0, min_epochs=0, probe_size=16, solver=None, min_steps=0
    )
    trainer = make_trainer(freeze, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(SomebodysModule(), make_loader(batch_size=16))
    assert len(freeze.churn_history) == trainer.global_step


class Alternating(LightningModule):
    """Two tasks with a head each, of which a batch trains one."""

    def __init__(self, task_of):
        super().__init__()
        self.heads = nn.ModuleDict({name: mlp_head(FEATURES, HIDDEN, CLASSES) for name in "ab"})
        self.task_of = task_of

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.heads[self.task_of(self.current_epoch, batch_idx)](batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


TASKS = {
    "one after the other": lambda epoch, batch: "ab"[batch % 2],
    "the second not in the last of an epoch": lambda epoch, batch: "ab"[batch in (1, 2)],
    "the second not in the first": lambda epoch, batch: "ab"[batch > 2],
    "an epoch each": lambda epoch, batch: "ab"[epoch % 2],
}


@pytest.mark.filterwarnings("ignore:The head at")
@pytest.mark.parametrize("probe_size", [16, 1024])
@pytest.mark.parametrize("tasks", TASKS)
def test_tasks_may_take_turns(tasks, probe_size):
    rule = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "solver": None, "min_steps": 0}
    freeze = StructureFreezeCallback(["heads.a", "heads.b"], probe_size=probe_size, **rule)
    monitor = StructureMonitor(["heads.*"])
    trainer = make_trainer(freeze, monitor, max_epochs=8)
    trainer.fit(Alternating(TASKS[tasks]), make_loader())
    assert freeze.frozen
    expected = 4 if tasks == "an epoch each" else freeze.heads["heads.b"].freeze_epoch
    assert all(0 < len(watch.churn_history) <= expected for watch in freeze.heads.values())


def test_tasks_that_take_turns_within_an_epoch_need_no_sentence(recwarn):
    freeze = StructureFreezeCallback(["heads.a", "heads.b"], churn_tolerance=0.0, solver=None, min_steps=0)
    make_trainer(freeze, max_epochs=3).fit(Alternating(TASKS["one after the other"]), make_loader())
    assert not [warning for warning in recwarn if "not called" in str(warning.message)]
    assert [len(watch.churn_history) for watch in freeze.heads.values()] == [3, 3]


def test_tasks_that_take_turns_are_checked_within_epochs_too():
    freeze = StructureFreezeCallback(["heads.a", "heads.b"], check_every_n_steps=3, **SETTLES)
    make_trainer(freeze, max_epochs=2).fit(Alternating(TASKS["one after the other"]), make_loader())
    assert freeze.frozen


def test_a_head_that_is_not_called_in_a_whole_epoch_is_told_of_once():
    freeze = StructureFreezeCallback("heads.b", churn_tolerance=0.0, solver=None, min_steps=0)
    with pytest.warns(UserWarning, match=r"The head at 'heads.b' was not called in training in the whole of epoch 0"):
        make_trainer(freeze, max_epochs=2).fit(Alternating(lambda *_: "a"), make_loader())
    assert freeze.churn_history == []


def test_churn_is_nan_until_it_is_measured():
    freeze = StructureFreezeCallback("heads.b", churn_tolerance=0.0, solver=None, min_steps=0)
    trainer = make_trainer(freeze, max_epochs=1)
    with pytest.warns(UserWarning, match="not called"):
        trainer.fit(Alternating(lambda *_: "a"), make_loader())
    assert torch.isnan(trainer.callback_metrics["structure/churn"])


class Epochs(Callback):
    def __init__(self):
        self.validated = []

    def on_validation_end(self, trainer, pl_module):
        self.validated.append((trainer.current_epoch, isinstance(pl_module.blocks["head"], GLAIHead)))


@pytest.mark.parametrize("freeze_at_epoch", [1, 2, 3])
def test_the_fit_does_not_stop_after_a_solve_before_the_solved_head_was_validated(freeze_at_epoch, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    freeze = StructureFreezeCallback(
        HEAD, freeze_at_epoch=freeze_at_epoch, solver=LogisticSolver(max_passes=5), stop_after_solve=True
    )
    epochs, best = Epochs(), ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    module = SomebodysModule(body=False)
    options = {"max_epochs": 9, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    trainer = make_trainer(freeze, epochs, best, **options)
    trainer.fit(module, make_loader(), make_loader())
    assert trainer.current_epoch == freeze_at_epoch
    assert epochs.validated[-1] == (freeze_at_epoch - 1, True)
    assert trainer.check_val_every_n_epoch == 2
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    x, y = make_data()
    loss = F.cross_entropy(module(x), y).item()
    assert min(float(score) for score in best.best_k_models.values()) == pytest.approx(loss, rel=1e-4)
    assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())


def test_freeze_at_epoch_counts_whatever_the_churn():
    freeze = StructureFreezeCallback(HEAD, freeze_at_epoch=4, **SETTLES)
    make_trainer(freeze, max_epochs=6).fit(SomebodysModule(), make_loader())
    assert freeze.freeze_epoch == 4
    assert len(freeze.churn_history) == 4


class Thaws(Callback):
    """Sets everything to require gradients, as gradual unfreezing does."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *_: pl_module.requires_grad_(True))


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_before_backward"])
def test_a_frozen_structure_stands_still_whatever_is_set_to_require_gradients(hook, paths):
    class AtFreeze(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            head = pl_module.blocks["head"]
            if isinstance(head, GLAIHead) and not hasattr(self, "patterns"):
                self.patterns = head.patterns(make_data()[0])

    freeze, at_freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=1, solver=None), AtFreeze()
    module = SomebodysModule()
    trainer = make_trainer(freeze, at_freeze, Thaws(hook), max_epochs=3)
    if paths == "tangent":
        trainer.fit(module, make_loader())
    else:
        with pytest.warns(UserWarning, match="were set to require gradients. They stay frozen"):
            trainer.fit(module, make_loader())
    after = module.blocks["head"].patterns(make_data()[0])
    assert all(torch.equal(one, other) for one, other in zip(at_freeze.patterns, after, strict=True))


class Tied(SomebodysModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(HIDDEN, CLASSES)
        self.decoder.weight = self.blocks["head"][2].weight


def test_parameters_tied_to_a_module_outside_of_the_head_are_refused_by_name():
    with pytest.raises(MisconfigurationException, match=r"'blocks.head.2.weight' under 'decoder.weight' as well"):
        make_trainer(StructureFreezeCallback(HEAD, solver=None, min_steps=0)).fit(Tied(), make_loader())


def test_a_pruning_callback_is_refused_by_name():
    from lightning.pytorch.callbacks import ModelPruning

    with pytest.raises(MisconfigurationException, match="but got `ModelPruning`"):
        make_trainer(StructureFreezeCallback(HEAD, solver=None, min_steps=0), ModelPruning("l1_unstructured")).fit(
            SomebodysModule(), make_loader()
        )


def test_an_optimizer_for_matrices_is_refused_with_independent_paths():
    class Module(SomebodysModule):
        def configure_optimizers(self):
            return torch.optim.Muon([p for p in self.blocks.parameters() if p.ndim == 2])

    with pytest.raises(MisconfigurationException, match="but got `Muon`, which is for matrices"):
        make_trainer(StructureFreezeCallback(HEAD, paths="independent", solver=None, min_steps=0)).fit(
            Module(), make_loader()
        )
    freeze = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    make_trainer(freeze, max_epochs=2).fit(Module(), make_loader())
    assert freeze.frozen


class Embeds(LightningModule):
    """A head that looks up words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Sequential(
            nn.Embedding(20, 4), nn.Flatten(), nn.Linear(3 * 4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def test_a_head_that_looks_up_words_resumes_in_the_middle_of_an_epoch(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import TensorDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    def run(*checkpoints, ckpt_path=None):
        words = torch.arange(96 * 3).reshape(96, 3) * 7 % 20
        loader = StatefulDataLoader(TensorDataset(words, words.sum(1) % CLASSES), batch_size=16)
        freeze = StructureFreezeCallback(
            churn_tolerance=1.0, relative_tolerance=1.0, min_epochs=2, probe_size=8, solver=None, min_steps=0
        )
        module = Embeds()
        make_trainer(freeze, *checkpoints, max_epochs=4).fit(module, loader, ckpt_path=ckpt_path)
        assert freeze.freeze_epoch == 2
        return module.state_dict()

    whole = run(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5))
    for cut in sorted(tmp_path.glob("*.ckpt")):
        resumed = run(ckpt_path=cut)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Predictor(nn.Module):
    """A head beside what it is called with."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return self.ffn(x)


class Inner(LightningModule):
    def __init__(self, ffn=None):
        super().__init__()
        self.predictor = Predictor(mlp_head(FEATURES, HIDDEN, CLASSES) if ffn is None else ffn)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.predictor.ffn(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_errors_name_the_modules_that_can_be_used():
    with pytest.raises(MisconfigurationException, match=r"can be used as a head: \['predictor.ffn'\]"):
        make_trainer(StructureFreezeCallback("head", solver=None, min_steps=0)).fit(Inner(), make_loader())
    with pytest.raises(
        MisconfigurationException,
        match=r"'predictor' to be called .* are called. .*can be used .*: \['predictor.ffn'\]",
    ):
        make_trainer(StructureFreezeCallback("predictor", solver=None, min_steps=0)).fit(Inner(), make_loader())
    freeze = StructureFreezeCallback("predictor.ffn", freeze_at_epoch=1, solver=None)
    make_trainer(freeze, max_epochs=2).fit(Inner(), make_loader())
    assert freeze.frozen


def test_where_no_module_can_be_used_the_closest_is_named_with_the_reason():
    module = Inner(nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Softmax(-1), nn.Linear(HIDDEN, CLASSES)))
    with pytest.raises(MisconfigurationException, match=r"The closest is 'predictor.ffn': Expected an activation"):
        make_trainer(StructureFreezeCallback("head", solver=None, min_steps=0)).fit(module, make_loader())
