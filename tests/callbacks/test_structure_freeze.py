import copy
import itertools
import pickle

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from glai_lightning import GLAIHead, activation_patterns, mlp_head, pattern_churn
from glai_lightning.callbacks import StructureFreezeCallback

PATHS = ("output", "tangent", "independent")
PATH_PARAMETERS = ["blocks.head.2.path_weights", "blocks.head.2.path_biases_0", "blocks.head.2.bias"]


class Observer(Callback):
    """Notes, at the end of every epoch, what a user could see."""

    def __init__(self):
        self.frozen, self.heads, self.metrics, self.rates = [], [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        head = pl_module.blocks["head"]
        self.frozen.append(isinstance(head, GLAIHead))
        self.heads.append(copy.deepcopy(head))
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(callback, module=None, max_epochs=6, extra=None, **options):
    module = SomebodysModule() if module is None else module
    observer = Observer()
    callbacks = [callback, observer, *([] if extra is None else [extra])]
    trainer = make_trainer(*callbacks, max_epochs=max_epochs, **options)
    trainer.fit(module, make_loader())
    return module, trainer, observer


def test_a_head_that_settles_is_frozen_in_the_next_epoch():
    callback = StructureFreezeCallback(HEAD, churn_tolerance=1.0, relative_tolerance=0.6, solver=None, min_steps=0)
    module, _, observer = fit(callback, max_epochs=12)
    assert callback.frozen
    settled = len(callback.churn_history)
    assert callback.freeze_epoch == settled
    assert observer.frozen == [False] * settled + [True] * (12 - settled)
    assert callback.churn_history[-1] <= 0.6 * max(callback.churn_history)
    assert isinstance(module.blocks["head"], GLAIHead)
    assert "of the largest" in callback.freeze_reason


def test_churn_is_that_of_the_snapshot_and_the_head_on_the_last_training_inputs():
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, probe_size=50, solver=None, min_steps=0)
    module = SomebodysModule(body=False)
    before_fit = copy.deepcopy(module.blocks["head"])
    module, _, observer = fit(callback, module, max_epochs=3)
    last_inputs = torch.tanh(make_data()[0])[-50:]
    heads = [before_fit, *observer.heads]
    expected = [
        pattern_churn(activation_patterns(old, last_inputs), activation_patterns(new, last_inputs)).item()
        for old, new in itertools.pairwise(heads)
    ]
    assert callback.churn_history == pytest.approx(expected)
    assert expected[0] > 0


def test_a_fit_that_does_not_settle_stays_an_mlp_and_says_so(caplog):
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0)
    with caplog.at_level("INFO"):
        module, _, _ = fit(callback)
    assert not callback.frozen
    assert callback.freeze_epoch is None
    assert type(module.blocks["head"]) is nn.Sequential
    assert "did not settle" in caplog.text
    assert not module.blocks["head"]._forward_pre_hooks


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_freeze_at_epoch_is_the_first_epoch_that_trains_frozen(epoch):
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=epoch, churn_tolerance=0.0, solver=None)
    _, _, observer = fit(callback, max_epochs=5)
    assert callback.freeze_epoch == epoch
    assert observer.frozen == [False] * epoch + [True] * (5 - epoch)


def test_patience_and_min_epochs_delay_the_freeze():
    common = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "min_steps": 0, "solver": None}
    for options, expected in (({}, 1), ({"patience": 3}, 3), ({"min_epochs": 4}, 4)):
        callback = StructureFreezeCallback(HEAD, **common, **options)
        fit(callback, max_epochs=6)
        assert callback.freeze_epoch == expected


def test_the_three_keys_are_logged_in_every_epoch(tmp_path):
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=2, solver=None)
    logger = CSVLogger(tmp_path)
    _, _, observer = fit(callback, max_epochs=4, logger=logger, log_every_n_steps=1)
    assert [metrics["structure/frozen"] for metrics in observer.metrics] == [0, 0, 1, 1]
    assert [metrics["structure/freeze_epoch"] for metrics in observer.metrics] == [-1, -1, 2, 2]
    assert [metrics["structure/churn"] for metrics in observer.metrics[:2]] == pytest.approx(callback.churn_history)
    assert [metrics["structure/churn"] for metrics in observer.metrics[2:]] == [0, 0]
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"structure/churn", "structure/frozen", "structure/freeze_epoch"} <= set(header.split(","))
    assert len([row for row in rows if row.split(",")[header.split(",").index("structure/churn")]]) == 4


