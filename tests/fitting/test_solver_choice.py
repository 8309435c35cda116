"""What ``solver="auto"`` stands for: decided on the first batch, and said where it stands for nothing."""

import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_loader, make_trainer
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.solvers import LogisticSolver, RidgeSolver


class Decision(Callback):
    """Notes whether a solve is to come, after every batch."""

    def __init__(self):
        self.pending = []

    def on_train_batch_end(self, trainer, pl_module, *batch):
        freeze = next(c for c in trainer.callbacks if isinstance(c, StructureFreezeCallback))
        self.pending.append([watch.solve.pending for watch in freeze.heads.values()])


def fit(module, loader=None, name=HEAD, **options):
    callback = StructureFreezeCallback(
        name, freeze_at_epoch=1, churn_tolerance=0.0, **{"stop_after_solve": False, **options}
    )
    decision = Decision()
    make_trainer(callback, decision, max_epochs=2).fit(module, loader or make_loader())
    return callback, decision


class Unsolvable(SomebodysModule):
    def training_step(self, batch, batch_idx):
        return F.multi_margin_loss(self(batch[0]), batch[1])


class Noisy(SomebodysModule):
    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)


def test_a_head_on_fixed_inputs_gets_the_solver_for_its_loss():
    callback, decision = fit(SomebodysModule(body=False))
    assert callback.solve_report is not None
    assert callback.solve_report.score is None or callback.solve_report.score >= callback.solve_report.start_score
    assert decision.pending[0] == [True]
    regression = SupervisedModule(mlp_head(FEATURES, HIDDEN, 1), task="regression")
    inputs = torch.randn(96, FEATURES)
    loader = DataLoader(TensorDataset(inputs, inputs.abs().sum(1)), batch_size=32)
    assert fit(regression, loader, "head")[0].solve_report.reason == "closed_form"


@pytest.mark.parametrize(
    ("make", "name", "options", "reason"),
    [
        (SomebodysModule, HEAD, {}, "layers outside the head are trained"),
        (
            lambda: SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES), nn.Dropout(0.5), freeze_backbone=False),
            "head",
            {},
            "there is dropout outside the head",
        ),
        (lambda: Noisy(body=False), HEAD, {}, "other inputs when it is read again"),
        (lambda: Unsolvable(body=False), HEAD, {}, "Expected a loss that"),
        (lambda: SomebodysModule(body=False), HEAD, {"paths": "tangent"}, "whose weights the optimizer trains"),
    ],
)
def test_elsewhere_one_line_says_on_the_first_batch_why_there_is_none(caplog, recwarn, make, name, options, reason):
    with caplog.at_level("INFO"):
        callback, decision = fit(make(), name=name, **options)
    assert callback.solve_report is None
    assert callback.frozen
    assert decision.pending[0] == [False]
    (line,) = [
        record.getMessage() for record in caplog.records if "will be frozen and not solved" in record.getMessage()
    ]
    assert reason in line
    assert "usually costs accuracy" in line
    assert not [warning for warning in recwarn if "not fixed" in str(warning.message)]


def test_the_line_says_what_the_freeze_can_save_at_most(caplog):
    module = SomebodysModule()
    with caplog.at_level("INFO"):
        fit(module)
    (line,) = [record.getMessage() for record in caplog.records if "saves at most" in record.getMessage()]
    mlp = SomebodysModule()
    batch = next(iter(make_loader()))
    counter = FlopCounterMode(display=False)
    with counter:
        mlp.training_step(batch, 0).backward()
    whole = counter.get_total_flops() / 2
    # The weights' gradient of the one inner layer is what it saves where layers before the head are trained.
    # The first layer of all needs no gradient of its inputs, which the count below leaves out.
    saved = len(batch[0]) * FEATURES * HIDDEN
    share = float(line.split("saves at most ")[1].split("%")[0]) / 100
    assert share == pytest.approx(saved / (whole + len(batch[0]) * FEATURES**2), abs=1e-3)
    inner, last, body = FEATURES * HIDDEN + HIDDEN, HIDDEN * CLASSES + CLASSES, FEATURES**2 + FEATURES
    assert f"{inner / (inner + last + body):.1%} of the optimizer's memory" in line


def test_deciding_costs_one_forward_of_the_first_batch():
    class Counting(nn.Identity):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return x

    class Deciding(SomebodysModule):
        def __init__(self):
            super().__init__(body=False)
            self.body = Counting()

    make_trainer(
        StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver="auto", min_steps=0, stop_after_solve=False),
        max_epochs=2,
    ).fit(Deciding(), make_loader())
    assert Counting.calls == 2 * 5 + 1


def test_what_is_chosen_is_the_class_with_its_defaults():
    from glai_lightning.fitting.solver_choice import choose_solver

    assert choose_solver("cross_entropy", torch.zeros(2).long()) == LogisticSolver()
    assert choose_solver("mse", torch.zeros(2, 1)) == choose_solver(None, torch.zeros(2, 1)) == RidgeSolver()


class UnsolvableInOne(SomebodysModule):
    def training_step(self, batch, batch_idx):
        loss = F.multi_margin_loss if self.global_rank == 1 else F.cross_entropy
        return loss(self(batch[0]), batch[1])


class SaveDecision(Decision):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        (self.folder / str(trainer.global_rank)).write_text(repr(self.pending[0]))


@pytest.mark.processes
@pytest.mark.parametrize(("make", "pending"), [(SomebodysModule, True), (UnsolvableInOne, False)])
def test_processes_decide_alike(tmp_path, make, pending):
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver="auto")
    trainer = make_trainer(callback, SaveDecision(tmp_path), max_epochs=1, devices=2, strategy="ddp_fork")
    trainer.fit(make(body=False), make_loader())
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [repr([pending])] * 2
