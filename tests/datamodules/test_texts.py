import csv

import pytest
import torch
from fits import make_trainer
from recording import Recorder

from glai_lightning.datamodules import TextsDataModule

ROWS = [(f"film number {number}, seen", ("good", "bad", "2")[number % 3]) for number in range(30)]


def write(path, rows=ROWS, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "films.csv")


def read(data, epoch=0):
    """Return the texts and labels of each split, in the order of the loaders."""
    splits = {}
    for split in ("train", "val", "test"):
        loader = getattr(data, f"{split}_dataloader")()
        loader.sampler.set_epoch(epoch)
        splits[split] = [pair for texts, labels in loader for pair in zip(texts, labels.tolist(), strict=True)]
    return splits


def test_every_row_is_in_one_split_and_labels_number_the_sorted_classes(path):
    data = TextsDataModule(path, batch_size=4)
    assert (data.classes, data.num_classes) == (["2", "bad", "good"], 3)
    splits = read(data)
    assert [len(rows) for rows in splits.values()] == [18, 6, 6]
    seen = [(text, data.classes[label]) for rows in splits.values() for text, label in rows]
    assert sorted(seen) == sorted(ROWS)
    texts, labels = next(iter(data.train_dataloader()))
    assert isinstance(texts, list)
    assert (len(texts), labels.shape, labels.dtype) == (4, (4,), torch.int64)


def test_columns_are_named_in_a_file_of_more_and_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "films.csv"
    rows = [(label, number, text) for number, (text, label) in enumerate(ROWS)]
    write(path, rows, header=("verdict", "number", "review"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert TextsDataModule(path, "review", "verdict").classes == ["2", "bad", "good"]


def test_texts_may_have_commas_quotes_and_several_lines(tmp_path):
    texts = ['a "good" one, truly', "two\nlines", "déjà vu ⭐", "plain"] * 5
    path = write(tmp_path / "films.csv", [(text, str(row % 2)) for row, text in enumerate(texts)])
    data = TextsDataModule(path)
    assert {text for rows in read(data).values() for text, _ in rows} == set(texts)


def test_the_order_follows_from_seed_and_epoch(path):
    first, again, later = (read(TextsDataModule(path), epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first["train"] != later["train"]
    assert sorted(first["train"]) == sorted(later["train"])
    assert first["val"] == later["val"]
    assert sorted(read(TextsDataModule(path, seed=1))["val"]) != sorted(first["val"])


class Reader(Recorder):
    """Notes texts."""

    def note(self, split, batch, batch_idx):
        self.read[split].append(tuple(batch[0]))

    def training_step(self, batch, batch_idx):
        self.note("train", batch, batch_idx)
        return self.linear(torch.ones(1, 2)).mean()


@pytest.mark.parametrize("step", [2, 5])
def test_a_fit_cut_within_an_epoch_goes_on_with_the_same_texts(path, step, tmp_path):
    whole = Reader(write_to=tmp_path, save_at_step=step)
    make_trainer(max_epochs=2).fit(whole, TextsDataModule(path, batch_size=5))
    resumed = Reader()
    make_trainer(max_epochs=2).fit(
        resumed, TextsDataModule(path, batch_size=5), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
    )
    assert resumed.read["train"] == whole.read["train"][step:]
    assert len(whole.read["train"]) == 8


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, r"films.csv' to have a column 'text', but got an empty file\."),
        ("text,label\n", {}, r"Expected rows after the header of '.*films.csv', but got none\."),
        ("review,label\ngood,1\n", {}, r"to have a column 'text', but got 'review', 'label'\."),
        ("text,label\ngood,1\n", {"label_column": "class"}, r"to have a column 'class', but got 'text', 'label'\."),
        ("text,label\ngood,1\nbad,1\n", {}, r"Expected at least two classes in the column 'label' .* but got '1'\."),
        ("text,label\ngood,1\n  ,0\n", {}, r"in the column 'text' of every row of .* an empty one in row 2 after"),
        ("text,label\ngood,1\nbad,0\nfine\n", {}, r"in the column 'label' of every row of .* an empty one in row 3 "),
        ("text,label\ngood,1\nbad,0\n", {}, r"Expected at least one sample in each split, but got 0 of 2 for 'val'"),
        ('text,label\n"good,1\n', {}, r"Expected `path` to be a CSV file in UTF-8, but got '.*films.csv': unexpected"),
        ("text,label\ncaf\udce9,1\n", {}, r"Expected `path` to be a CSV file in UTF-8, but got '.*': 'utf-8' codec"),
    ],
)
def test_wrong_files_are_refused(content, arguments, message, tmp_path):
    path = tmp_path / "films.csv"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        TextsDataModule(path, **arguments).setup()


def test_a_file_that_is_not_there_and_arguments_out_of_range_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"Expected `path` to be an existing file, but got '.*nowhere.csv'"):
        TextsDataModule(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"Expected `val_fraction` to be a finite number in \(0, 1\), but got 0"):
        TextsDataModule(path, val_fraction=0)
    with pytest.raises(ValueError, match=r"Expected `batch_size` to be an integer of at least 1, but got 0\."):
        TextsDataModule(path, batch_size=0)
