"""A data module with a cache: the fit is the same, and the backbone sees each sample once."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import make_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from glai_lightning import SimCLRModule, SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.cli.main import main
from glai_lightning.datamodules import ImageFolderDataModule, TextsDataModule, ViewsDataModule

SEEN = []


class Pixels(nn.Module):
    """Sums over small integers: the same to the last bit whatever else is in a batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        SEEN.append(len(images))
        return images.flatten(1)[:, :6].float() // 8 * self.scale


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name, low in (("bright", 100), ("dark", 0)):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(low, low + 156, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / name / f"{number}.png")
    return tmp_path


def fit(folder, cache, *callbacks, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    SEEN.clear()
    data = ImageFolderDataModule(folder / "images", batch_size=8, cache=cache, **options)
    module = SupervisedModule(mlp_head(6, 8, 2), Pixels())
    trainer = make_trainer(*callbacks, max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    (tested,) = trainer.test(module, data, verbose=False)
    return module, tested


def test_a_fit_on_cached_embeddings_is_bitwise_one_that_computes_them(folder):
    plain, tested = fit(folder, None)
    assert sum(SEEN) == 4 * (24 + 8) + 8
    cached, tested_cached = fit(folder, folder / "cache")
    # Two batches of each split are looked at first, for inputs and a backbone that are random.
    assert sum(SEEN) == 40 + 3 * 2 * 8
    assert tested == tested_cached
    assert all(map(torch.equal, plain.state_dict().values(), cached.state_dict().values()))
    fit(folder, folder / "cache", StructureFreezeCallback(min_steps=0, freeze_at_epoch=2, one_pass=True))
    assert SEEN == []


def test_a_resumed_fit_caches_the_backbone_of_its_checkpoint(folder):
    class ModelCheckpointOfOtherPixels(ModelCheckpoint):
        def on_fit_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.backbone.scale.fill_(2.0)

    checkpoint = ModelCheckpointOfOtherPixels(folder, "{epoch}", save_top_k=-1)
    straight, _ = fit(folder, folder / "cache", checkpoint)
    resumed, _ = fit(folder, folder / "cache", ckpt_path=folder / "epoch=1.ckpt")
    assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))


def test_what_cannot_be_cached_is_refused(folder):
    with pytest.raises(ValueError, match="augmented at random"):
        fit(folder, folder / "cache", transform=v2.RandomHorizontalFlip(0.5))
    data = ImageFolderDataModule(folder / "images", cache=folder / "cache")
    with pytest.raises(ValueError, match="a `HeadModule` with a frozen backbone"):
        make_trainer().fit(SupervisedModule(mlp_head(6, 8, 2), Pixels(), freeze_backbone=False), data)
    (folder / "texts.csv").write_text("text,label\n" + "a,b\nc,d\n" * 5)
    with pytest.raises(TypeError, match="Expected `cache` to be the path of a folder, but got 3"):
        TextsDataModule(folder / "texts.csv", cache=3)


def test_the_command_fills_lists_and_prunes(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    configuration = ["--model=glai_lightning.SupervisedModule", "--model.backbone=test_cached.Pixels"]
    configuration += ["--model.head=glai_lightning.mlp_head", "--model.head.in_features=6"]
    configuration += ["--model.head.hidden_features=8", "--model.head.out_features=2"]
    configuration += ["--data=ImageFolderDataModule", "--data.root=images", "--data.cache=cache"]
    assert main(["cache", *configuration]) == 0
    (made,) = Path("cache").iterdir()
    assert f"Cached in cache/{made.name}" in capsys.readouterr().out
    assert not Path("lightning_logs").exists()
    Path("cache", "mine").mkdir()
    torn = Path("cache", "0" * 32)
    torn.mkdir()
    (torn / "x_train-00000.npy").write_bytes(b"")
    for file in (torn, torn / "x_train-00000.npy"):
        os.utime(file, (0, 0))
    assert main(["cache", "--list", "cache"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [made.name in listed[0], "not complete" in listed[1], len(listed)] == [True, True, 2]
    assert main(["cache", "--prune", "cache", "--days", "2"]) == 0
    assert not torn.exists()
    assert made.exists()
    assert Path("cache", "mine").exists()


class Brightness(nn.Module):
    def forward(self, views):
        SEEN.append(len(views))
        return views.flatten(1)[:, :5]


def brighter(image):
    return image + torch.rand(())


def fit_views(cache, labels, *, ckpt_path=None, callbacks=(), max_epochs=3):
    SEEN.clear()
    seed_everything(0, verbose=False)
    samples = [torch.arange(6.0) + number for number in range(20)]
    data = ViewsDataModule(
        dataset=list(zip(samples, range(20), strict=True)) if labels else samples,
        transform=brighter,
        batch_size=8,
        test_fraction=0.2,
        cache=cache,
        cached_views=4,
    )
    module = SimCLRModule(mlp_head(5, 8, 3), Brightness(), knn_neighbors=1 if labels else None)
    trainer = make_trainer(*callbacks, max_epochs=max_epochs, num_sanity_val_steps=0)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    (tested,) = trainer.test(module, data, verbose=False)
    return module, tested, data


@pytest.mark.parametrize("labels", [True, False])
def test_views_are_drawn_and_embedded_once_and_read_by_turns(tmp_path, labels):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    straight, tested, data = fit_views(tmp_path / "cache", labels, callbacks=[checkpoint])
    # Four views of 12 samples, two of 4 and 4; and two batches of each split that are looked at first.
    assert sum(SEEN) == 4 * 12 + 2 * (4 + 4) + 2 * 2 * (8 + 4 + 4)
    rows = data._rows_of("train")
    seen = []
    for epoch in range(6):
        rows.set_epoch(epoch)
        views, numbers = rows[torch.arange(12)]
        shift = views.values - torch.arange(5.0) - (0 if numbers is None else numbers[:, None])
        assert torch.allclose(shift, shift[..., :1], atol=1e-5)
        seen.append(views.values[..., 0])
    assert len(torch.cat(seen)[:, 0].unique()) == 4
    rerun, tested_again, _ = fit_views(tmp_path / "cache", labels, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert SEEN == []
    assert tested_again == tested
    assert all(map(torch.equal, straight.state_dict().values(), rerun.state_dict().values()))


@pytest.mark.parametrize("views", [2, 5])
def test_views_of_a_cache_are_several_draws(tmp_path, views):
    with pytest.raises(ValueError, match="Expected `cached_views` to be a multiple of `num_views`"):
        ViewsDataModule(dataset=[torch.zeros(2)] * 9, transform=brighter, cache=tmp_path, cached_views=views)
