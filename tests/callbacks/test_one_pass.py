from types import SimpleNamespace

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from distributed_fits import DistributedFit, largest_difference, read_processes
from fits import CLASSES, FEATURES, make_data, make_loader, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from glai_lightning import mlp_head
from glai_lightning.callbacks import FitReport, StructureFreezeCallback, StructureRevert
from glai_lightning.fitting import head_data, kept_inputs, replaying
from glai_lightning.solvers import LogisticSolver

HIDDEN, SAMPLES = 16, 150


class Backbone(nn.Module):
    """Counts the samples that it sees, where no reading of a step beside the fit can undo it."""

    def __init__(self, *, norm=False, trains=False, noise=False, width=None):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES).requires_grad_(trains)
        if width is not None:
            layers = nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, FEATURES)
            self.linear = nn.Sequential(*layers).requires_grad_(trains)
        self.norm = nn.BatchNorm1d(FEATURES, affine=False) if norm else nn.Identity()
        self.noise = noise
        self.seen = SimpleNamespace(rows=0)

    def forward(self, x):
        self.seen.rows += len(x)
        x = self.norm(torch.tanh(self.linear(x)))
        return x + torch.rand(()) if self.noise else x


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets)


def written_out(logits, targets):
    weights = torch.tensor([1.0, 2.0, 0.5])[targets]
    return -(weights * logits.log_softmax(1)[torch.arange(len(targets)), targets]).mean()


def squared_error(logits, targets):
    return F.mse_loss(logits, F.one_hot(targets, CLASSES).float())


def make_module(base, loss=cross_entropy, **backbone):
    class Module(base):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone(**backbone)
            self.head = mlp_head(FEATURES, HIDDEN, CLASSES, dropout=0.1)

        def step(self, batch, name):
            features = base.features(self, batch[0]) if hasattr(base, "features") else self.backbone(batch[0])
            loss_now = loss(self.head(features * 1.5), batch[1])
            self.log(name, loss_now, on_step=False, on_epoch=True)
            return loss_now

        def training_step(self, batch, batch_idx):
            return self.step(batch, "loss")

        def validation_step(self, batch):
            self.step(batch, "val_loss")

        def configure_optimizers(self):
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.02, max(9, self.trainer.estimated_stepping_batches)
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    torch.manual_seed(3)
    return Module()


class Trace(Callback):
    """Notes, after each batch of the data loader, all that a fit with and without one pass has in common."""

    def __init__(self):
        self.states, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moments = [v.clone() for state in trainer.optimizers[0].state.values() for v in state.values()]
        weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
        rate = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append([outputs["loss"], *weights, *moments, rate, torch.get_rng_state()])

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append(trainer.callback_metrics["loss"].item())


def freezing(**options):
    return StructureFreezeCallback(**{"min_steps": 0, "freeze_at_epoch": 4, "one_pass": True, **options})


def fit(module, *callbacks, namespace=lightning.pytorch, samples=SAMPLES, loader=None, max_epochs=9, **options):
    options = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, **options}
    options = {"enable_progress_bar": False, "enable_checkpointing": False, **options}
    trainer = namespace.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **options)
    torch.manual_seed(1)
    if loader is None:
        loader = DataLoader(TensorDataset(*make_data(samples)), batch_size=32, shuffle=True)
    trainer.fit(module, loader, make_loader(60))
    return trainer


