"""The letters: a table to learn on that comes with the package."""

import torch
from sklearn.linear_model import LogisticRegression

from glai_lightning.datamodules import LetterDataModule


def test_the_rows_are_split_and_standardised_and_the_classes_are_letters():
    data = LetterDataModule()
    sizes = [len(data.splits[split]) for split in ("train", "val", "test")]
    assert sizes[1] >= 2000
    assert sum(sizes) == 20_000
    inputs, labels = data.splits.train
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(16))
    assert labels.unique().tolist() == list(range(26))
    assert (data.classes[0], data.classes[25], data.num_classes) == ("A", "Z", 26)


def test_the_test_rows_do_not_depend_on_the_seed():
    first, second = LetterDataModule(seed=0).splits, LetterDataModule(seed=1).splits
    assert torch.equal(first.test[1], second.test[1])
    assert not torch.equal(first.val[1], second.val[1])


def test_the_measurements_tell_the_letters_apart():
    data = LetterDataModule()
    model = LogisticRegression(max_iter=200).fit(*(part[:3000] for part in data.splits.train))
    assert model.score(*data.splits.test) > 0.7
