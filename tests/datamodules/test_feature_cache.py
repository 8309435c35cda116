"""A frozen backbone reads the data once: what is cached is what it would compute now, and nothing else is read."""

import errno
import os
import threading

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import make_trainer
from PIL import Image
from process_groups import run_in_processes
from text_encoders import write_encoder, write_sentence_encoder
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torchvision.transforms import v2

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.backbones import (
    SentenceTransformersBackbone,
    TimmBackbone,
    TorchvisionBackbone,
    TransformersBackbone,
)
from glai_lightning.datamodules import (
    DigitsDataModule,
    FeaturesDataModule,
    ImageFolderDataModule,
    TextsDataModule,
    feature_cache,
)

#: Samples that backbones were given, and after how many they fail.
SEEN, FAIL_AFTER = [], []


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "_ROWS", 8)
    SEEN.clear()
    FAIL_AFTER.clear()


class Backbone(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        self.layers = nn.Sequential(*layers)
        self.scale = scale
        self.requires_grad_(False).eval()

    def forward(self, images):
        if FAIL_AFTER and sum(SEEN) >= FAIL_AFTER[0]:
            raise RuntimeError("cut")
        SEEN.append(len(images))
        return self.layers(self.scale * images.float() / 255)


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for image in range(20):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / name / f"{image:02}.png")
    return tmp_path / "images"


def images_of(root, **options):
    return ImageFolderDataModule(root, **({"batch_size": 4} | options))


def cached(datamodule, backbone, folder, **options):
    return FeaturesDataModule.from_backbone(datamodule, backbone, cache_dir=folder, progress_bar=False, **options)


def folders(path):
    return sorted(folder.name for folder in path.iterdir())


def test_a_fit_on_cached_features_equals_one_that_computes_them(root, tmp_path):
    def fit(backbone, data):
        torch.manual_seed(1)
        # Embeddings of a backbone in the loop would be standardised by the first batch, those of a cache by all rows.
        module = SupervisedModule(mlp_head(24, 16, 2), backbone, standardise_embeddings=False)
        trainer = make_trainer(max_epochs=3)
        trainer.fit(module, data)
        return module.head.state_dict(), trainer.callback_metrics

    weights, scores = fit(Backbone(), images_of(root))
    data = cached(images_of(root), Backbone(), tmp_path / "cache")
    same_weights, same_scores = fit(None, data)
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert scores == same_scores
    assert (data.classes, data.num_classes) == (["cat", "dog"], 2)


def features_of(data):
    return {split: data.splits[split][torch.arange(len(data.splits[split]))] for split in data.splits}


def assert_same(one, other):
    for split, batch in features_of(one).items():
        assert all(torch.equal(part, same) for part, same in zip(batch, features_of(other)[split], strict=True))


def test_the_backbone_reads_every_sample_once_and_nothing_of_a_cache_that_is_there(root, tmp_path):
    first = cached(images_of(root), Backbone(), tmp_path / "cache")
    # The first batch of each of the three splits is read twice, to see that it is the same.
    assert sum(SEEN) == 40 + 3 * 2 * 4
    SEEN.clear()
    second = cached(images_of(root), Backbone(), tmp_path / "cache")
    assert SEEN == []
    assert_same(first, second)


def test_a_fill_that_was_cut_computes_only_what_is_missing(root, tmp_path):
    whole = cached(images_of(root), Backbone(), tmp_path / "whole")
    for fail_after in (10, 30, 36):
        SEEN.clear()
        FAIL_AFTER[:] = [fail_after]
        with pytest.raises(RuntimeError, match="cut"):
            cached(images_of(root), Backbone(), tmp_path / "cut")
    (folder,) = (tmp_path / "cut").iterdir()
    there = sum(len(np.load(file)) for file in folder.glob("x_*.npy"))
    assert not (folder / "manifest.json").exists()
    SEEN.clear()
    FAIL_AFTER.clear()
    resumed = cached(images_of(root), Backbone(), tmp_path / "cut")
    assert there > 0
    assert sum(SEEN) == 40 - there + 3 * 2 * 4
    assert_same(whole, resumed)


class OtherForward(Backbone):
    def forward(self, images):
        return super().forward(images) + 1


def other_weight(root):
    backbone = Backbone()
    backbone.layers[0].weight[0, 0, 0, 0] += 1e-3
    return images_of(root), backbone


def other_buffer(root):
    backbone = Backbone()
    backbone.layers[1].running_mean[0] += 1
    return images_of(root), backbone


def other_setting(root):
    return images_of(root), Backbone(scale=2.0)


def other_hyperparameter(root):
    backbone = Backbone()
    backbone.layers[1].eps = 1e-2
    return images_of(root), backbone


def other_dtype(root):
    return images_of(root), Backbone().to(torch.float32).bfloat16().float()


def other_code(root):
    return images_of(root), OtherForward()


