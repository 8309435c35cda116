"""The characters: a few-shot problem that comes with the package."""

import tomllib
from pathlib import Path

import torch
from fits import make_trainer

from glai_lightning import PrototypicalModule, mlp_head
from glai_lightning.datamodules import OmniglotDataModule


def test_whole_alphabets_are_trained_on_validated_on_and_tested_on():
    splits = OmniglotDataModule().splits
    classes = [set(source.labels[torch.from_numpy(source._rows).flatten()].tolist()) for source in splits.values()]
    assert [len(of_split) for of_split in classes] == [175, 24, 43]
    assert len(set.union(*classes)) == 242
    assert splits["train"].inputs.unique().tolist() == [0, 1]


def test_training_helps_on_characters_that_were_not_trained_on():
    data = OmniglotDataModule(queries=5, train_episodes=100, eval_episodes=50)
    torch.manual_seed(0)
    module = PrototypicalModule(
        mlp_head(784, 64, 32), torch.nn.Flatten(), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
    )

    def accuracy():
        return make_trainer().test(module, data, verbose=False)[0]["test/accuracy"]

    before = accuracy()
    make_trainer(max_epochs=2, limit_val_batches=0).fit(module, data)
    assert accuracy() > before + 0.1


def test_embedded_data_is_small_and_installed_with_the_package():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "datamodules" / "data"
    files = [path for pattern in patterns["glai_lightning.datamodules.data"] for path in folder.glob(pattern)]
    assert {file.name for file in files} == {"letter.npz", "omniglot.npz"}
    assert all(file.stat().st_size < 200_000 for file in files)