@pytest.mark.parametrize(
    ("namespace", "loss", "options"),
    [
        (lightning.pytorch, cross_entropy, {}),
        (pytorch_lightning, squared_error, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        (lightning.pytorch, written_out, {"precision": "bf16-mixed"}),
    ],
)
def test_the_first_epoch_is_bitwise_that_of_any_fit_and_the_backbone_sees_the_data_once(namespace, loss, options):
    traces = []
    for one_pass in (True, False):
        module = make_module(namespace.LightningModule, loss)
        trace, freeze = Trace(), freezing(one_pass=one_pass)
        trainer = fit(module, trace, freeze, namespace=namespace, **options)
        traces.append(trace)
        if one_pass:
            steps = 3 if "accumulate_grad_batches" in options else 5
            assert trainer.current_epoch == 1
            assert (trainer.global_step, freeze.freeze_epoch) == (4 * steps, 4)
            assert (
                trainer.optimizers[0].param_groups[0]["lr"]
                == trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
            )
            assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4 * steps
            assert freeze.solve_report.loss < freeze.solve_report.start_loss
            assert module.backbone.seen.rows == 60 + SAMPLES + 60
            record = freeze.one_pass_record
            assert (record.samples, record.passes) == (SAMPLES, 3)
    one, other = traces
    assert one.logged[0] == other.logged[0]
    for state, same in zip(one.states, other.states[: len(one.states)], strict=True):
        assert len(state) == len(same)
        assert all(map(torch.equal, state, same))


@pytest.mark.parametrize("loss", [cross_entropy, squared_error, written_out])
def test_passes_over_kept_inputs_train_as_epochs_do(loss):
    ends = []
    loader = DataLoader(TensorDataset(*make_data(SAMPLES)), batch_size=SAMPLES)
    for one_pass in (True, False):
        module = make_module(lightning.pytorch.LightningModule, loss)
        module.head[2].p = 0.0
        trainer = fit(module, freezing(one_pass=one_pass), loader=loader, gradient_clip_val=0.1)
        ends.append((module.head[0].weight, trainer.optimizers[0].param_groups[0]["lr"], trainer.global_step))
    (weight, *one), (other_weight, *other) = ends
    assert one == other
    assert torch.allclose(weight, other_weight, atol=1e-5)


@pytest.mark.parametrize("limit", [head_data.INPUTS_IN_MEMORY, 0], ids=["held", "read anew"])
def test_passes_end_once_the_validation_score_stands_still(monkeypatch, limit):
    monkeypatch.setattr(head_data, "INPUTS_IN_MEMORY", limit)
    # No output is ever right about a class that the training data lacks, though churn never comes to rest.
    x, y = make_data(SAMPLES)
    loader = DataLoader(TensorDataset(x, y % 2), batch_size=32)
    freeze = StructureFreezeCallback(
        one_pass=True, min_steps=1, churn_tolerance=1.0, relative_tolerance=1e-9, solver=LogisticSolver(l2=0.1)
    )
    module = make_module(lightning.pytorch.LightningModule)
    trainer = make_trainer(freeze, max_epochs=9)
    trainer.fit(module, loader, DataLoader(TensorDataset(x, torch.full_like(y, 2)), batch_size=60))
    assert freeze.one_pass_record.passes == (4 if limit else 8)


class Augmenting(pytorch_lightning.LightningModule):
    def features(self, x):
        return self.backbone(x + torch.randn_like(x))


class ChangingInPlace(lightning.pytorch.LightningModule):
    def features(self, x):
        return self.backbone(x).sub_(0.1)


def drawing_twice():
    data = TensorDataset(*make_data(SAMPLES))
    return DataLoader(data, sampler=RandomSampler(data, replacement=True), batch_size=32)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*make_data(SAMPLES), strict=True)


def certain_margin(logits, targets):
    return F.multi_margin_loss(logits, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trains": True}, "layers outside the head are trained"),
        ({"norm": True}, "there is normalisation by the batch outside the head"),
        ({"noise": True}, "a module outside the head draws at random"),
        ({"base": Augmenting}, "'backbone' is given other inputs when `training_step` is run again"),
        ({"base": ChangingInPlace}, "changes it in place"),
        ({"loader": drawing_twice}, "samples that `RandomSampler` draws with replacement"),
        ({"loader": lambda: DataLoader(Stream(), batch_size=32)}, "an iterable, which may yield other samples"),
        ({"loss": certain_margin}, "a loss that can be differentiated three times"),
        ({"beside": StructureRevert("val_loss", mode="min")}, "no `StructureRevert` beside `one_pass=True`"),
    ],
)
def test_what_cannot_be_read_once_is_refused_on_the_first_batch(options, message):
    options = dict(options)
    loader, beside = options.pop("loader", lambda: None)(), options.pop("beside", None)
    base = options.pop("base", lightning.pytorch.LightningModule)
    module = make_module(base, **options)
    namespace = pytorch_lightning if base is Augmenting else lightning.pytorch
    steps = Trace()
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, steps, freezing(), *filter(None, [beside]), namespace=namespace, loader=loader)
    assert steps.states == []
    assert "training_step" not in vars(module)


