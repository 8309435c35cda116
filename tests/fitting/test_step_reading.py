"""What a solve in a fit is for: the loss that the user's own step returns, or nothing."""

import pytest
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from glai_lightning import GLAIHead, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback, StructureRevert
from glai_lightning.solvers import LogisticSolver

L2 = 1e-2
WEIGHTS = torch.tensor([1.0, 5.0, 1.0])


def solving(**options):
    solver = LogisticSolver(l2=L2, max_passes=300, tolerance=1e-7)
    return StructureFreezeCallback(
        HEAD, **{"freeze_at_epoch": 1, "churn_tolerance": 0.0, "solver": solver, "stop_after_solve": True, **options}
    )


class WithLoss(SomebodysModule):
    """A module whose loss is a function of logits, labels and the module."""

    def __init__(self, loss, head=None):
        super().__init__(head, body=False)
        self.loss_of = loss

    def training_step(self, batch, batch_idx):
        return self.loss_of(self(batch[0]), batch[1], self)

    def validation_step(self, batch, batch_idx):
        self.log("score", (self(batch[0]).argmax(-1) == batch[1]).float().mean())


def bits(labels):
    return torch.stack([labels == 0, labels != 1], 1).float()


def soft(labels):
    return 0.7 * F.one_hot(labels, CLASSES) + 0.3 * F.one_hot((labels + 1) % CLASSES, CLASSES)


def in_place(change):
    def loss(z, y, _):
        change(z, y)
        return F.cross_entropy(z, y)

    return loss


def only_logged(z, y, module):
    module.log("cross_entropy", F.cross_entropy(z, y))
    return F.multi_margin_loss(z, y)


def permuted(z, y, _):
    z, y = z.reshape(-1, 4, CLASSES), y.reshape(-1, 4)
    return F.cross_entropy(z.permute(1, 2, 0), y.t())


def varying(z, y, _):
    return F.cross_entropy(z, y, weight=torch.bincount(y, minlength=CLASSES) + 0.5)


