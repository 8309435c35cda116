"""Tables by the names of their columns: what scikit-learn's transformers make of the training rows, and of new ones."""

import sys
import warnings

import numpy as np
import pandas
import pytest
import torch
from fits import make_trainer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.datamodules import TableDataModule, UnlabelledDataModule


def make_frame(rows=60):
    generator = np.random.default_rng(0)
    return pandas.DataFrame(
        {
            "age": generator.integers(18, 80, rows),
            "income": generator.normal(3000, 500, rows),
            "member": generator.random(rows) < 0.5,
            "town": generator.choice(["Ghent", "Lima", "Oslo"], rows),
            "zip": generator.choice([9000, 150, 10], rows),
            "label": np.array(["no", "yes"])[np.arange(rows) % 2],
        }
    )


def by_row(data):
    """Inputs of all rows, in the order of the table."""
    rows = torch.cat([data.splits[split].index for split in data.splits])
    inputs = torch.cat([data.splits[split][torch.arange(len(data.splits[split]))][0] for split in data.splits])
    return inputs[rows.argsort()].numpy()


def test_numbers_are_standardised_and_categories_encoded_by_the_training_rows():
    frame = make_frame()
    data = TableDataModule(frame=frame, categorical=["zip"])
    train = frame.iloc[data.splits["train"].index.numpy()]
    numbers, categories = ["age", "income", "member"], ["town", "zip"]
    scaler = StandardScaler().fit(train[numbers].to_numpy(float))
    encoder = OneHotEncoder(sparse_output=False).fit(train[categories].astype(str).to_numpy())
    expected = np.hstack(
        [
            scaler.transform(frame[numbers].to_numpy(float)),
            encoder.transform(frame[categories].astype(str).to_numpy()),
        ]
    )
    np.testing.assert_allclose(by_row(data), expected.astype(np.float32))
    assert data.feature_names == [*numbers, *encoder.get_feature_names_out(categories)]
    assert data.num_features == 9
    assert data.classes == ["no", "yes"]


def test_new_rows_are_transformed_alike_whatever_else_the_table_holds():
    frame = make_frame()
    data = TableDataModule(frame=frame)
    new = frame.drop(columns="label").iloc[::-1].assign(other="left alone")
    np.testing.assert_array_equal(data.transform(new).numpy(), by_row(data)[::-1])


