"""FeaturesDataModule under a Trainer, from a file and from arrays."""

import pickle

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from recording import Recorder, numbered_rows, quiet_trainer

from glai_lightning.datamodules import FeaturesDataModule


def arrays():
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.rand(50, 4, 4, generator=generator), torch.arange(50) % 5
    return {"x_train": inputs[:40], "y_train": labels[:40], "x_test": inputs[40:], "y_test": labels[40:]}


def batches(loader):
    return [(inputs.tolist(), targets.tolist()) for inputs, targets in loader]


def test_a_file_and_arrays_give_the_same_batches(tmp_path):
    np.savez(tmp_path / "data.npz", **{key: tensor.numpy() for key, tensor in arrays().items()})
    from_file, from_arrays = FeaturesDataModule(tmp_path / "data.npz"), FeaturesDataModule(arrays=arrays())
    for name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"):
        assert batches(getattr(from_file, name)()) == batches(getattr(from_arrays, name)())
    assert (from_file.num_features, from_file.num_classes) == (16, 5)


def test_setup_prepares_the_data_once():
    data = numbered_rows()
    data.setup("fit")
    splits = data.splits
    data.setup("test")
    data.setup()
    assert data.splits is splits


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Expected one of `path` and `arrays`, but got none"),
        (
            {"path": "a.npz", "arrays": {}},
            ValueError,
            "Expected one of `path` and `arrays`, but got `path` and `arrays`",
        ),
        ({"path": "missing.npz"}, ValueError, "Expected `path` to be an existing file, but got 'missing.npz'"),
        ({"arrays": [1, 2]}, TypeError, "Expected `arrays` to be a mapping of arrays by key, but got list"),
        ({"arrays": {"x": 1}}, ValueError, "lacks `x_train`, `y_train`, `x_test`, `y_test`: it holds `x`"),
        (
            {"arrays": arrays(), "batch_size": 0},
            ValueError,
            "Expected `batch_size` to be an integer of at least 1, but got 0",
        ),
        (
            {"arrays": arrays(), "batch_size": 2.5},
            TypeError,
            "Expected `batch_size` to be an integer of at least 1, but got 2.5",
        ),
        ({"arrays": arrays(), "seed": -1}, ValueError, "Expected `seed` to be an integer of at least 0, but got -1"),
        (
            {"arrays": arrays(), "val_fraction": 0},
            ValueError,
            r"`val_fraction` to be a finite number in \(0, 1\), but got 0",
        ),
        (
            {"arrays": arrays(), "val_fraction": 1.0},
            ValueError,
            r"`val_fraction` to be a finite number in \(0, 1\), but got 1.0",
        ),
        ({"arrays": arrays(), "val_fraction": float("nan")}, ValueError, "`val_fraction` .* but got nan"),
    ],
)
def test_bad_arguments_are_refused_by_the_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        FeaturesDataModule(**arguments)


def test_a_fit_reads_every_training_row_once_an_epoch_in_changing_order():
    data, module = numbered_rows(), Recorder()
    quiet_trainer(max_epochs=3).fit(module, datamodule=data)
    orders = [[row for epoch, _, rows in module.read["train"] if epoch == which for row in rows] for which in range(3)]
    assert all(sorted(order) == sorted(data.splits.train[1].tolist()) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    validated = [rows for _, _, rows in module.read["val"]]
    assert validated == 3 * [rows.tolist() for rows in data.splits.val[1].split(4)]


def test_validate_test_and_predict_read_their_rows_in_order():
    data, module, trainer = numbered_rows(), Recorder(), quiet_trainer()
    trainer.test(module, datamodule=data)
    assert [rows for _, _, rows in module.read["test"]] == [[0, 1, 2, 3], [4, 5, 6]]
    assert torch.cat(trainer.predict(module, datamodule=data)).tolist() == list(range(7))
    trainer.validate(module, datamodule=data)
    assert [row for _, _, rows in module.read["val"] for row in rows] == data.splits.val[1].tolist()


def test_overfitting_reads_the_same_whole_batches_every_epoch():
    module = Recorder()
    quiet_trainer(max_epochs=2, overfit_batches=2).fit(module, datamodule=numbered_rows())
    by_epoch = [[rows for epoch, _, rows in module.read["train"] if epoch == which] for which in (0, 1)]
    assert by_epoch[0] == by_epoch[1]
    assert [len(rows) for rows in by_epoch[0]] == [4, 4]


def test_loaders_made_after_a_fit_follow_their_sampler():
    data = numbered_rows()
    quiet_trainer(max_epochs=1).fit(Recorder(), datamodule=data)
    loader = data.train_dataloader()
    first = batches(loader)
    loader.sampler.set_epoch(1)
    assert batches(loader) != first


def test_a_batch_size_set_later_is_that_of_the_next_loaders():
    data = numbered_rows()
    data.setup()
    data.batch_size = 10
    assert [len(targets) for _, targets in data.train_dataloader()] == [10, 9]


@pytest.mark.parametrize("prepared", [False, True])
def test_it_survives_pickling(prepared):
    data = numbered_rows()
    if prepared:
        data.setup()
    assert batches(pickle.loads(pickle.dumps(data)).train_dataloader()) == batches(data.train_dataloader())


def test_a_configuration_file_can_describe_it(tmp_path):
    np.savez(tmp_path / "data.npz", **{key: tensor.numpy() for key, tensor in arrays().items()})
    parser = ArgumentParser()
    parser.add_subclass_arguments(FeaturesDataModule, "data")
    configuration = {
        "class_path": "glai_lightning.datamodules.FeaturesDataModule",
        "init_args": {"path": str(tmp_path / "data.npz"), "batch_size": 8},
    }
    data = parser.instantiate(parser.parse_object({"data": configuration})).data
    assert len(data.train_dataloader()) == 4