def ends(*, one_pass, options=(), loader=None, beside=(), base=lightning.pytorch.LightningModule, **arguments):
    """Fit with a backbone of nine times the head's multiply-adds, and return what the fit ends with."""
    module = make_module(base, **{"width": 100, **dict(options)})
    freeze = freezing(one_pass=one_pass, freeze_at_epoch=2, **{k: arguments.pop(k) for k in FREEZING & set(arguments)})
    namespace = pytorch_lightning if base is Augmenting else lightning.pytorch
    options = {"loader": None if loader is None else loader(), "namespace": namespace, "max_epochs": 3, **arguments}
    trainer = fit(module, freeze, *beside, **options)
    return [*module.head.state_dict().values(), torch.tensor(trainer.current_epoch)], module, freeze


FREEZING = {"solver", "stop_after_solve"}


def test_auto_reads_the_data_once_where_the_backbone_is_most_of_the_work(caplog):
    with caplog.at_level("INFO", "glai_lightning"):
        auto, module, freeze = ends(one_pass="auto")
    once, *_ = ends(one_pass=True)
    assert all(map(torch.equal, auto, once))
    # The look at the loss is beside the fit: one batch goes through the backbone twice.
    assert module.backbone.seen.rows == 60 + 32 + SAMPLES + 60
    assert freeze.one_pass_record.passes == 1
    assert "This fit reads the data once: what stands before the head takes 9 times" in caplog.text


class AnotherLossLater(lightning.pytorch.LightningModule):
    """Its loss is the same throughout, and not called by the same name in the third batch."""

    def step(self, batch, name):
        logits = self.head(self.backbone(batch[0]))
        later = self.trainer.training and self.trainer.fit_loop.batch_idx == 2
        return F.nll_loss(logits.log_softmax(1), batch[1]) if later else F.cross_entropy(logits, batch[1])

    def training_step(self, batch, batch_idx):
        return AnotherLossLater.step(self, batch, "loss")


@pytest.mark.parametrize(
    "case",
    [
        {"options": {"width": 20}},
        {"options": {"trains": True}},
        {"options": {"norm": True}},
        {"options": {"noise": True}},
        {"base": Augmenting},
        {"base": ChangingInPlace},
        {"options": {"loss": certain_margin}},
        {"loader": drawing_twice},
        {"beside": [StructureRevert("val_loss", mode="min")]},
        {"solver": None},
        {"stop_after_solve": False},
        {"max_epochs": 1},
        {"limit_train_batches": 3},
        {"max_time": "00:01:00:00"},
    ],
    ids=lambda case: " ".join(f"{name} {sorted(of) if isinstance(of, dict) else ''}" for name, of in case.items()),
)
def test_auto_changes_nothing_elsewhere(case):
    (auto, module, freeze), (epochs, *_) = ends(one_pass="auto", **case), ends(one_pass=False, **case)
    assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(auto, epochs, strict=True))
    assert freeze.one_pass_record is None
    assert "training_step" not in vars(module)


def test_auto_gives_up_in_the_middle_and_says_so(monkeypatch, caplog):
    made = make_module

    def with_another_loss_later(base, **options):
        module = made(base, **options)
        module.training_step = AnotherLossLater.training_step.__get__(module)
        return module

    monkeypatch.setitem(globals(), "make_module", with_another_loss_later)
    with caplog.at_level("INFO", "glai_lightning"):
        auto, *_ = ends(one_pass="auto")
    epochs, *_ = ends(one_pass=False)
    assert all(map(torch.equal, auto, epochs))
    assert "reads the data in every epoch after all: Expected `training_step`" in caplog.text


@pytest.mark.parametrize("argument", ["solver", "stop_after_solve"])
def test_one_pass_wants_a_solve_after_which_the_fit_stops(argument):
    value = None if argument == "solver" else False
    with pytest.raises(MisconfigurationException, match=f"one_pass=True`, but got `{argument}={value}`"):
        freezing(**{argument: value})


@pytest.mark.parametrize("cut", ["within the first epoch", "after it"])
def test_a_fit_that_resumes_without_kept_inputs_collects_them_once_more_and_says_so(tmp_path, cut, caplog):
    within = cut == "within the first epoch"
    module = make_module(lightning.pytorch.LightningModule)
    every = {"every_n_train_steps": 2} if within else {"every_n_epochs": 1}
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **every)
    fit(module, saving, freezing(one_pass=within), enable_checkpointing=True, num_sanity_val_steps=0)
    module, freeze = make_module(lightning.pytorch.LightningModule), freezing()
    trainer = make_trainer(freeze, max_epochs=9, num_sanity_val_steps=0)
    with caplog.at_level("INFO", "glai_lightning"):
        trainer.fit(
            module, make_loader(SAMPLES), make_loader(60), ckpt_path=tmp_path / f"step={2 if within else 5}.ckpt"
        )
    # A DataLoader without a state starts from its first batch, and the epoch ends with its fifth.
    assert module.backbone.seen.rows == (96 if within else 0) + SAMPLES + 60
    assert ("collected by a further pass" if within else "runs the backbone once more") in caplog.text
    assert trainer.current_epoch == (1 if within else 2)
    assert freeze.freeze_epoch == 4
    assert freeze.one_pass_record.passes == (3 if within else 2)


