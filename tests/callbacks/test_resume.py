import subprocess
import sys

import pytest
import torch
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_loader, make_trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from glai_lightning import GLAIHead, SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule

PATHS = ("output", "tangent", "independent")
EPOCHS = 5


def make_features():
    inputs, targets = make_data(200)
    arrays = {"x_train": inputs[:170], "y_train": targets[:170], "x_test": inputs[170:], "y_test": targets[170:]}
    return FeaturesDataModule(arrays=arrays, batch_size=32, seed=3)


def somebodys_module():
    seed_everything(5, verbose=False)
    return SomebodysModule()


def our_module():
    seed_everything(5, verbose=False)
    return SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True))


class MetricsPerEpoch(Callback):
    def __init__(self):
        self.metrics = {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics[trainer.current_epoch] = {k: float(v) for k, v in trainer.callback_metrics.items()}


def run(make_module, freeze, checkpoints=None, ckpt_path=None, data=None):
    module, metrics = make_module(), MetricsPerEpoch()
    callbacks = [callback for callback in (freeze, metrics, checkpoints) if callback is not None]
    trainer = make_trainer(*callbacks, max_epochs=EPOCHS)
    trainer.fit(module, datamodule=data or make_features(), ckpt_path=ckpt_path)
    return module, trainer, metrics.metrics


def assert_same_end(run_a, run_b):
    (module_a, trainer_a, metrics_a), (module_b, trainer_b, metrics_b) = run_a, run_b
    state_a, state_b = module_a.state_dict(), module_b.state_dict()
    assert list(state_a) == list(state_b)
    assert all(torch.equal(value, state_b[key]) for key, value in state_a.items())
    optimizer_a, optimizer_b = (trainer.optimizers[0].state_dict() for trainer in (trainer_a, trainer_b))
    assert optimizer_a["param_groups"] == optimizer_b["param_groups"]
    assert optimizer_a["state"].keys() == optimizer_b["state"].keys()
    for position, entries in optimizer_a["state"].items():
        assert all(torch.equal(value, optimizer_b["state"][position][key]) for key, value in entries.items())
    grads_a, grads_b = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (module_a, module_b))
    assert grads_a == grads_b
    whole_epochs = sorted(metrics_b)[1:]
    assert [metrics_a[epoch] for epoch in whole_epochs] == [metrics_b[epoch] for epoch in whole_epochs]