FOLLOWED = {
    "mean": (lambda z, y, _: F.cross_entropy(z, y), CLASSES),
    "scaled": (lambda z, y, _: F.cross_entropy(z, y) / 4 + 7, CLASSES),
    "no reduction": (lambda z, y, _: F.cross_entropy(z, y, reduction="none").mean(), CLASSES),
    "sum": (lambda z, y, _: F.cross_entropy(z, y, reduction="sum"), CLASSES),
    "log_softmax and nll_loss": (lambda z, y, _: F.nll_loss(z.log_softmax(-1), y), CLASSES),
    "soft targets": (lambda z, y, _: F.cross_entropy(z, soft(y)), CLASSES),
    "soft targets by hand": (lambda z, y, _: -(soft(y) * z.log_softmax(-1)).sum(1).mean(), CLASSES),
    "two terms": (lambda z, y, _: F.cross_entropy(z, y) + F.cross_entropy(z, y.flip(0)), CLASSES),
    "label smoothing": (lambda z, y, _: F.cross_entropy(z, y, label_smoothing=0.1), CLASSES),
    "class weights": (lambda z, y, _: F.cross_entropy(z, y, weight=WEIGHTS), CLASSES),
    "class weights of the batch": (varying, CLASSES),
    "sample weights": (lambda z, y, _: ((1 + y) * F.cross_entropy(z, y, reduction="none")).mean(), CLASSES),
    "permuted logits": (permuted, CLASSES),
    "reversed rows": (lambda z, y, _: F.cross_entropy(z.flip(0), y.flip(0)), CLASSES),
    "several binary outputs": (lambda z, y, _: F.binary_cross_entropy_with_logits(z, bits(y)), 2),
    "sigmoid and binary cross-entropy": (lambda z, y, _: F.binary_cross_entropy(z.sigmoid(), bits(y)), 2),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_solved_head_is_where_the_users_own_loss_is_smallest(name):
    loss, outputs = FOLLOWED[name]
    module = WithLoss(loss, mlp_head(FEATURES, HIDDEN, outputs))
    loader = make_loader()
    callback = solving()
    make_trainer(callback).fit(module, loader)
    assert callback.solve_report.reason in ("converged", "no_progress")
    # As the fit weighs them: every batch the same.
    scale = {"scaled": 4, "sum": 1 / 32, "two terms": 1 / 2}.get(name, 1)
    total = sum(module.training_step(batch, 0) for batch in loader) * scale / len(loader)
    weight = module.blocks["head"][2].weight
    (gradient,) = torch.autograd.grad(total + L2 / 2 * weight.square().sum(), weight)
    if name == "sample weights":
        # The penalty is beside the mean of a loss whose weights have a mean of one.
        (of_loss,) = torch.autograd.grad(sum(module.training_step(batch, 0) for batch in loader) / len(loader), weight)
        mean = sum((1 + batch[1]).float().mean() for batch in loader) / len(loader)
        gradient = of_loss / mean + L2 * weight.detach()
    assert gradient.abs().max() < 1e-4


REFUSED = {
    "penalty on logits": lambda z, y, _: F.cross_entropy(z, y) + 1e-2 * z.square().mean(),
    "entropy bonus": lambda z, y, _: F.cross_entropy(z, y) + 0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    "distillation at a temperature": lambda z, y, _: (
        F.cross_entropy(z, y) + F.kl_div((z / 4).log_softmax(-1), soft(y), reduction="batchmean")
    ),
    "weight decay by hand": lambda z, y, module: (
        F.cross_entropy(z, y) + 1e-2 * sum(p.square().sum() for p in module.parameters())
    ),
    "only logged": only_logged,
    "temperature": lambda z, y, _: F.cross_entropy(z / 2, y),
    "temperature, in place": in_place(lambda z, _: z.div_(2)),
    "prior, in place": in_place(lambda z, _: z.add_(torch.tensor([0.0, 1.0, 2.0]))),
    "sign, in place": in_place(lambda z, _: z.neg_()),
    "margin, in place": in_place(lambda z, y: z[torch.arange(len(y)), y].sub_(0.5) if False else z.sub_(0.5 * soft(y))),
    "focal": lambda z, y, _: (
        (1 - z.softmax(1)[torch.arange(len(y)), y]) * F.cross_entropy(z, y, reduction="none")
    ).mean(),
    "another term in training": lambda z, y, module: (
        F.cross_entropy(z, y) + (1e-1 * z.square().mean() if module.training else 0)
    ),
    "nothing": lambda z, y, _: None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_would_not_be_followed_is_refused_on_the_first_batch(name):
    module = WithLoss(REFUSED[name])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"Expected .*loss"):
        make_trainer(solving()).fit(module, make_loader())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert "log" not in vars(module)
    assert "training_step" not in vars(module)
    assert "forward" not in vars(module.blocks["head"])


def test_a_loss_that_changes_in_a_later_epoch_is_refused():
    def loss(z, y, module):
        return F.cross_entropy(z, y) + (0.1 * z.square().mean() if module.current_epoch == 2 else 0)

    with pytest.raises(MisconfigurationException, match="Expected a loss"):
        make_trainer(solving(freeze_at_epoch=5)).fit(WithLoss(loss), make_loader())


def test_terms_that_the_head_has_no_part_in_do_not_matter():
    module = WithLoss(lambda z, y, module: F.cross_entropy(z, y) + 3 * module.scale.square())
    module.scale = nn.Parameter(torch.ones(()))
    callback = solving()
    with pytest.warns(UserWarning, match="layers outside the head are trained"):
        make_trainer(callback).fit(module, make_loader())
    assert callback.solve_report.reason == "converged"


def test_what_comes_after_the_loss_is_undone_too():
    class Collecting(WithLoss):
        def __init__(self):
            super().__init__(lambda z, y, _: F.cross_entropy(z, y, reduction="none").mean())
            self.losses, self.by_batch, self.steps, self.mean = [], {}, 0, MeanMetric()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.steps += 1
            self.seen += 1
            self.losses.append(loss.item())
            self.by_batch[len(self.losses)] = batch_idx
            # A metric whose state has a graph.
            self.mean(loss)
            return loss

    module = Collecting()
    make_trainer(solving()).fit(module, make_loader(), make_loader())
    assert len(module.losses) == len(module.by_batch) == module.steps == int(module.seen) == 5
    assert float(module.mean.weight) == 5


def test_a_head_that_some_batches_do_not_call_is_solved_on_the_others():
    class Alternating(WithLoss):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2:
                return None if batch_idx == 3 else self.other(batch[0]).square().mean()
            return super().training_step(batch, batch_idx)

    module = Alternating(lambda z, y, _: F.cross_entropy(z, y))
    module.other = nn.Linear(FEATURES, 1)
    callback = solving()
    inputs, targets = make_data()
    make_trainer(callback).fit(module, make_loader())
    rows = torch.arange(160) // 32 % 2 == 0
    loss = F.cross_entropy(module(inputs[rows]), targets[rows])
    penalty = L2 / 2 * module.blocks["head"][2].weight.square().sum()
    assert callback.solve_report.loss == pytest.approx((loss + penalty).item(), rel=1e-4)


def test_dropout_after_the_last_linear_does_nothing_in_eval_mode_and_is_no_obstacle():
    head = nn.Sequential(*mlp_head(FEATURES, HIDDEN, CLASSES), nn.Dropout(0.2))
    callback = solving()
    make_trainer(callback).fit(WithLoss(lambda z, y, _: F.cross_entropy(z, y), head), make_loader())
    assert callback.solve_report.loss < callback.solve_report.start_loss


@pytest.mark.parametrize("validate", ["logged", "returned", "in other words", "into a metric"])
def test_validation_targets_are_read_however_the_step_uses_them(validate):
    class Validated(WithLoss):
        def __init__(self):
            super().__init__(lambda z, y, _: F.cross_entropy(z, y))
            self.mean = MeanMetric()

        def validation_step(self, batch, batch_idx):
            z = self(batch[0])
            if validate == "in other words":
                self.log("val_loss", F.nll_loss(z.log_softmax(-1), batch[1]))
            elif validate == "into a metric":
                self.mean.update(F.cross_entropy(z, batch[1], reduction="none").mean())
            else:
                loss = F.cross_entropy(z, batch[1])
                if validate == "returned":
                    return loss
                self.log("val_loss", loss)
            return None

    callback = solving()
    make_trainer(callback).fit(Validated(), make_loader(), make_loader(64))
    assert callback.solve_report.score is not None


def test_validation_that_lightning_has_not_loaded_yet_is_loaded_for_the_solve():
    callback = solving()
    trainer = make_trainer(callback, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    trainer.fit(SomebodysModule(body=False), make_loader(), make_loader(64))
    assert callback.solve_report.score is not None


class Augmented(SomebodysModule):
    """Draws its inputs at random: in the step, or in the hook after the transfer of a batch."""

    def __init__(self, where):
        super().__init__(body=False)
        self.where = where

    def training_step(self, batch, batch_idx):
        inputs = batch[0] + 0.1 * torch.randn_like(batch[0]) if self.where == "step" else batch[0]
        return super().training_step([inputs, batch[1]], batch_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.where == "transfer" and self.trainer.training:
            return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]
        return batch


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, noise, endless=False):
        self.noise, self.endless = noise, endless

    def __iter__(self):
        while True:
            for inputs, target in zip(*make_data(), strict=True):
                yield inputs + self.noise * torch.randn(FEATURES), target
            if not self.endless:
                return


@pytest.mark.parametrize(
    ("where", "noise", "message"),
    [
        ("step", None, "read again"),
        ("transfer", None, "drawn at random"),
        ("nowhere", 0.1, "drawn at random"),
        ("nowhere", 0.0, None),
        ("nowhere", None, None),
    ],
)
def test_inputs_that_are_drawn_at_random_are_noticed_wherever_it_happens(recwarn, where, noise, message):
    loader = make_loader() if noise is None else DataLoader(Streamed(noise), batch_size=32)
    make_trainer(solving()).fit(Augmented(where), loader)
    warned = [str(warning.message) for warning in recwarn if "not fixed" in str(warning.message)]
    assert (message is None and not warned) or (len(warned) == 1 and message in warned[0])


def test_an_endless_stream_is_solved_on_as_many_batches_as_were_trained_on():
    settled = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "min_epochs": 0, "min_steps": 0}
    callback = solving(freeze_at_epoch=None, check_every_n_steps=4, **settled)
    module = SomebodysModule(body=False)
    trainer = make_trainer(callback, max_steps=20, max_epochs=-1)
    trainer.fit(module, DataLoader(Streamed(0.0, endless=True), batch_size=8))
    inputs, targets = (part[:32] for part in make_data())
    loss = F.cross_entropy(module(inputs), targets)
    penalty = L2 / 2 * module.blocks["head"][2].weight.square().sum()
    assert callback.solve_report.loss == pytest.approx((loss + penalty).item(), rel=1e-4)


