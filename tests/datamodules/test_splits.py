"""What is wrong with the arrays is said in one sentence, before anything is trained."""

import numpy as np
import pytest
import torch

from glai_lightning.datamodules.features import make_splits


def arrays(**changes):
    generator = np.random.default_rng(0)
    good = {
        "x_train": generator.normal(size=(20, 3, 2)),
        "y_train": np.arange(20) % 4,
        "x_test": generator.normal(size=(8, 3, 2)),
        "y_test": np.arange(8) % 4,
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def split(val_fraction=0.2, seed=0, **changes):
    return make_splits(arrays(**changes), val_fraction=val_fraction, seed=seed)


def with_values(key, *values):
    array = arrays()[key].astype(float)
    array.flat[: len(values)] = values
    return {key: array}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y_test": None}, ValueError, "lacks `y_test`: it holds `x_train`, `y_train`, `x_test`"),
        ({"x_val": np.ones((2, 3, 2))}, ValueError, "lacks `y_val`"),
        ({"x_train": [[1.0]] * 20}, TypeError, "`x_train` to be a torch.Tensor or a numpy.ndarray, but got list"),
        ({"x_train": np.full((20, 3), "a")}, TypeError, "`x_train` to hold real numbers, but got dtype <U1"),
        ({"x_test": np.full((8, 3), None)}, TypeError, "`x_test` to hold real numbers, but got dtype object"),
        ({"x_test": torch.zeros(8, 6, dtype=torch.cfloat)}, TypeError, "`x_test` to hold real numbers"),
        ({"x_train": np.ones(20)}, ValueError, r"`x_train` to have the shape \(samples, features...\).*\(20,\)"),
        ({"x_test": np.ones((0, 6)), "y_test": np.ones(0, int)}, ValueError, r"`x_test` .* \(0, 6\)"),
        ({"y_train": np.arange(19) % 4}, ValueError, "`x_train` and `y_train` .* same length, but got 20 and 19"),
        ({"x_test": np.ones((8, 5))}, ValueError, "`x_test` to have the 6 features of `x_train`, but got 5"),
        (with_values("x_train", np.nan, np.nan, np.inf), ValueError, "`x_train` .* got 2 NaN and 1 infinite among 120"),
        (with_values("x_test", -np.inf), ValueError, "`x_test` .* got 0 NaN and 1 infinite"),
        (with_values("y_train", np.nan), ValueError, "`y_train` .* got 1 NaN"),
        ({"y_train": np.arange(20) % 4 - 1}, ValueError, "`y_train` to hold class labels of at least 0, but got -1"),
        ({"y_test": np.arange(8)}, ValueError, "`y_test` to hold labels up to 3, the largest in `y_train`, but got 7"),
        ({"y_train": np.zeros((20, 1), int)}, ValueError, r"`y_train`, class labels, .* but got \(20, 1\)"),
        ({"y_train": np.zeros((20, 1, 1))}, ValueError, r"`y_train` .* but got \(20, 1, 1\)"),
        ({"y_test": np.full(8, 0.5)}, ValueError, "`y_test` to hold class labels, whole numbers, but got fractions"),
        ({"y_test": np.full(8, "a")}, ValueError, "`y_test` to hold numbers, as `y_train` does, but got strings"),
        ({"x_val": np.ones((2, 4)), "y_val": np.ones(2, int)}, ValueError, "`x_val` to have the 6 features"),
        (
            {"val_fraction": 0.01},
            ValueError,
            "Expected at least one sample in each split, but got 0 of 20 for 'val'",
        ),
        ({"val_fraction": 0.99}, ValueError, "Expected at least one sample in each split, but got 0 of 20 for 'train'"),
    ],
)
def test_bad_arrays_are_refused_with_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        split(**changes)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.uint16, np.uint32, np.int64, ">i4"])
def test_integer_targets_of_any_dtype_are_int64_labels(dtype):
    labels = arrays()["y_train"] % 2
    splits = split(y_train=labels.astype(dtype), y_test=labels[:8].astype(dtype))
    assert splits.train[1].dtype == splits.test[1].dtype == torch.int64
    assert splits.num_classes == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.longdouble, ">f4"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_floating_point_targets_stay_values_of_float32(dtype, shape):
    splits = split(y_train=np.ones((20, *shape), dtype), y_test=np.ones((8, *shape), dtype))
    assert splits.train[1].dtype == torch.float32
    assert splits.train[1].shape == (16, *shape)
    assert splits.num_classes is None


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.uint64, np.float16, np.longdouble, ">f8"])
def test_inputs_of_any_real_dtype_are_float32_rows(dtype):
    inputs = np.arange(160).reshape(20, 2, 4).astype(dtype)
    splits = split(x_train=inputs, x_test=inputs[:8])
    assert splits.train[0].dtype == torch.float32
    assert splits.train[0].shape == (16, 8)
    assert splits.train[0].isfinite().all()


def test_only_the_training_rows_standardise():
    splits = split()
    torch.testing.assert_close(splits.train[0].mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(splits.train[0].std(0, correction=0), torch.ones(6))
    raw_test = torch.from_numpy(arrays()["x_test"]).flatten(1)
    expected = (raw_test - splits.standardisation.mean) / splits.standardisation.scale
    torch.testing.assert_close(splits.test[0], expected.float())
    with_other_test_rows = split(x_test=arrays()["x_test"] * 100)
    assert torch.equal(with_other_test_rows.train[0], splits.train[0])


def test_the_seed_chooses_the_validation_rows_and_nothing_is_lost():
    numbers = {"y_train": torch.arange(20)}
    chosen = [split(seed=seed, **numbers) for seed in (0, 0, 1)]
    for splits in chosen:
        assert sorted(splits.train[1].tolist() + splits.val[1].tolist()) == list(range(20))
        assert len(splits.val[1]) == 4
    assert torch.equal(chosen[0].val[1], chosen[1].val[1])
    assert not torch.equal(chosen[0].val[1], chosen[2].val[1])


def test_validation_rows_of_the_data_replace_the_split():
    splits = split(x_val=torch.ones(3, 6), y_val=torch.tensor([0, 1, 2]))
    assert splits.val[1].tolist() == [0, 1, 2]
    assert splits.train[1].tolist() == arrays()["y_train"].tolist()


def test_the_arrays_given_are_not_changed():
    given = {key: torch.from_numpy(array).requires_grad_(array.dtype == float) for key, array in arrays().items()}
    before = {key: tensor.detach().clone() for key, tensor in given.items()}
    splits = make_splits(given, val_fraction=0.2, seed=0)
    for tensor in (*splits.train, *splits.val, *splits.test):
        tensor.zero_()
    assert all(torch.equal(given[key], before[key]) for key in given)
    assert not splits.train[0].requires_grad


def test_read_only_arrays_are_read_without_a_warning(recwarn):
    given = arrays()
    for array in given.values():
        array.flags.writeable = False
    make_splits(given, val_fraction=0.2, seed=0)
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]