@pytest.mark.parametrize("paths", PATHS)
def test_our_module_resumes_a_frozen_fit_without_the_callback(tmp_path, paths):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole = run(our_module, StructureFreezeCallback(paths=paths, freeze_at_epoch=2, solver=None), checkpoints)
    module, trainer, _ = run(our_module, None, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert isinstance(module.head, GLAIHead)
    assert_same_end(whole, (module, trainer, {}))


@pytest.fixture(params=PATHS)
def frozen_fit(request, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    freeze = StructureFreezeCallback(paths=request.param, freeze_at_epoch=2, solver=None)
    module, trainer, _ = run(our_module, freeze, checkpoints)
    return module.eval(), trainer, freeze, tmp_path


def test_checkpoints_are_read_with_weights_only(frozen_fit):
    *_, folder = frozen_fit
    for file in folder.glob("*.ckpt"):
        assert "state_dict" in torch.load(file, weights_only=True)


def test_load_from_checkpoint_gives_the_frozen_head(frozen_fit):
    module, _, freeze, folder = frozen_fit
    loaded = SupervisedModule.load_from_checkpoint(
        folder / "epoch=4.ckpt", head=mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True)
    ).eval()
    x = make_data()[0]
    assert loaded.head.paths == freeze.paths
    assert loaded.head.freeze_epoch == 2
    assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("run_name", ["validate", "test", "predict"])
def test_evaluation_needs_no_callback_and_reads_both_sides_of_the_freeze(frozen_fit, run_name):
    *_, folder = frozen_fit
    for epoch, frozen in ((1, False), (4, True)):
        fresh = our_module()
        trainer = make_trainer()
        result = getattr(trainer, run_name)(fresh, datamodule=make_features(), ckpt_path=folder / f"epoch={epoch}.ckpt")
        assert isinstance(fresh.head, GLAIHead) is frozen
        assert result


def test_a_checkpoint_from_before_the_freeze_loads_into_the_frozen_module(frozen_fit):
    module, trainer, freeze, folder = frozen_fit
    early = our_module()
    early.load_state_dict(torch.load(folder / "epoch=1.ckpt", weights_only=True)["state_dict"])
    (expected,) = make_trainer().test(early, datamodule=make_features(), verbose=False)
    (result,) = trainer.test(module, datamodule=make_features(), ckpt_path=folder / "epoch=1.ckpt", verbose=False)
    assert result == pytest.approx(expected, rel=1e-5)
    assert freeze.frozen
    assert freeze.freeze_epoch == 2


def test_the_callback_rebuilds_the_head_of_somebodys_module_for_a_test(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    freeze = StructureFreezeCallback(HEAD, paths="independent", freeze_at_epoch=2, solver=None)
    module, trainer, _ = run(somebodys_module, freeze, checkpoints)
    (expected,) = trainer.test(module, datamodule=make_features(), verbose=False)
    fresh = somebodys_module()
    again = make_trainer(StructureFreezeCallback(HEAD, paths="independent", solver=None, min_steps=0))
    (result,) = again.test(fresh, datamodule=make_features(), ckpt_path=tmp_path / "epoch=4.ckpt", verbose=False)
    assert result == expected


def test_weights_only_checkpoints_carry_the_structure(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_weights_only=True)
    module, *_ = run(
        our_module, StructureFreezeCallback(paths="independent", freeze_at_epoch=2, solver=None), checkpoints
    )
    fresh = our_module()
    fresh.load_state_dict(torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)["state_dict"])
    x = make_data()[0]
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_fitting_a_loaded_frozen_module_and_resuming_that_fit(frozen_fit, tmp_path):
    *_, folder = frozen_fit

    def loaded():
        head = mlp_head(FEATURES, HIDDEN, CLASSES, batch_norm=True)
        return SupervisedModule.load_from_checkpoint(folder / "epoch=4.ckpt", head=head)

    second = tmp_path / "second"
    checkpoints = ModelCheckpoint(second, save_top_k=-1, filename="{epoch}")
    whole = run(loaded, StructureFreezeCallback(paths=loaded().head.paths, solver=None, min_steps=0), checkpoints)
    resumed = run(
        our_module,
        StructureFreezeCallback(paths=loaded().head.paths, solver=None, min_steps=0),
        ckpt_path=second / "epoch=1.ckpt",
    )
    assert_same_end(whole, resumed)


WITHOUT_THE_PACKAGE = f"""
import sys
sys.modules["glai_lightning"] = None
import torch
from torch import nn
checkpoint = torch.load(sys.argv[1], weights_only=True)["state_dict"]
head = nn.Sequential(nn.Linear({FEATURES}, {HIDDEN}), nn.ReLU(), nn.Linear({HIDDEN}, {CLASSES}))
prefix = "blocks.head."
head.load_state_dict({{k.removeprefix(prefix): v for k, v in checkpoint.items() if k.startswith(prefix)}})
with torch.no_grad():
    for parameter in head.parameters():
        parameter.mul_(0.5)
torch.save(head.state_dict(), sys.argv[2])
"""


def test_output_paths_load_strictly_into_the_plain_mlp_without_this_package_and_back(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="last")
    module, *_ = run(somebodys_module, StructureFreezeCallback(HEAD, freeze_at_epoch=2, solver=None), checkpoints)
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "last.ckpt"), str(tmp_path / "plain.pt")]
    subprocess.run(command, check=True)
    halved = torch.load(tmp_path / "plain.pt", weights_only=True)
    module.blocks["head"].load_state_dict(halved, strict=True)
    plain = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    plain.load_state_dict(halved, strict=True)
    x = make_data()[0]
    assert torch.equal(module.blocks["head"](x), plain(x))


def test_a_checkpoint_of_another_size_is_refused_with_the_model_as_it_was(frozen_fit):
    *_, folder = frozen_fit
    wide = SupervisedModule(mlp_head(FEATURES, HIDDEN + 1, CLASSES, batch_norm=True))
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    checkpoint = torch.load(folder / "epoch=4.ckpt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(32, 8\) as `head.0.weight` instead of"):
        wide.load_state_dict(checkpoint["state_dict"])
    assert type(wide.head) is nn.Sequential
    assert all(torch.equal(value, before[key]) for key, value in wide.state_dict().items())
    with pytest.raises(RuntimeError, match="instead of a tensor of shape"):
        run(lambda: wide, StructureFreezeCallback(solver=None, min_steps=0), ckpt_path=folder / "epoch=4.ckpt")


def test_somebodys_plain_loader_meets_the_frozen_fit_too(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    freeze = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None)
    module = somebodys_module()
    make_trainer(freeze, checkpoints, max_epochs=4).fit(module, make_loader())
    resumed = somebodys_module()
    trainer = make_trainer(StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None), max_epochs=4)
    trainer.fit(resumed, make_loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in module.state_dict().items())


def test_without_the_callback_somebodys_module_goes_on_as_the_mlp_and_is_told_of_the_callback(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    frozen, *_ = run(somebodys_module, StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None), checkpoints)
    with pytest.warns(UserWarning, match="Please add the following callbacks: .*StructureFreezeCallback"):
        module, *_ = run(somebodys_module, None, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert type(module.blocks["head"]) is nn.Sequential
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not torch.equal(module.blocks["head"][0].weight, frozen.blocks["head"][0].weight)


@pytest.mark.parametrize(("paths", "key"), [("tangent", "freeze_reference"), ("independent", "path_weights")])
def test_without_the_callback_somebodys_module_refuses_what_is_no_mlp(tmp_path, paths, key):
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    run(somebodys_module, StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=1, solver=None), checkpoints)
    with pytest.raises(RuntimeError, match=key):
        run(somebodys_module, None, ckpt_path=tmp_path / "epoch=2.ckpt")
