import io

import numpy as np
import pytest
import torch
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_loader, make_trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()


def test_tensorboard_alone_is_shown_units_and_patterns_once_an_epoch(tmp_path):
    module = SomebodysModule(mlp_head(FEATURES, [HIDDEN, 16], CLASSES))
    with torch.no_grad():
        # Of 48 units twelve fire for nothing and six for everything, and they are too far off to learn otherwise.
        module.blocks["head"][0].bias[:12] = -1e3
        module.blocks["head"][0].bias[12:18] = 1e3
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="csv")]
    monitor = StructureMonitor(HEAD)
    make_trainer(monitor, max_epochs=2, logger=loggers).fit(module, make_loader())
    events = events_of(tmp_path / "run")
    assert "unit" not in (tmp_path / "csv" / "metrics.csv").read_text()
    shares = {
        name: [event.value for event in events.Scalars(f"structure/{name}_units")] for name in ("dead", "always_on")
    }
    assert [event.step for event in events.Scalars("structure/dead_units")] == [5, 10]
    assert all(12 / 48 <= share < 30 / 48 for share in shares["dead"])
    assert all(6 / 48 <= share < 24 / 48 for share in shares["always_on"])
    flipped = []
    for number, units in enumerate((HIDDEN, 16)):
        histogram = events.Histograms(f"structure/unit_churn/layer_{number}")[-1].histogram_value
        assert histogram.num == units
        flipped.append(histogram.sum)
        image = events.Images(f"structure/patterns/layer_{number}")[-1]
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        assert pixels.shape == (units, 160, 3)
        # The flips of the map are those of the histogram.
        flips = (pixels == [194, 65, 12]).all(-1) | (pixels == [251, 191, 36]).all(-1)
        assert flips.mean(1).sum() == pytest.approx(histogram.sum, rel=1e-4)
    assert sum(flipped) / 48 == pytest.approx(monitor.churn_history[HEAD][-1], rel=1e-4)
    assert sum(flipped) > 0


def test_heads_are_told_apart_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    freeze = StructureFreezeCallback(HEAD, freeze_at_epoch=9, solver=None)
    make_trainer(freeze, StructureMonitor(["layers.*.ffn", HEAD]), max_epochs=1, logger=logger).fit(
        Transformerish(), make_loader()
    )
    names = ("layers.0.ffn", "layers.1.ffn", HEAD)
    assert set(events_of(tmp_path / "run").Tags()["images"]) == {f"structure/patterns/{name}/layer_0" for name in names}