@pytest.mark.parametrize("which", ["training", "validation"])
def test_several_loaders_are_refused_before_the_first_step(which):
    class Several(SomebodysModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    loaders = {"training": (make_loader(), None), "validation": (None, make_loader())}[which]
    training, validation = ([given, make_loader()] if given else make_loader() for given in loaders)
    trainer = make_trainer(solving())
    with pytest.raises(MisconfigurationException, match=f"Expected one {which} data loader for a solve, but got 2"):
        trainer.fit(Several(body=False), training, validation)
    assert trainer.global_step == 0


def test_a_solve_that_fails_leaves_the_head_as_it_was_before_the_freeze():
    class Failing(StructureFreezeCallback):
        def inputs_and_targets(self, batch, batch_idx, stage, head):
            if self.frozen and batch_idx == 3:
                raise LookupError("no such target")
            return head.read(batch, batch_idx, stage)

    def fit(callback, **options):
        torch.manual_seed(0)
        module = SomebodysModule(body=False)
        trainer = make_trainer(callback, **options)
        return module, trainer

    failed, trainer = fit(Failing(HEAD, freeze_at_epoch=2, solver=LogisticSolver()))
    with pytest.raises(LookupError, match="no such target"):
        trainer.fit(failed, make_loader())
    unfrozen, other = fit(StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0), max_epochs=2)
    other.fit(unfrozen, make_loader())
    assert type(failed.blocks["head"]) is type(unfrozen.blocks["head"])
    assert all(p.requires_grad for p in failed.parameters())
    assert all(torch.equal(value, unfrozen.state_dict()[key]) for key, value in failed.state_dict().items())
    states = (t.optimizers[0].state_dict()["state"] for t in (trainer, other))
    for one, another in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(value, another[key]) for key, value in one.items())