def test_output_paths_change_no_key_no_group_and_no_learning_rate():
    module = SomebodysModule()
    keys, names = list(module.state_dict()), {name: id(p) for name, p in module.named_parameters()}
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=2, solver=None)
    module, trainer, observer = fit(callback, module)
    assert list(module.state_dict()) == keys
    assert {name: id(p) for name, p in module.named_parameters()} == names
    optimizer = trainer.optimizers[0]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [names["blocks.head.0.weight"]],
        [names[n] for n in keys if n != "blocks.head.0.weight"],
    ]
    _, _, undisturbed = fit(StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0))
    assert observer.rates == undisturbed.rates


def test_frozen_layers_stand_still_and_the_rest_goes_on():
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=2, solver=None)
    module, trainer, observer = fit(callback)
    at_freeze, end = observer.heads[1].state_dict(), module.blocks["head"].state_dict()
    assert torch.equal(at_freeze["0.weight"], end["0.weight"])
    assert torch.equal(at_freeze["0.bias"], end["0.bias"])
    assert not torch.equal(at_freeze["2.weight"], end["2.weight"])
    state = trainer.optimizers[0].state
    assert module.blocks["head"][0].weight not in state
    assert module.blocks["head"][2].weight in state
    assert module.blocks["head"][0].weight.grad is None


def test_weight_decay_does_not_move_frozen_layers_where_gradients_are_zeroed_in_place():
    class ZeroesInPlace(SomebodysModule):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    module, _, observer = fit(StructureFreezeCallback(HEAD, freeze_at_epoch=2, solver=None), ZeroesInPlace())
    assert torch.equal(observer.heads[1].state_dict()["0.weight"], module.blocks["head"][0].weight)


@pytest.mark.parametrize("paths", PATHS)
def test_every_parametrisation_goes_on_learning(paths):
    _, _, observer = fit(StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=1, solver=None))
    losses = [metrics["loss"] for metrics in observer.metrics]
    assert losses[-1] < losses[1] < losses[0]


def test_independent_paths_take_the_place_of_the_last_linear_in_its_group():
    module, trainer, _ = fit(StructureFreezeCallback(HEAD, paths="independent", freeze_at_epoch=2, solver=None))
    optimizer = trainer.optimizers[0]
    names = {id(p): name for name, p in module.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        ["blocks.head.0.weight"],
        ["body.weight", "body.bias", "blocks.head.0.bias", *PATH_PARAMETERS],
    ]
    trained = {names[id(p)] for p in optimizer.state}
    assert trained == {"body.weight", "body.bias"} | {n for n in names.values() if n.startswith("blocks.head.2.")}


@pytest.mark.parametrize("paths", PATHS)
def test_schedulers_go_on_stepping_the_optimizer_that_trains(paths):
    class Module(SomebodysModule):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 1e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=30)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = make_trainer(StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=2, solver=None), Rates())
    trainer.fit(Module(), make_loader())
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.Adam([nn.Parameter(torch.zeros(1))]), 1e-2, total_steps=30
    )
    expected = []
    for _ in range(29):
        reference.optimizer.step()
        reference.step()
        expected.append(reference.get_last_lr()[0])
    assert rates[:29] == pytest.approx(expected)