def test_categories_that_training_does_not_have_become_zeros():
    data = TableDataModule(frame=make_frame(), columns=["town"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = data.transform(pandas.DataFrame({"town": ["Quito", "Lima"]}))
    assert inputs.sum(1).tolist() == [0, 1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_and_frames_give_the_same_batches(tmp_path, suffix):
    frame, path = make_frame(), tmp_path / f"table{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    ours, theirs = TableDataModule(path), TableDataModule(frame=frame)
    for (inputs, labels), (same_inputs, same_labels) in zip(
        ours.train_dataloader(), theirs.train_dataloader(), strict=True
    ):
        torch.testing.assert_close(inputs, same_inputs)
        assert torch.equal(labels, same_labels)


def with_gaps():
    frame = make_frame().astype({"age": float})
    frame.loc[3, "age"] = np.nan
    frame.loc[[5, 7], "town"] = None
    return frame


def test_missing_values_are_refused_by_the_column_or_imputed():
    with pytest.raises(ValueError, match=r"missing ones in the columns 'age' \(1\), 'town' \(2\)\. With `on_missing="):
        TableDataModule(frame=with_gaps()).setup()
    frame = with_gaps()
    data = TableDataModule(frame=frame, on_missing="impute")
    train = frame.iloc[data.splits["train"].index.numpy()]
    filled = frame.assign(
        age=frame["age"].fillna(train["age"].median()), town=frame["town"].fillna(train["town"].mode()[0])
    )
    np.testing.assert_array_equal(data.transform(frame).numpy(), data.transform(filled).numpy())
    assert not np.isnan(by_row(data)).any()


def test_rare_categories_share_an_input():
    names = [f"name {number}" for number in range(300)]
    frame = pandas.DataFrame({"name": names + names[:100] * 3, "label": [0, 1] * 300})
    assert TableDataModule(frame=frame, val_fraction=0.01, test_fraction=0).num_features == 256


def test_the_frame_given_is_not_changed():
    frame = with_gaps()
    before = frame.copy()
    TableDataModule(frame=frame, on_missing="impute").setup()
    pandas.testing.assert_frame_equal(frame, before)


def test_columns_of_numbers_are_values_to_predict():
    data = TableDataModule(frame=make_frame(), target=["age", "income"], columns=["town", "member"])
    _, targets = next(iter(data.train_dataloader()))
    assert (targets.shape, targets.dtype, data.num_classes) == ((36, 2), torch.float32, None)


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "category", "string", "float32"])
def test_columns_of_pandas_own_dtypes_are_read(dtype):
    values = {"category": ["a", "b"], "string": ["a", "b"]}.get(dtype, [0, 1])
    frame = pandas.DataFrame({"x": pandas.Series(values * 30, dtype=dtype), "label": [0, 1] * 30})
    frame["y"] = frame["x"]
    data = TableDataModule(frame=frame, columns=["x"], target="y")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs, labels = data.splits.train
    assert data.num_classes == 2
    assert len(inputs.unique(dim=0)) == 2
    assert torch.equal(inputs[:, 0] == inputs[0, 0], labels == labels[0])


def test_a_head_learns_a_table():
    frame = make_frame(800)
    frame["label"] = np.where((frame["income"] > 3000) ^ (frame["town"] == "Lima"), "yes", "no")
    data = TableDataModule(frame=frame, batch_size=32)
    module = SupervisedModule(mlp_head(data.num_features, 32, data.num_classes))
    trainer = make_trainer(max_epochs=30)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/accuracy"] > 0.75


def without(column):
    return make_frame().drop(columns=column)


@pytest.mark.parametrize(
    ("frame", "options", "error", "message"),
    [
        (without("label"), {}, ValueError, "Expected `frame` to have the columns 'label', but got 'age', 'income'"),
        (make_frame(), {"columns": ["size"]}, ValueError, "to have the columns 'size', but got"),
        (make_frame(), {"categorical": ["size"]}, ValueError, "to have the columns 'size', but got"),
        (make_frame().iloc[:0], {}, ValueError, "Expected `frame` to hold rows, but it has none"),
        (make_frame()[["label"]], {}, ValueError, "to have columns to predict from, but got label"),
        (make_frame().assign(label=None), {}, ValueError, "a target in every row .* 'label' lacks 60"),
        (make_frame().assign(age=np.inf), {}, ValueError, "the column 'age' of `frame` to hold finite numbers"),
        (make_frame().assign(age=pandas.Timestamp(0)), {}, TypeError, "'age' of `frame` to hold numbers or categories"),
        (make_frame(), {"target": ["age", "town"]}, ValueError, "several targets to be columns of numbers"),
        (make_frame(), {"task": "regression"}, TypeError, "`label` to hold numbers for a regression, but got strings"),
        (pandas.concat([make_frame()] * 2, axis=1), {}, ValueError, "to have each column once, but got"),
        ("a table", {}, TypeError, "Expected `frame` to be a pandas.DataFrame, but got str"),
        (make_frame(), {"on_missing": "drop"}, ValueError, "Expected `on_missing` to be 'raise' or 'impute'"),
    ],
)
def test_wrong_tables_are_refused(frame, options, error, message):
    with pytest.raises(error, match=message):
        TableDataModule(frame=frame, **options).setup()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.csv", b"", "to be a CSV file in UTF-8 with a header, but got"),
        ("table.csv", b'a,label\n"1,2\n', "to be a CSV file in UTF-8 with a header, but got"),
        ("table.csv", b"a,label\n\xff,2\n", "to be a CSV file in UTF-8 with a header, but got"),
        ("table.parquet", b"no table", "to be a parquet file, but got"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TableDataModule(tmp_path / name).setup()


def test_without_pandas_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glai-lightning\[table\]'"):
        TableDataModule("table.csv")


def test_a_checkpoint_takes_rows_by_the_names_of_their_columns(tmp_path):
    frame = with_gaps()
    frame["income"] += 1e6
    module = SupervisedModule(mlp_head(7, 16, 2))
    trainer = make_trainer(max_epochs=2)
    data = TableDataModule(frame=frame, on_missing="impute", test_fraction=0.5)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    expected = torch.cat(make_trainer().predict(module, data)).softmax(1)
    new = frame.iloc[data.splits["test"].index.numpy()]
    new[new.columns[::-1]].drop(columns="label").to_csv(tmp_path / "new.csv", index=False)

    loaded = SupervisedModule.load_from_checkpoint(tmp_path / "model.ckpt")
    torch.testing.assert_close(loaded.predict(new).probabilities, expected, rtol=0, atol=1e-5)
    outputs = make_trainer().predict(module, UnlabelledDataModule(tmp_path / "new.csv"))
    torch.testing.assert_close(torch.cat(outputs).softmax(1), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Expected `inputs` to have the columns 'age'"):
        loaded.predict(new.drop(columns="age"))
    (tmp_path / "narrow.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"Expected rows of the 7 numbers that the head takes in .*, but got 2"):
        make_trainer().predict(SupervisedModule(mlp_head(7, 16, 2)), UnlabelledDataModule(tmp_path / "narrow.csv"))
