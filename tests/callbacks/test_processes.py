import pytest
import torch
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_data, make_trainer
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import GLAIHead, SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback

pytestmark = pytest.mark.processes


class SaveEveryRank(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        freeze = next(c for c in trainer.callbacks if isinstance(c, StructureFreezeCallback))
        torch.save(
            {"weights": pl_module.state_dict(), "epoch": freeze.freeze_epoch, "churn": freeze.churn_history},
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def module_for(body):
    backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) if body else None
    return SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES), backbone, freeze_backbone=False)


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
@pytest.mark.parametrize("body", [True, False], ids=["a trained body", "the head alone"])
def test_two_processes_freeze_together_and_stay_identical(tmp_path, paths, body):
    seed_everything(0, verbose=False)
    module = module_for(body)
    freeze = StructureFreezeCallback(paths=paths, churn_tolerance=1.0, relative_tolerance=0.9)
    loader = DataLoader(TensorDataset(*make_data(160)), batch_size=16, shuffle=True)
    trainer = make_trainer(freeze, SaveEveryRank(tmp_path), max_epochs=8, devices=2, strategy="ddp_fork")
    trainer.fit(module, loader)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["epoch"] == second["epoch"]
    assert 0 < first["epoch"] < 7
    assert first["churn"] == second["churn"]
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    # The module of the process that asked for the fit ends where the others did.
    assert isinstance(module.head, GLAIHead)
    assert module.head.paths == paths
    assert all(torch.equal(value, first["weights"][key]) for key, value in module.state_dict().items())


def test_somebodys_module_is_not_left_with_an_mlp_in_silence():
    trainer = make_trainer(StructureFreezeCallback(HEAD, paths="independent"), devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match="Expected `paths` to be 'output' under a strategy that starts processes"):
        trainer.fit(SomebodysModule(), DataLoader(TensorDataset(*make_data(160)), batch_size=16))