def other_transform(root):
    return images_of(root, transform=v2.Resize([8, 8])), Backbone()


def other_split(root):
    return images_of(root, seed=1), Backbone()


def other_file(root):
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "00.png")
    return images_of(root), Backbone()


CHANGES = [
    other_weight,
    other_buffer,
    other_setting,
    other_hyperparameter,
    other_dtype,
    other_code,
    other_transform,
    other_split,
    other_file,
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_no_stale_row_is_read(root, tmp_path, change):
    cached(images_of(root), Backbone(), tmp_path / "cache")
    before = folders(tmp_path / "cache")
    SEEN.clear()
    data = cached(*change(root), tmp_path / "cache")
    assert sum(SEEN) >= 40
    assert len(folders(tmp_path / "cache")) == len(before) + 1
    assert_same(data, cached(*change(root), tmp_path / "other"))


def test_tensors_and_texts_count_by_their_content(tmp_path):
    backbone = nn.Linear(64, 3).requires_grad_(False).eval()
    for seed in (0, 0, 1):
        cached(DigitsDataModule(seed=seed), backbone, tmp_path / "digits")
    assert len(folders(tmp_path / "digits")) == 2


class Lengths(nn.Module):
    def forward(self, texts):
        return torch.tensor([[float(len(text)), text.count("a")] for text in texts])


def test_texts_are_embedded(tmp_path):
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"{'ab' * n},{n % 2}\n" for n in range(1, 31)))
    data = cached(TextsDataModule(tmp_path / "texts.csv", batch_size=4), Lengths().eval(), tmp_path / "cache")
    assert (data.num_features, data.classes) == (2, ["0", "1"])


@pytest.mark.parametrize("kind", ["transformers", "sentence-transformers", "timm", "torchvision"])
def test_backbones_of_the_real_libraries_are_told_apart_by_their_weights(root, tmp_path, kind):
    encoder = write_encoder(tmp_path / "encoder")
    (tmp_path / "texts.csv").write_text("text,label\n" + "good film,1\nvery bad,0\n" * 10)
    make, data = {
        "transformers": (lambda: TransformersBackbone(str(encoder)), lambda: TextsDataModule(tmp_path / "texts.csv")),
        "sentence-transformers": (
            lambda: SentenceTransformersBackbone(str(write_sentence_encoder(tmp_path / "sentences", encoder))),
            lambda: TextsDataModule(tmp_path / "texts.csv"),
        ),
        "timm": (lambda: TimmBackbone("test_resnet", pretrained=False), lambda: images_of(root)),
        "torchvision": (lambda: TorchvisionBackbone("mobilenet_v3_small", pretrained=False), lambda: images_of(root)),
    }[kind]

    def frozen(seed, change=0.0):
        torch.manual_seed(seed)
        backbone = make().requires_grad_(False).eval()
        next(backbone.parameters()).add_(change)
        return backbone

    for change in (0.0, 0.0, 1e-3):
        cached(data(), frozen(0, change), tmp_path / "cache")
    assert len(folders(tmp_path / "cache")) == 2


class SomebodysData(pl.LightningDataModule):
    def __init__(self, dataset=None, **options):
        super().__init__()
        self.options = {"batch_size": 5, "shuffle": True} | options
        self.dataset = (
            TensorDataset(torch.arange(90.0).reshape(30, 3), torch.arange(30) % 3) if dataset is None else dataset
        )

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.options)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=5)


class Double(nn.Module):
    def forward(self, inputs):
        return 2 * inputs


def from_datasets():
    dataset = SomebodysData().dataset
    return pl.LightningDataModule.from_datasets(dataset, dataset, batch_size=5)


@pytest.mark.parametrize("make", [SomebodysData, from_datasets])
def test_data_modules_of_other_people_are_cached(tmp_path, make):
    data = cached(make(), Double().eval(), tmp_path)
    inputs, labels = data.splits.train
    assert torch.equal(inputs, 2 * torch.arange(90.0).reshape(30, 3))
    assert torch.equal(labels, torch.arange(30) % 3)
    assert data.test_dataloader() == []


def noisy(image):
    return v2.functional.pil_to_tensor(image).float() + torch.randn(3, 8, 8)


def test_draws_of_augmented_inputs_are_read_in_turn(root, tmp_path):
    with pytest.raises(ValueError, match=r"the inputs of 'train' to be the same .* augmented at random: .* `views`"):
        cached(images_of(root, transform=noisy), Backbone(), tmp_path)
    # Validation images are always seen through the same draw.
    data = cached(images_of(root, transform=noisy), Backbone(), tmp_path, views=3)
    live, backbone = images_of(root, transform=noisy).splits["train"], Backbone()
    for epoch in range(5):
        data.splits["train"].set_epoch(epoch)
        live.set_epoch(epoch % 3)
        torch.testing.assert_close(data.splits.train[0], backbone(live[torch.arange(len(live))][0]))


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-4])


