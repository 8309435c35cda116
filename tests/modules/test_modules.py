import warnings

import pytest
import torch
from fits import CLASSES, FEATURES, HIDDEN, make_data, make_loader, make_trainer
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.regression import r2_score

from glai_lightning import HeadModule, SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import DigitsDataModule


def backbone():
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.Dropout(0.5))


class Modes(Callback):
    def __init__(self):
        self.backbone_trains, self.head_trains = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.backbone_trains.append(any(module.training for module in pl_module.backbone.modules()))
        self.head_trains.append(pl_module.head.training)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_backbone_stays_in_eval_mode_without_gradients_and_another_trains(freeze):
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES), backbone(), freeze_backbone=freeze)
    before = {key: value.clone() for key, value in module.backbone.state_dict().items()}
    modes = Modes()
    trainer = make_trainer(modes, max_epochs=2)
    trainer.fit(module, make_loader(), make_loader())
    unchanged = all(torch.equal(value, before[key]) for key, value in module.backbone.state_dict().items())
    assert unchanged is freeze
    assert set(modes.backbone_trains) == {not freeze}
    assert set(modes.head_trains) == {True}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert any(id(p) in held for p in module.backbone.parameters()) is not freeze


def test_a_frozen_backbone_stays_in_eval_mode_when_somebody_calls_train():
    module = HeadModule(mlp_head(FEATURES, HIDDEN, CLASSES), backbone()).train()
    assert not any(child.training for child in module.backbone.modules())
    assert not module.embeddings(torch.randn(2, FEATURES)).requires_grad


def test_logged_scores_are_those_of_the_whole_epoch():
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES))
    inputs, targets = make_data(150)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, make_loader(), DataLoader(TensorDataset(inputs, targets), batch_size=64))
    logits = module.eval()(inputs)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged["val/loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx(
        multiclass_accuracy(logits, targets, CLASSES, average="micro").item()
    )
    assert logged["val/f1"] == pytest.approx(multiclass_f1_score(logits, targets, CLASSES, average="macro").item())
    assert "train/loss" in logged
    (tested,) = trainer.test(module, DataLoader(TensorDataset(inputs, targets), batch_size=64), verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy", "test/f1"}


@pytest.mark.parametrize("column", [False, True])
def test_regression_scores(column):
    inputs = torch.randn(100, FEATURES)
    targets = inputs[:, :1] * 2 + 1 if column else inputs[:, 0] * 2 + 1
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, 1), task="regression")
    trainer = make_trainer(StructureFreezeCallback(freeze_at_epoch=2, solver=None), max_epochs=4)
    trainer.fit(module, loader, loader)
    predictions = module.eval()(inputs).flatten()
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged["val/mse"] == pytest.approx((predictions - targets.flatten()).square().mean().item(), rel=1e-4)
    assert logged["val/r2"] == pytest.approx(r2_score(predictions, targets.flatten()).item(), rel=1e-4)


def test_predict_gives_logits_with_or_without_targets():
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES)).eval()
    inputs, _ = make_data(64)
    expected = module(inputs)
    for loader in (make_loader(64), DataLoader(inputs, batch_size=32)):
        torch.testing.assert_close(torch.cat(make_trainer().predict(module, loader)), expected)


@pytest.mark.parametrize(
    ("make", "interval", "monitor"),
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 2), "epoch", None),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=10), "step", None),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), "epoch", "val/loss"),
    ],
)
def test_schedulers_are_stepped_as_they_are_meant_to_be(make, interval, monitor):
    head = mlp_head(FEATURES, HIDDEN, CLASSES)
    module = HeadModule(head, optimizer=lambda p: torch.optim.SGD(p, 0.1), lr_scheduler=make)
    config = module.configure_optimizers()["lr_scheduler"]
    assert config["interval"] == interval
    assert config.get("monitor") == monitor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "ranking"}, "Expected `task` to be 'classification' or 'regression', but got 'ranking'."),
        ({"head": mlp_head(4, 8, 1)}, "Expected `num_classes` to be at least 2, but got 1."),
        ({"head": nn.Conv2d(3, 4, 1)}, "Expected `num_classes` to be given for a head whose outputs cannot be read"),
    ],
)
def test_wrong_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match="Expected") as caught:
        SupervisedModule(**{"head": mlp_head(4, 8, 3), **arguments})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 16, 5), "an output for each of the 10 classes of the data, but got 5 outputs"),
        ((60, 16, 10), "to take the 64 features of the data, but got a head for 60"),
    ],
)
def test_a_head_that_does_not_fit_the_data_is_refused_before_training(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(SupervisedModule(mlp_head(*sizes)), DigitsDataModule())


def test_hyper_parameters_are_what_weights_only_loading_can_hold():
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES), optimizer=lambda p: torch.optim.SGD(p, 0.1))
    expected = {"freeze_backbone": True, "standardise_embeddings": True, "num_classes": None, "task": "classification"}
    assert dict(module.hparams) == expected


def test_what_is_meant_is_not_warned_of(monkeypatch):
    # Lightning warns of few workers where there are cores for more.
    monkeypatch.setattr("lightning.fabric.utilities.data._num_cpus_available", lambda: 64)
    backbone = nn.Sequential(nn.Linear(64, FEATURES), nn.ReLU())
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, 10), backbone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        make_trainer(max_epochs=1).fit(module, DigitsDataModule())
        assert list(warnings.filters) == before
    said = [str(warning.message) for warning in caught]
    assert not [message for message in said if "eval mode" in message or "many workers" in message]
