import copy

import pytest
import torch
from fits import CLASSES, FEATURES, make_data, make_loader, make_trainer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from glai_lightning import GLAIHead, HeadSearchModule, SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.fitting.kept_inputs import KeptInputs


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.classes = ["one", "two", "three"]

    def train_dataloader(self):
        return make_loader()

    def val_dataloader(self):
        return make_loader(60)


def make_heads():
    torch.manual_seed(0)
    return {
        "bad": mlp_head(FEATURES, 1, CLASSES),
        "narrow": mlp_head(FEATURES, 8, CLASSES),
        "deep": mlp_head(FEATURES, [16, 8], CLASSES),
    }


@pytest.mark.parametrize("one_pass", [False, True])
def test_each_head_is_solved_and_the_best_is_an_ordinary_checkpoint(tmp_path, capsys, monkeypatch, one_pass):
    kept = []
    rows = KeptInputs.rows
    monkeypatch.setattr(KeptInputs, "rows", lambda self, numbers: (kept.append(self), rows(self, numbers))[1])
    backbone = nn.Linear(FEATURES, FEATURES)
    module = HeadSearchModule(make_heads(), backbone, rates={"deep": 1e-2}, to=str(tmp_path / "best.ckpt"))
    freeze = StructureFreezeCallback("heads.*", min_steps=0, freeze_at_epoch=2, one_pass=one_pass)
    trainer = make_trainer(freeze, max_epochs=6)
    trainer.fit(module, datamodule=Data())
    assert trainer.current_epoch == (1 if one_pass else 2)
    # What all heads are given is held once.
    assert len(set(map(id, kept))) == one_pass
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-3, 1e-3, 1e-2]
    assert all(isinstance(head, GLAIHead) for head in module.heads.values())
    assert all(watch.solve.report is not None for watch in freeze.heads.values())
    assert module.best != "bad"
    (tested,) = trainer.test(module, make_loader(60), verbose=False)
    assert tested["test/accuracy"] == tested[f"test/accuracy/{module.best}"] == module.scores[module.best]
    table = capsys.readouterr().out.split("head  ")[1].splitlines()
    assert table[1].split()[0] == module.best
    assert len(table) == 5
    best = SupervisedModule.load_from_checkpoint(tmp_path / "best.ckpt", backbone=backbone)
    inputs, _ = make_data(60)
    assert torch.equal(best.eval()(inputs), module.eval()(inputs)[module.best])
    assert set(best.predict(inputs).labels) <= {"one", "two", "three"}


def test_heads_trained_together_are_trained_as_if_alone():
    together, alone = HeadSearchModule(make_heads()), HeadSearchModule({"deep": make_heads()["deep"]})
    for module in (together, alone):
        make_trainer(max_epochs=2).fit(module, datamodule=Data())
    pairs = zip(together.heads["deep"].parameters(), alone.heads["deep"].parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


class Seen(Callback):
    """Notes which heads train in each epoch, and what the others are at its end."""

    def __init__(self):
        self.trained, self.weights = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        heads = pl_module.heads.items()
        self.trained.append({name for name, head in heads if any(p.requires_grad for p in head.parameters())})

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: head[0].weight.detach().clone() for name, head in pl_module.heads.items()})


def test_the_worse_half_is_dropped_until_so_many_are_left(tmp_path, capsys):
    heads = {"worst": mlp_head(FEATURES, 1, CLASSES), **make_heads()}
    ends = []
    for resumed in (False, True):
        module = HeadSearchModule(copy.deepcopy(heads), keep=1, to=str(tmp_path / "best.ckpt"))
        freeze, seen = StructureFreezeCallback("heads.*", min_steps=0, freeze_at_epoch=4), Seen()
        trainer = make_trainer(freeze, seen, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=6)
        trainer.fit(module, datamodule=Data(), ckpt_path=tmp_path / "epoch=1.ckpt" if resumed else None)
        assert [len(names) for names in seen.trained] == [1, 1] if resumed else [4, 2, 1, 1]
        assert seen.trained[-1] == {module.best}
        assert (len(module.dropped), trainer.current_epoch) == (3, 4)
        assert isinstance(module.heads[module.best], GLAIHead)
        ends.append(module.state_dict())
        if not resumed:
            for name, epoch in module.dropped.items():
                assert torch.equal(seen.weights[epoch][name], seen.weights[-1][name])
            assert "Dropped after epoch 0: worst" in capsys.readouterr().out

    assert all(torch.equal(*pair) for pair in zip(*(end.values() for end in ends), strict=True))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="Expected `keep` to be an integer of at least 1"):
        HeadSearchModule({"a": mlp_head(2, 2, 2)}, keep=0)
    with pytest.raises(TypeError, match="Expected `heads` to be modules by their names"):
        HeadSearchModule([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="with one number of outputs"):
        HeadSearchModule({"a": mlp_head(2, 2, 2), "b": mlp_head(2, 2, 3)})
    with pytest.raises(ValueError, match=r"Expected `rates` of the heads \['a'\], but got one of 'b'"):
        HeadSearchModule({"a": mlp_head(2, 2, 2)}, rates={"b": 1e-3})
