"""Labels as people have them become classes, numbers of a regression stay numbers, and rare classes are named."""

import warnings

import numpy as np
import pytest
import torch

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.datamodules import FeaturesDataModule


def data_of(y_train, y_test=None, **options):
    y_train = np.asarray(y_train)
    y_test = y_train[:12] if y_test is None else np.asarray(y_test)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(len(y_train) + len(y_test), 3))
    arrays = {"x_train": inputs[: len(y_train)], "y_train": y_train, "x_test": inputs[len(y_train) :], "y_test": y_test}
    return FeaturesDataModule(arrays=arrays, **options)


def labels_of(data):
    """Labels of the training and validation rows, in the order of the data."""
    rows = torch.cat([data.splits["train"].index, data.splits["val"].index])
    return torch.cat([data.splits.train[1], data.splits.val[1]])[rows.argsort()]


COUNTING = np.arange(60) % 3


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["ape", "bee", "cat"])[COUNTING],
        np.array(["ape", "bee", "cat"], dtype=object)[COUNTING],
        np.array([b"ape", b"bee", b"cat"]).astype(str)[COUNTING],
        COUNTING + 1,
        COUNTING + 1.0,
        COUNTING.astype(np.float32),
        COUNTING.astype(np.uint64),
    ],
    ids=["strings", "objects", "short strings", "from one", "floats from one", "floats", "unsigned"],
)
def test_labels_of_any_kind_are_numbered_from_zero(labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = data_of(labels)
        assert torch.equal(labels_of(data), torch.from_numpy(COUNTING))
    assert data.splits.test[1].dtype == torch.int64
    assert data.num_classes == 3


def test_named_and_renumbered_classes_are_listed():
    assert data_of(np.array(["bee", "ape"])[COUNTING % 2]).classes == ["ape", "bee"]
    assert data_of(COUNTING + 1).classes == ["1", "2", "3"]
    assert data_of(COUNTING).classes is None


def test_labels_that_miss_the_first_class_only_in_training_are_not_renumbered():
    data = data_of(COUNTING + 1, [0, 1, 2, 3])
    with pytest.warns(UserWarning, match="no training row"):
        data.setup()
    assert data.num_classes == 4
    assert data.splits.test[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "values",
    [
        COUNTING + 0.5,
        COUNTING * 10.0,
        COUNTING - 1.0,
        COUNTING + 2.0,
        np.ones(60),
        np.ones((60, 2)),
        COUNTING[:, None] * 1.0,
    ],
    ids=["fractions", "gaps", "negative", "from two", "constant", "two outputs", "one column"],
)
def test_other_floats_are_values(values):
    data = data_of(values)
    assert (data.num_classes, data.splits.train[1].dtype) == (None, torch.float32)


def test_floats_that_become_classes_are_announced():
    with pytest.warns(UserWarning, match=r"whole numbers in `y_train` are taken for 3 classes.* `task='regression'`"):
        data_of(COUNTING.astype(float)).setup()


def test_the_task_decides_where_it_is_given():
    counts = np.arange(60) - 20
    data = data_of(counts, task="regression")
    assert data.num_classes is None
    assert torch.equal(labels_of(data), torch.from_numpy(counts).float())
    assert data_of(COUNTING.astype(float), task="regression").num_classes is None
    assert data_of(COUNTING * 2.0, task="classification").num_classes == 5


def test_integers_are_numbers_for_a_module_of_a_regression():
    from recording import quiet_trainer

    data = data_of(np.arange(60) - 20)
    quiet_trainer(max_epochs=1).fit(SupervisedModule(mlp_head(3, 4, 1), task="regression"), data)
    assert data.num_classes is None
    assert data.splits.train[1].min() < 0


@pytest.mark.parametrize(
    ("y_train", "y_test", "task", "error", "message"),
    [
        (["a", "b"] * 9, ["a", "z"], None, ValueError, "`y_test` to hold classes of `y_train`, but got 'z'"),
        (["a", "b"] * 9, [0, 1], None, ValueError, "`y_test` to hold strings, as `y_train` does, but got numbers"),
        (["a", ""] * 9, ["a"], None, ValueError, "`y_train` to hold a class in every row, but got an empty string"),
        (["a", "b"] * 9, ["a"], "regression", TypeError, "`y_train` to hold numbers for a regression, but got strings"),
        ([0.5, 1] * 9, [1.0], "classification", ValueError, "`y_train` to hold class labels, whole numbers, but got"),
        ([1, 2] * 9, [3, 1], None, ValueError, "`y_test` to hold labels up to 2, the largest in `y_train`, but got 3"),
        ([0, 1] * 9, [0], "clustering", ValueError, "Expected `task` to be 'classification' or 'regression'"),
    ],
)
def test_targets_that_do_not_fit_are_refused(y_train, y_test, task, error, message):
    with pytest.raises(error, match=message):
        data_of(y_train, y_test, task=task).setup()


def caught(data):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        data.setup()
    return [str(warning.message) for warning in found]


def test_rare_classes_are_named():
    labels = np.array(["ape", "bee"] * 50 + ["cat"])
    for seed in range(20):
        (message,) = caught(data_of(labels, seed=seed))
        cat_is_trained_on = 100 in data_of(labels, seed=seed).splits["train"].index.tolist()
        assert ("a single training row: 'cat'" if cat_is_trained_on else "no training row") in message
    assert caught(data_of(np.array(["ape", "bee"])[COUNTING % 2])) == []


def test_outputs_without_a_class_are_named():
    messages = caught(data_of(np.where(COUNTING == 1, 5, COUNTING)))
    assert messages == [
        "Of 6 classes, 3 have no training row: the head has an output for each that it cannot learn: 1, 3, 4."
    ]


def test_a_class_missing_in_validation_is_named():
    arrays = {"x_train": np.eye(6), "y_train": np.arange(6) % 3, "x_test": np.eye(6), "y_test": np.arange(6) % 3}
    arrays |= {"x_val": np.eye(6)[:2], "y_val": np.array([0, 2])}
    (message,) = caught(FeaturesDataModule(arrays=arrays))
    assert message == "Of 3 classes, 1 have no validation row: the validation score says nothing of them: 1."