class OnePassForAll(StructureFreezeCallback):
    def __init__(self, **options):
        super().__init__(**{**options, "stop_after_solve": True, "one_pass": True})


def test_each_process_keeps_its_part_and_a_repeated_sample_counts_once(tmp_path):
    for passes in (0, 2):
        options = {"lr": 0.01 if passes else 0.0, "freeze_at_epoch": passes + 1}
        fit = DistributedFit(solver=True, body=False, callback=OnePassForAll, rows=16, **options)
        fit.run(tmp_path)
        one, other = read_processes(tmp_path, 2)
        assert largest_difference(one, other) == 0
        assert one["solved"] == other["solved"]
        if passes == 0:
            fit.in_one_process().run(tmp_path)
            (alone,) = read_processes(tmp_path, 1)
            assert one["solved"][:2] == pytest.approx(alone["solved"][:2], rel=1e-6)


def test_beyond_the_limit_inputs_are_in_a_file_and_the_fit_is_the_same(monkeypatch):
    ends = []
    for limit in (2**30, 1000):
        monkeypatch.setattr(kept_inputs, "INPUTS_IN_MEMORY", limit)
        monkeypatch.setattr(head_data, "INPUTS_IN_MEMORY", 2**30)
        module = make_module(lightning.pytorch.LightningModule, written_out)
        fit(module, freezing())
        ends.append(module.head[3].weight)
    assert torch.allclose(*ends, atol=1e-4)
    assert not torch.equal(ends[0], torch.zeros(()))


def test_a_folder_without_room_is_named(monkeypatch):
    monkeypatch.setattr(kept_inputs, "INPUTS_IN_MEMORY", 1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_inputs.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"bytes of room in .*No space left on device"):
        fit(make_module(lightning.pytorch.LightningModule), freezing())


class Whole(nn.Module):
    """A network that ends with the head, and has wide activations before it."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.widen = nn.Upsample(scale_factor=50)
        self.fc = mlp_head(FEATURES, HIDDEN, CLASSES)

    def forward(self, x):
        return self.fc(self.widen(self.backbone(x)[:, None])[:, 0, ::50])


class TwoHeads(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList([Whole(), Whole()])

    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(network(batch[0]), batch[1]) for network in self.networks)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class JoinedHead(lightning.pytorch.LightningModule):
    """A network whose head is two layers of its own, which its forward calls."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.hidden, self.last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.last(torch.relu(self.hidden(self.backbone(x))))


class Outer(TwoHeads):
    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList([JoinedHead()])


class CountFromHere(Callback):
    """Where the layers of a joined head stand is read off a call with made-up inputs, before the fit."""

    def on_train_start(self, trainer, pl_module):
        pl_module.networks[0].backbone.seen.rows = 0


def test_the_layers_of_a_joined_head_are_no_part_of_what_is_recorded():
    module, freeze = Outer(), freezing(head="networks.0.hidden+networks.0.last")
    fit(module, CountFromHere(), freeze)
    assert freeze.frozen
    assert module.networks[0].backbone.seen.rows == SAMPLES + 60


def test_heads_inside_a_network_train_and_are_solved_together(capsys, monkeypatch):
    monkeypatch.setattr(replaying, "KEPT_FOR_VALIDATION", 2 * 60 * FEATURES * 4)
    module = TwoHeads()
    freeze = freezing(head=["networks.0.fc", "networks.1.fc"])
    trainer = fit(module, FitReport(), freeze)
    assert [network.backbone.seen.rows for network in module.networks] == [60 + SAMPLES + 60] * 2
    assert all(watch.frozen and watch.solve.report is not None for watch in freeze.heads.values())
    assert trainer.current_epoch == 1
    assert "150 training samples went through the backbone" in " ".join(capsys.readouterr().out.split())
