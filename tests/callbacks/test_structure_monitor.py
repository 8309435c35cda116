import pytest
import torch
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_loader, make_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from glai_lightning import mlp_head
from glai_lightning.callbacks import StructureFreezeCallback, StructureMonitor


class Transformerish(SomebodysModule):
    """Two feed-forward blocks below a glob, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"ffn": mlp_head(FEATURES, 16, FEATURES)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["ffn"](x)
        return super().forward(x)


def test_it_watches_every_module_that_a_glob_matches():
    monitor = StructureMonitor(["layers.*.ffn", HEAD])
    trainer = make_trainer(monitor, max_epochs=3)
    trainer.fit(Transformerish(), make_loader())
    assert list(monitor.churn_history) == ["layers.0.ffn", "layers.1.ffn", HEAD]
    assert all(len(history) == 3 and max(history) > 0 for history in monitor.churn_history.values())
    for name, history in monitor.churn_history.items():
        assert float(trainer.callback_metrics[f"structure/churn/{name}"]) == pytest.approx(history[-1])


def test_it_measures_what_the_freeze_callback_measures_and_changes_nothing():
    monitor, freeze = (
        StructureMonitor(HEAD),
        StructureFreezeCallback(HEAD, churn_tolerance=0.0, solver=None, min_steps=0),
    )
    module = SomebodysModule()
    make_trainer(monitor, freeze, max_epochs=3).fit(module, make_loader())
    assert monitor.churn_history[HEAD] == freeze.churn_history
    assert type(module.blocks["head"]) is nn.Sequential
    assert not module.blocks["head"]._forward_pre_hooks


def test_one_module_named_outright_is_logged_without_its_name():
    trainer = make_trainer(StructureMonitor(HEAD), max_epochs=1)
    trainer.fit(SomebodysModule(), make_loader())
    assert "structure/churn" in trainer.callback_metrics


def test_a_head_that_another_callback_freezes_no_longer_churns():
    monitor, freeze = StructureMonitor(HEAD), StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    make_trainer(freeze, monitor, max_epochs=3).fit(SomebodysModule(), make_loader())
    assert monitor.churn_history[HEAD][1:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("nothing.*", r"but got 'nothing.\*'. Modules that can be used as a head: \['blocks.head'\]"),
        ("body", "`Linear`"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_training(modules, message):
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(StructureMonitor(modules)).fit(SomebodysModule(), make_loader())


def test_probe_size_below_one_is_refused():
    with pytest.raises(
        MisconfigurationException, match="Expected `probe_size` to be an integer of at least 1, but got 0"
    ):
        StructureMonitor(HEAD, probe_size=0)


def test_frozen_heads_can_be_watched_too():
    module = SomebodysModule(mlp_head(FEATURES, HIDDEN, CLASSES))
    make_trainer(StructureFreezeCallback(HEAD, freeze_at_epoch=0, solver=None), max_epochs=1).fit(module, make_loader())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    monitor = StructureMonitor(HEAD)
    make_trainer(monitor, max_epochs=2).fit(module, make_loader())
    assert monitor.churn_history[HEAD] == [0.0, 0.0]