def replace_by_another(file):
    np.save(file, np.load(file) + 1)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("spoil", [cut_short, replace_by_another, remove])
@pytest.mark.parametrize("key", ["x_train-00001", "y_val-00000"])
def test_a_shard_that_is_not_what_was_written_is_computed_anew(root, tmp_path, spoil, key):
    whole = cached(images_of(root), Backbone(), tmp_path / "whole")
    cached(images_of(root), Backbone(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    spoil(folder / f"{key}.npy")
    assert_same(whole, cached(images_of(root), Backbone(), tmp_path / "cache"))


def test_a_shard_that_does_not_belong_there_is_not_read(root, tmp_path):
    cached(images_of(root), Backbone(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    np.save(folder / "x_train-00009.npy", np.zeros((8, 24), np.float32))
    assert len(cached(images_of(root), Backbone(), tmp_path / "cache").splits["train"]) == 24


def test_a_copied_cache_is_used(root, tmp_path):
    cached(images_of(root), Backbone(), tmp_path / "cache")
    for file in (tmp_path / "cache").glob("*/*"):
        os.utime(file, (0, 0))
    SEEN.clear()
    cached(images_of(root), Backbone(), tmp_path / "cache")
    assert SEEN == []


def test_threads_that_fill_one_cache_leave_a_whole_one(root, tmp_path):
    whole = cached(images_of(root), Backbone(), tmp_path / "whole")
    errors = []

    def fill():
        try:
            cached(images_of(root), Backbone(), tmp_path / "cache")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    SEEN.clear()
    assert_same(whole, cached(images_of(root), Backbone(), tmp_path / "cache"))
    assert SEEN == []


def test_a_full_disk_leaves_nothing_half_written_and_the_next_fill_goes_on(root, tmp_path, monkeypatch):
    save, written = np.save, []

    def save_until_full(file, arr):
        if len(written) >= 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(arr)
        save(file, arr)

    monkeypatch.setattr(np, "save", save_until_full)
    with pytest.raises(ValueError, match=r"Expected `cache_dir` to be a folder with room .* No space left on device"):
        cached(images_of(root), Backbone(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.iterdir())) == 3
    monkeypatch.setattr(np, "save", save)
    assert_same(
        cached(images_of(root), Backbone(), tmp_path / "cache"), cached(images_of(root), Backbone(), tmp_path / "whole")
    )


class Random(nn.Module):
    def forward(self, inputs):
        return torch.nn.functional.dropout(inputs, 0.5)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3), 0)])


def trainable():
    return nn.Linear(3, 2).eval()


def training():
    return nn.Sequential(nn.Linear(3, 2), nn.Dropout()).requires_grad_(False)


REPEATS = WeightedRandomSampler(torch.ones(30), 30)


@pytest.mark.parametrize(
    ("datamodule", "backbone", "options", "error", "message"),
    [
        (SomebodysData, trainable, {}, ValueError, "`backbone` to be frozen and in eval mode, but it trains 'weight'"),
        (SomebodysData, training, {}, ValueError, "but it has 'Sequential' in train mode: call"),
        (SomebodysData, Random, {}, ValueError, "Expected `backbone` to embed an input always alike"),
        (SomebodysData, lambda: len, {}, TypeError, "Expected `backbone` to be a torch.nn.Module, but got"),
        (SomebodysData, Double, {"views": 0}, ValueError, "Expected `views` to be an integer of at least 1"),
        (lambda: 3, Double, {}, TypeError, "Expected `datamodule` to be a LightningDataModule, but got int"),
        (
            lambda: SomebodysData(sampler=REPEATS, shuffle=None),
            Double,
            {},
            ValueError,
            "the sampler of `train_dataloader` to draw every sample once, but got WeightedRandomSampler",
        ),
        (lambda: SomebodysData(Endless(), shuffle=None), Double, {}, TypeError, "one DataLoader of a dataset with a"),
        (
            lambda: SomebodysData([(threading.Lock(), 0)] * 9),
            Double,
            {},
            TypeError,
            "content can be told, but got a lock",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, datamodule, backbone, options, error, message):
    module = backbone()
    if isinstance(module, Double | Random):
        module.eval()
    with pytest.raises(error, match=message):
        cached(datamodule(), module, tmp_path, **options)


def test_a_cache_in_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="Expected `cache_dir` to be a folder with room to write in, but cannot write"):
        cached(SomebodysData(), Double().eval(), tmp_path / "cache")


@pytest.mark.processes
def test_processes_share_the_shards(root, tmp_path):
    def fill(rank):
        cached(images_of(root), Backbone(), tmp_path / "cache")
        return sum(SEEN) - 3 * 2 * 4

    counts = run_in_processes(fill, tmp_path)
    assert sum(counts) == 40
    assert min(counts) > 0
    assert_same(
        cached(images_of(root), Backbone(), tmp_path / "cache"), cached(images_of(root), Backbone(), tmp_path / "whole")
    )
