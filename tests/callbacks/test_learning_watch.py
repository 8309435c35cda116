import copy
import typing
from dataclasses import replace

import pytest
import torch
from fits import HEAD, SomebodysModule, make_loader, make_trainer
from interruptions import differences
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.solvers import LogisticSolver

BATCHES = 5


class Settled(StructureFreezeCallback):
    """Takes every structure for settled, so that only what has been learned keeps a freeze waiting."""

    def should_freeze(self, head):
        return True


class Scored(SomebodysModule):
    """Validates by scores that are given, one for each epoch."""

    def __init__(self, scores, rate=3e-3):
        super().__init__(body=False)
        self.scores, self.rate = scores, rate

    def validation_step(self, batch, batch_idx):
        self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def test_nothing_is_frozen_before_the_optimizer_has_made_its_steps():
    callback = Settled(HEAD, solver=None, min_steps=3 * BATCHES)
    make_trainer(callback, EarlyStopping("score", patience=99), max_epochs=8).fit(
        Scored([1.0]), make_loader(), make_loader()
    )
    assert callback.freeze_epoch == 3


def test_nothing_is_frozen_while_the_loss_has_not_fallen(capsys):
    callback = Settled(HEAD, solver=None, min_steps=1)
    make_trainer(callback, EarlyStopping("score", patience=99), max_epochs=6).fit(
        Scored([1.0], rate=1e-7), make_loader(), make_loader()
    )
    assert not callback.frozen
    assert "is not clearly below where it started" in callback.heads[HEAD].waits_for


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_head_that_is_not_solved_is_not_frozen_while_validation_rises(tmp_path, mode):
    sign = 1.0 if mode == "max" else -1.0
    scores = [sign * score for score in (1.0, 2.0, 3.0, 4.0, 4.0, 4.01, 4.0)]
    callback = Settled(HEAD, solver=None, min_steps=1)
    make_trainer(callback, ModelCheckpoint(tmp_path, monitor="score", mode=mode), max_epochs=9).fit(
        Scored(scores), make_loader(), make_loader()
    )
    # Two validations in a row, those of epochs 4 and 5, bring no more than half a percent.
    assert callback.freeze_epoch == 6


def test_without_validation_the_training_loss_takes_its_place():
    callback = Settled(HEAD, solver=None, min_steps=1)
    make_trainer(callback, max_epochs=40, limit_val_batches=0).fit(Scored([0.0], rate=3e-2), make_loader())
    assert callback.frozen
    assert callback.freeze_epoch > 2


class ScriptedSolver(LogisticSolver):
    """Solves, and says that it scores as it is told, before and after, in the order of its solves."""

    scores: typing.ClassVar = []

    def solve(self, *args, **kwargs):
        start, score = self.scores.pop(0)
        return replace(super().solve(*args, **kwargs), start_score=start, score=score)


TRIALS = {
    "gains little": ([(0.3, 0.8), (0.3, 0.805)], 4),
    "worse": ([(0.3, 0.8), (0.3, 0.799)], 4),
    "gains little at the last": ([(0.3, 0.7), (0.3, 0.8), (0.3, 0.84)], 8),
    "gains to the end": ([(0.3, 0.7), (0.3, 0.8), (0.3, 0.9), (0.3, 0.98)], 9),
    "nothing left to gain": ([(0.9, 0.995)], 2),
    "more than half of the errors": ([(0.3, 0.64), (0.3, 0.64)], 9),
    "the MLP catches up": ([(0.3, 0.7), (0.5, 0.7), (0.6, 0.7)], 9),
}


@pytest.mark.parametrize(("scores", "epoch"), TRIALS.values(), ids=TRIALS)
def test_a_head_is_solved_once_solves_tried_after_twice_the_steps_gain_no_more(monkeypatch, caplog, scores, epoch):
    monkeypatch.setattr(ScriptedSolver, "scores", list(scores))
    callback = StructureFreezeCallback(HEAD, min_steps=1, solver=ScriptedSolver(), churn_tolerance=1.0)
    trainer = make_trainer(callback, EarlyStopping("score", mode="max", patience=99), max_epochs=9)
    # The first epoch is where the loss started. Validation still rises. The last epoch is solved in any case.
    trainer.fit(Scored([float(number) for number in range(9)]), make_loader(), make_loader())
    assert (callback.freeze_epoch, trainer.current_epoch) == (epoch, epoch)
    assert callback.solve_report.score == scores[-1][1]
    # Of a validation that does not call the head the user is told once, however many solves there are.
    assert caplog.text.count("does not look at the validation data") == 1


@pytest.mark.parametrize(("tolerance", "epoch"), [(1.0, 6), (0.0, None)])
def test_a_quiet_structure_is_solved_once_validation_stands_still_for_three_epochs(monkeypatch, tolerance, epoch):
    monkeypatch.setattr(ScriptedSolver, "scores", list(TRIALS["more than half of the errors"][0]))
    # Churn never falls to such a small part of the largest.
    options = {"min_steps": 1, "churn_tolerance": tolerance, "relative_tolerance": 1e-9}
    callback = StructureFreezeCallback(HEAD, solver=ScriptedSolver(), **options)
    trainer = make_trainer(callback, EarlyStopping("score", mode="max", patience=99), max_epochs=8)
    trainer.fit(Scored([1.0, 2.0, 2.0, 1.9, 2.0, 2.0]), make_loader(), make_loader())
    assert callback.freeze_epoch == epoch
    assert (callback.solve_report is not None) == (epoch is not None)


class BeforeEpoch(Callback):
    """Copies weights and optimizer state before an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.copied = copy.deepcopy((dict(pl_module.state_dict()), trainer.optimizers[0].state_dict()))


@pytest.mark.parametrize("paths", ["output", "independent"])
def test_a_trial_that_is_taken_back_changes_nothing_of_the_fit(monkeypatch, paths):
    def fit(solver):
        torch.manual_seed(0)
        callback = StructureFreezeCallback(HEAD, paths, min_steps=1, churn_tolerance=1.0, solver=solver)
        notes = BeforeEpoch(3)
        trainer = make_trainer(callback, notes, EarlyStopping("score", mode="max", patience=99), max_epochs=5)
        trainer.fit(Scored([1.0, 2.0, 3.0, 4.0, 5.0]), make_loader(), make_loader())
        return notes.copied

    monkeypatch.setattr(ScriptedSolver, "scores", [(0.3, 0.7), (0.3, 0.8), (0.3, 0.9)])
    assert differences(fit(ScriptedSolver()), fit(None)) == []
    assert len(ScriptedSolver.scores) < 3


def test_an_epoch_that_was_asked_for_waits_for_nothing():
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None, min_steps=10_000)
    make_trainer(callback, max_epochs=3).fit(Scored([1.0]), make_loader())
    assert callback.freeze_epoch == 1


def test_a_cut_fit_waits_as_long_as_one_that_was_not_cut(tmp_path):
    def fit(*callbacks, ckpt_path=None):
        torch.manual_seed(0)
        callback = Settled(HEAD, solver=None, min_steps=1)
        saved = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(callback, saved, max_epochs=8)
        trainer.fit(Scored([1.0, 2.0, 3.0, 3.0, 3.0]), make_loader(), make_loader(), ckpt_path=ckpt_path)
        return callback.freeze_epoch

    whole = fit()
    assert whole == 5
    for cut in sorted(tmp_path.glob("epoch=[0-4].ckpt")):
        assert fit(ckpt_path=cut) == whole
