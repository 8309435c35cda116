"""Standardisation as a part of the module."""

import pytest
import torch
from fits import CLASSES, FEATURES, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.modules.standardise import Standardise


def test_columns_far_from_zero_lose_no_digits():
    rows = 2026 + torch.rand(200, 3, dtype=torch.float64).float().double()
    standardise = Standardise(3)
    standardise.set(rows.mean(0), rows.std(0))
    torch.testing.assert_close(
        standardise(rows.float()).double(), (rows.float().double() - rows.mean(0)) / rows.std(0), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_keep_their_digits_in_a_module_of_any_precision(dtype):
    standardise = Standardise(2)
    standardise.set(torch.tensor([1000.123, 5.0]), torch.tensor([0.001, 2.0]))
    before = {key: value.clone() for key, value in standardise.state_dict().items()}
    nn.Sequential(standardise).to(dtype)
    assert all(torch.equal(value, before[key]) for key, value in standardise.state_dict().items())
    assert standardise(torch.ones(1, 2, dtype=dtype)).dtype is dtype


def test_a_column_that_seldom_varies_is_not_blown_up():
    rows = torch.randn(64, 4)
    rows[:, 3] = 0.0
    rows[0, 3] = 1e-6
    standardise = Standardise(4)
    standardise.measure(rows)
    assert standardise(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))[0, 3] < 5
    many = torch.randn(100_000, 4) * 3 + 1
    standardise.measure(many)
    torch.testing.assert_close(standardise(many).std(0), torch.ones(4), rtol=1e-3, atol=0)


def test_constant_rows_become_zeros():
    standardise = Standardise(2)
    standardise.measure(torch.full((5, 2), 7.0))
    assert torch.equal(standardise(torch.full((1, 2), 7.0)), torch.zeros(1, 2))


class Tiny(nn.Module):
    """A backbone as random ones are: embeddings far from zero that hardly vary."""

    def forward(self, x):
        return 30 + x / 1000


def fit(*callbacks, standardise_embeddings=True, **options):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % CLASSES
    x = torch.randn(CLASSES, FEATURES, generator=generator)[y] * 2 + torch.randn(240, FEATURES, generator=generator)
    torch.manual_seed(0)
    module = SupervisedModule(mlp_head(FEATURES, 32, CLASSES), Tiny(), standardise_embeddings=standardise_embeddings)
    loader = DataLoader(TensorDataset(x, y), batch_size=48)
    trainer = make_trainer(*callbacks, **{"max_epochs": 10, **options})
    trainer.fit(module, loader, loader)
    return module, float(trainer.callback_metrics["val/accuracy"])


def test_embeddings_of_a_frozen_backbone_are_standardised_by_the_first_batch():
    module, accuracy = fit()
    _, without = fit(standardise_embeddings=False)
    assert accuracy > 0.85 > without + 0.2
    assert int(module.standardise.rows) == 48


def test_embeddings_stand_still_after_the_first_batch_that_anything_in_the_fit_looks_at():
    embeddings = []

    class Looks(StructureFreezeCallback):
        def on_train_batch_end(self, trainer, pl_module, *args, **options):
            super().on_train_batch_end(trainer, pl_module, *args, **options)
            embeddings.append(pl_module.embeddings(torch.ones(1, FEATURES)))

    fit(Looks(freeze_at_epoch=1), max_epochs=3)
    assert all(torch.equal(embeddings[0], other) for other in embeddings)


def test_a_backbone_that_is_trained_is_left_alone():
    module = SupervisedModule(mlp_head(FEATURES, 32, CLASSES), nn.Linear(FEATURES, FEATURES), freeze_backbone=False)
    make_trainer(max_epochs=1).fit(module, DataLoader([(torch.randn(FEATURES), 1)] * 4))
    assert not module.standardise.is_set


@pytest.mark.processes
def test_processes_measure_the_rows_of_all(tmp_path):
    module, _ = fit(devices=2, strategy="ddp_fork", max_epochs=2)
    # Handed back by the processes, in its state dict.
    assert int(module.standardise.rows) == 96
    assert module.standardise.is_set