class OutputsAtStart(Callback):
    """Keeps the outputs in eval mode at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch, self.outputs, self.frozen = epoch, None, None

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.eval()
            self.outputs = pl_module(make_data()[0])
            self.frozen = isinstance(pl_module.blocks["head"], GLAIHead)
            pl_module.train()


def test_outputs_do_not_jump_at_the_freeze():
    module = SomebodysModule(mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True, dropout=0.3))
    before, after = OutputsAtStart(2), OutputsAtStart(2)
    make_trainer(before, StructureFreezeCallback(HEAD, freeze_at_epoch=2, solver=None), after).fit(
        module, make_loader()
    )
    assert (before.frozen, after.frozen) == (False, True)
    assert torch.equal(before.outputs, after.outputs)


def test_dropout_inside_is_said_to_be_gone(caplog):
    module = SomebodysModule(mlp_head(FEATURES, HIDDEN, CLASSES, dropout=0.3))
    with caplog.at_level("INFO"):
        fit(StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None), module, max_epochs=2)
    assert "Dropout inside the head is gone" in caplog.text


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_survive_the_freeze(paths, precision):
    module, _, observer = fit(
        StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=1, solver=None), max_epochs=3, precision=precision
    )
    assert observer.frozen == [False, True, True]
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in module.parameters()} == {expected}


@pytest.mark.parametrize("paths", PATHS)
def test_fitting_a_frozen_module_again_leaves_it_frozen(paths):
    callback = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=1, solver=None)
    module, _, _ = fit(callback, max_epochs=3)
    head = module.blocks["head"]

    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    for again in (callback, StructureFreezeCallback(HEAD, paths=paths, churn_tolerance=0.0, solver=None, min_steps=0)):
        trainer = make_trainer(again, max_epochs=2)
        trainer.fit(module, make_loader())
        assert module.blocks["head"] is head
        assert again.frozen
        assert again.freeze_epoch == 1


def test_the_same_callback_starts_over_with_another_module():
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    fit(callback, max_epochs=2)
    _, _, observer = fit(callback, max_epochs=3)
    assert observer.frozen == [False, True, True]
    assert len(callback.churn_history) == 1


def test_freeze_and_unfreeze_between_fits():
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0)
    module, _, _ = fit(callback, max_epochs=1)
    x = make_data()[0]
    before = module(x)
    callback.freeze()
    assert callback.frozen
    assert torch.equal(module(x), before)
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == [
        f"{HEAD}.0.weight",
        f"{HEAD}.0.bias",
    ]
    _, _, observer = fit(callback, module, max_epochs=2)
    assert observer.frozen == [True, True]
    before = module(x)
    callback.unfreeze()
    assert not callback.frozen
    assert type(module.blocks["head"]) is nn.Sequential
    assert torch.equal(module(x), before)
    assert all(p.requires_grad for p in module.parameters())
    _, _, observer = fit(callback, module, max_epochs=2)
    assert observer.frozen == [False, False]


def test_freeze_and_unfreeze_are_refused_while_a_fit_runs():
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0)

    class InTheMiddle(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            callback.freeze()

    with pytest.raises(MisconfigurationException, match="Expected no fit to be running"):
        fit(callback, extra=InTheMiddle())
    callback.freeze()
    assert callback.frozen


def test_a_callback_pickles_after_a_fit():
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    fit(callback, max_epochs=2)
    assert pickle.loads(pickle.dumps(callback)).freeze_epoch == 1


class Endless(IterableDataset):
    def __iter__(self):
        return zip(*make_data(), strict=True)


def test_data_without_a_length_is_watched():
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0)
    make_trainer(callback, max_epochs=2).fit(SomebodysModule(), DataLoader(Endless(), batch_size=32))
    assert len(callback.churn_history) == 2


def test_weights_that_are_not_finite_do_not_settle():
    class Diverging(SomebodysModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=float("inf"))

    callback = StructureFreezeCallback(HEAD, solver=None, min_steps=0)
    with pytest.warns(UserWarning, match="not finite"):
        fit(callback, Diverging(), max_epochs=4)
    assert not callback.frozen


def test_a_resume_that_asks_for_other_paths_says_that_they_stay():
    module, _, _ = fit(StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None), max_epochs=2)
    with pytest.warns(UserWarning, match="frozen with 'independent' paths, but got one that was frozen with 'output'"):
        fit(StructureFreezeCallback(HEAD, paths="independent", solver=None, min_steps=0), module, max_epochs=1)


def test_freeze_by_hand_needs_a_fit_before():
    with pytest.raises(MisconfigurationException, match="part of a fit"):
        StructureFreezeCallback(HEAD, solver=None, min_steps=0).freeze()


def test_sanity_checking_is_not_an_epoch():
    callback = StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0)
    trainer = make_trainer(callback, max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(SomebodysModule(), make_loader(), make_loader())
    assert len(callback.churn_history) == 1


def test_works_under_the_pytorch_lightning_twin():
    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = mlp_head(FEATURES, HIDDEN, CLASSES)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    callback = StructureFreezeCallback(freeze_at_epoch=1, solver=None)
    module = Module()
    trainer = pytorch_lightning.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, make_loader())
    assert callback.frozen
    assert isinstance(module.head, GLAIHead)
    assert float(trainer.callback_metrics["structure/freeze_epoch"]) == 1


class ManualModule(SomebodysModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class UntrainedHead(SomebodysModule):
    def configure_optimizers(self):
        # The inner layer of the head alone, which the freeze would leave with nothing to train.
        return torch.optim.SGD(self.blocks["head"][0].parameters(), 0.1)


class TwoNames(SomebodysModule):
    def __init__(self):
        super().__init__()
        self.projection = self.blocks["head"]


class SharedLayer(SomebodysModule):
    def __init__(self):
        super().__init__()
        self.classifier = self.blocks["head"][2]


def test_an_activation_may_serve_the_head_and_others():
    class Module(SomebodysModule):
        def __init__(self):
            relu = nn.ReLU()
            super().__init__(nn.Sequential(nn.Linear(FEATURES, HIDDEN), relu, nn.Linear(HIDDEN, CLASSES)))
            self.activation = relu

    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    fit(callback, Module(), max_epochs=2)
    assert callback.frozen


class UncalledHead(SomebodysModule):
    def forward(self, x):
        head = self.blocks["head"]
        return head[2](torch.relu(head[0](x)))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (SomebodysModule, "head", r"but got 'head'. Modules that can be used as a head: \['blocks.head'\]"),
        (SomebodysModule, "body", "but got `Linear` with 1 Linear"),
        (
            lambda: SomebodysModule(nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 3))),
            HEAD,
            "Expected an activation before the last Linear",
        ),
        (
            lambda: SomebodysModule(
                nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None), nn.ReLU(), nn.Linear(4, 3))
            ),
            HEAD,
            "momentum=None",
        ),
        (TwoNames, HEAD, r"'blocks.head.0.weight' under 'projection.0.weight' as well"),
        (SharedLayer, HEAD, "'blocks.head.2.weight' under 'classifier.weight' as well"),
        (ManualModule, HEAD, "manual optimization"),
        (UntrainedHead, HEAD, "it holds none of them"),
        (UncalledHead, HEAD, "only modules in it are called"),
    ],
)
def test_modules_that_cannot_be_frozen_are_refused_at_once(make, name, message):
    module = make()
    steps = []
    module.on_train_batch_end = lambda *_: steps.append(1)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(StructureFreezeCallback(name, solver=None, min_steps=0)).fit(module, make_loader())
    assert len(steps) == 0
    assert all(p.requires_grad for p in module.parameters())
    assert not module.blocks["head"]._forward_pre_hooks


def test_too_many_independent_paths_are_refused_before_training_starts():
    module = SomebodysModule(mlp_head(FEATURES, [3000, 1000], CLASSES))
    with pytest.raises(MisconfigurationException, match="but the head has 81,003,003"):
        make_trainer(StructureFreezeCallback(HEAD, paths="independent", solver=None, min_steps=0)).fit(
            module, make_loader()
        )


@pytest.mark.processes
def test_strategies_that_shard_are_refused_by_name():
    from lightning.pytorch.strategies import ModelParallelStrategy

    trainer = make_trainer(StructureFreezeCallback(HEAD, solver=None, min_steps=0), strategy=ModelParallelStrategy())

    class Module(SomebodysModule):
        def configure_model(self):
            pass

    with pytest.raises(MisconfigurationException, match="`ModelParallelStrategy`"):
        trainer.fit(Module(), make_loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": "all"}, "Expected `paths` to be 'output', 'tangent' or 'independent', but got 'all'."),
        ({"churn_tolerance": 1.5}, "Expected `churn_tolerance` to be a finite number in [0, 1], but got 1.5."),
        ({"churn_tolerance": float("nan")}, "Expected `churn_tolerance` to be a finite number in [0, 1], but got nan."),
        ({"relative_tolerance": 0.0}, "Expected `relative_tolerance` to be a finite number in (0, 1], but got 0.0."),
        (
            {"stop_after_solve": torch.zeros(3)},
            "Expected `stop_after_solve` to be True or False, but got tensor([0., 0., 0.]).",
        ),
        ({"patience": 0}, "Expected `patience` to be an integer of at least 1, but got 0."),
        ({"min_epochs": -1}, "Expected `min_epochs` to be an integer of at least 0, but got -1."),
        ({"freeze_at_epoch": -1}, "Expected `freeze_at_epoch` to be an integer of at least 0, but got -1."),
        ({"min_epochs": None}, "Expected `min_epochs` to be an integer of at least 0, but got None."),
        ({"churn_tolerance": "a"}, "Expected `churn_tolerance` to be a number in [0, 1], but got 'a'."),
        (
            {"solver": "ridge"},
            "Expected `solver` to be 'auto', a `LogisticSolver` or a `RidgeSolver`, but got 'ridge'.",
        ),
        ({"probe_size": 0}, "Expected `probe_size` to be an integer of at least 1, but got 0."),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException) as caught:
        StructureFreezeCallback(**arguments)
    assert str(caught.value) == message