def test_a_head_that_has_become_certain_of_every_sample_trains_on():
    class Steep(WithLoss):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    module = Steep(lambda z, y, _: F.cross_entropy(z, y))
    trainer = make_trainer(solving(freeze_at_epoch=99), max_epochs=31)
    trainer.fit(module, make_loader())
    assert trainer.current_epoch == 31
    inputs, targets = make_data()
    assert F.cross_entropy(module(inputs), targets) < 1e-2


def test_a_head_that_goes_back_after_its_solve_trains_on():
    class Worsening(WithLoss):
        def validation_step(self, batch, batch_idx):
            self.log("worse", float(self.current_epoch))

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*make_data()), batch_size=32, shuffle=True)
    revert = StructureRevert("worse", "min", patience=1)
    trainer = make_trainer(solving(stop_after_solve=False), revert, max_epochs=6)
    trainer.fit(Worsening(lambda z, y, _: F.cross_entropy(z, y)), loader, make_loader(64))
    assert trainer.current_epoch == 6


def test_hooks_of_batches_are_told_the_stage_whose_batches_a_solve_reads():
    stages = {"training": set(), "validation": set()}

    class Told(WithLoss):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if isinstance(self.blocks["head"], GLAIHead) and not self.training:
                stages["training" if len(batch[0]) == 32 else "validation"].add(self.trainer.state.stage.value)
            return batch

    make_trainer(solving(), num_sanity_val_steps=0).fit(
        Told(lambda z, y, _: F.cross_entropy(z, y)), make_loader(), make_loader(20)
    )
    assert [name for name in stages if len(stages[name]) != 1] == []
    assert "train" in stages["training"].pop()
    assert "val" in stages["validation"].pop()
