"""Data that is large takes the memory that it has in its file, and folders of arrays are read where they lie."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from glai_lightning.datamodules import FeaturesDataModule, ViewsDataModule, features

PEAK = """
import resource, sys
from glai_lightning.datamodules import FeaturesDataModule
data = FeaturesDataModule(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data.setup()
for batch in data.train_dataloader():
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def make_arrays(rows=60, dtype=np.float32, columns=8):
    generator = np.random.default_rng(0)
    inputs = (generator.standard_normal((rows + rows // 5, columns), dtype=np.float32) * 9 + 5).astype(dtype)
    labels = np.arange(len(inputs)) % 3
    return {
        "x_train": inputs[:rows],
        "y_train": labels[:rows],
        "x_test": inputs[rows:],
        "y_test": labels[rows:],
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_archive_takes_at_most_one_and_a_half_times_its_size(tmp_path, dtype):
    path = tmp_path / "large.npz"
    np.savez(path, **make_arrays(90_000 * 4 // np.dtype(dtype).itemsize, dtype, columns=256))
    command = [sys.executable, "-c", PEAK, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) * 1024 <= 1.5 * path.stat().st_size


def write_folder(folder, arrays, shards=1):
    folder.mkdir(exist_ok=True)
    for key, array in arrays.items():
        if shards == 1:
            np.save(folder / f"{key}.npy", array)
        for number, part in enumerate(np.array_split(array, shards) if shards > 1 else ()):
            np.save(folder / f"{key}-{number:05}.npy", part)
    return folder


def batches(data):
    return [
        batch for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()) for batch in loader
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8, np.uint16])
@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("at_once", [True, False])
def test_folders_archives_and_arrays_give_the_same_batches(tmp_path, monkeypatch, dtype, shards, at_once):
    if not at_once:
        monkeypatch.setattr(features, "_CONVERTED_AT_ONCE", 0)
    arrays = make_arrays(dtype=dtype)
    np.savez(tmp_path / "data.npz", **arrays)
    sources = {"path": tmp_path / "data.npz"}, {"path": write_folder(tmp_path / "folder", arrays, shards)}
    expected = batches(FeaturesDataModule(arrays={key: array.copy() for key, array in arrays.items()}, batch_size=7))
    for source in sources:
        found = batches(FeaturesDataModule(**source, batch_size=7))
        for (inputs, labels), (same_inputs, same_labels) in zip(expected, found, strict=True):
            assert inputs.dtype == torch.float32
            torch.testing.assert_close(same_inputs, inputs, atol=0, rtol=0)
            assert torch.equal(labels, same_labels)


def test_strings_and_empty_shards_are_read(tmp_path):
    arrays = make_arrays()
    arrays["y_train"], arrays["y_test"] = (np.array(["ant", "bee", "c"])[arrays[key]] for key in ("y_train", "y_test"))
    folder = write_folder(tmp_path / "folder", arrays, shards=3)
    np.save(folder / "x_train-00003.npy", np.zeros((0, 8), np.float32))
    data = FeaturesDataModule(folder)
    assert (data.classes, len(data.splits["train"])) == (["ant", "bee", "c"], 48)


def test_reading_leaves_the_files_as_they_are(tmp_path):
    folder = write_folder(tmp_path / "folder", make_arrays())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    batches(FeaturesDataModule(folder))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_inputs_can_be_left_as_they_are():
    arrays = make_arrays()
    inputs, _ = FeaturesDataModule(arrays=arrays, standardise=False).splits.test
    assert torch.equal(inputs, torch.from_numpy(arrays["x_test"]))


def test_views_are_read_from_a_folder(tmp_path):
    folder = write_folder(tmp_path / "folder", {"views": np.random.default_rng(0).normal(size=(3, 40, 5))})
    assert ViewsDataModule(folder).num_features == 5


def spoil_dtype(folder):
    np.save(folder / "x_train-00001.npy", np.zeros((20, 8)))


def spoil_width(folder):
    np.save(folder / "x_train-00001.npy", np.zeros((20, 9), np.float32))


def spoil_objects(folder):
    np.save(folder / "x_train-00001.npy", np.array([{}] * 20))


def spoil_cut(folder):
    path = folder / "x_train-00001.npy"
    path.write_bytes(path.read_bytes()[:200])


def spoil_text(folder):
    (folder / "x_train-00001.npy").write_text("no array")


def spoil_missing(folder):
    for path in folder.glob("y_test*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_dtype, "x_train-00001.npy' to fit 'x_train-00000.npy', rows .* of float32, but got .* of float64"),
        (spoil_width, r"x_train-00001.npy' to fit 'x_train-00000.npy', rows \(8,\) of float32, but got \(9,\)"),
        (spoil_objects, "x_train-00001.npy' to be an array of numbers, but it is damaged"),
        (spoil_cut, "x_train-00001.npy' to be an array of numbers, but it is damaged"),
        (spoil_text, "x_train-00001.npy' to be an array of numbers, but it is damaged"),
        (spoil_missing, "folder' to hold .* but it lacks `y_test`: it holds `x_test`, `x_train`, `y_train`"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_by_the_file(tmp_path, spoil, message):
    folder = write_folder(tmp_path / "folder", make_arrays(), shards=3)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        FeaturesDataModule(folder).setup()
