"""Whatever a data module is given, it works or says what is wrong in a sentence, before the first batch."""

import inspect
import math
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from glai_lightning import datamodules
from glai_lightning.checks import UserError


def features():
    inputs, labels = torch.rand(60, 4), torch.arange(60) % 3
    return {"x_train": inputs, "y_train": labels, "x_test": inputs, "y_test": labels}


def write_texts(folder):
    (folder / "texts.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 10)
    return folder / "texts.csv"


def write_images(folder):
    for name in ("cat", "dog"):
        (folder / "images" / "train" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (4, 4)).save(folder / "images" / "train" / name / f"{number}.png")
    return folder / "images"


GOOD = {
    "DigitViewsDataModule": lambda folder: {},
    "DigitsDataModule": lambda folder: {},
    "EpisodesDataModule": lambda folder: {"arrays": {"x": torch.rand(300, 4), "y": torch.arange(300) % 15}},
    "FeaturesDataModule": lambda folder: {"arrays": features()},
    "ImageFolderDataModule": lambda folder: {"root": write_images(folder)},
    "LetterDataModule": lambda folder: {},
    "OmniglotDataModule": lambda folder: {},
    "TableDataModule": lambda folder: {"frame": pandas.DataFrame({"x": range(60), "label": [0, 1] * 30})},
    "TextsDataModule": lambda folder: {"path": write_texts(folder)},
    "UnlabelledDataModule": lambda folder: {"path": write_images(folder)},
    "ViewsDataModule": lambda folder: {"arrays": {"views": torch.rand(3, 40, 5), "y": torch.arange(40) % 4}},
}


def read_a_batch(make):
    data = make()
    data.setup("fit")
    loader = data.predict_dataloader if isinstance(data, datamodules.UnlabelledDataModule) else data.train_dataloader
    next(iter(loader()))


def taken_or_refused(make):
    """Whether something is made, or refused in the grammar of the package; other errors are not caught."""
    try:
        make()
    except UserError as error:
        return str(error).startswith("Expected ") and str(error).endswith(".")
    return True


ANYTHING = [
    None,
    True,
    -1,
    0,
    0.5,
    2,
    10**30,
    math.nan,
    math.inf,
    1j,
    "",
    "nowhere",
    "\0",
    b"bytes",
    [],
    [1, 2],
    {},
    {"train": 0.5},
    {"train": "a", "val": "b", "test": "c"},
    {"train": [[1]], "val": [{}], "test": [None]},
    {"train": math.nan, "val": 0.5, "test": 0.5},
    {"views": 3, "x": 3, "y": 4, "x_train": 3, "y_train": 1, "x_test": 3, "y_test": 1},
    {"x": object()},
    {1: 2},
    object(),
    int,
    len,
    np.zeros(3),
    np.float64(0.5),
    torch.zeros(2),
    torch.zeros(2, 2).to_sparse(),
]

ARGUMENTS = [
    (name, argument)
    for name in datamodules.__all__
    for argument in inspect.signature(getattr(datamodules, name)).parameters
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=list(map("-".join, ARGUMENTS)))
def test_any_argument_is_taken_or_refused_with_a_sentence(name, argument, tmp_path):
    good = GOOD[name](tmp_path)
    sources = {"path", "arrays", "dataset", "frame"}
    if argument in sources:
        good = {key: value for key, value in good.items() if key not in sources}
    for value in ANYTHING:
        # As many processes would be started; and what a function of the user's own raises is left alone.
        if (argument == "num_workers" and isinstance(value, int)) or (argument == "transform" and callable(value)):
            continue
        options = good | {argument: value}
        if argument == "dataset" and name == "ViewsDataModule":
            options["transform"] = lambda sample: torch.rand(2)
        if argument == "transform" and name == "ViewsDataModule":
            options = {"dataset": list(range(40)), "transform": value}
        data_module = partial(getattr(datamodules, name), **options)
        assert taken_or_refused(partial(read_a_batch, data_module)), value


ARRAYS = [
    *ANYTHING,
    torch.zeros(2, 2, device="meta"),
    torch.zeros(60, dtype=torch.cfloat),
    torch.zeros(60, 4).to_sparse(),
    torch.quantize_per_tensor(torch.zeros(60, 4), 1.0, 0, torch.qint8),
    torch.zeros(()),
    torch.zeros(0, 4),
    np.zeros(60, dtype="datetime64[s]"),
    np.array([None] * 60),
    np.zeros(60, dtype=[("a", int)]),
    np.full(60, 2**63, dtype=np.uint64),
]


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_any_features_are_taken_or_refused_with_a_sentence(key):
    for value in ARRAYS:
        arrays = features() | {key: value}
        assert taken_or_refused(datamodules.FeaturesDataModule(arrays=arrays).setup), value


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ViewsDataModule", "views"),
        ("ViewsDataModule", "y"),
        ("EpisodesDataModule", "x"),
        ("EpisodesDataModule", "y"),
        ("EpisodesDataModule", "group"),
    ],
)
def test_any_views_and_samples_are_taken_or_refused_with_a_sentence(name, key, tmp_path):
    good = GOOD[name](tmp_path)["arrays"]
    for value in ARRAYS:
        data = getattr(datamodules, name)(arrays=good | {key: value}, **({"groups": "group"} if key == "group" else {}))
        assert taken_or_refused(data.setup), value
