"""The digits: real data without a download."""

import torch

from glai_lightning.datamodules import DigitsDataModule


def test_the_splits_share_all_images():
    digits = DigitsDataModule(val_fraction=0.25)
    sizes = [len(split[1]) for split in (digits.splits.train, digits.splits.val, digits.splits.test)]
    assert sizes == [1078, 359, 360]
    assert (digits.num_features, digits.num_classes) == (64, 10)


def test_the_seed_moves_validation_rows_but_no_test_rows():
    first, second = DigitsDataModule(seed=0), DigitsDataModule(seed=1)
    assert torch.equal(first.splits.test[1], second.splits.test[1])
    assert not torch.equal(first.splits.val[1], second.splits.val[1])


def test_the_test_rows_hold_the_digits_in_proportion():
    counts = DigitsDataModule().splits.test[1].bincount(minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_a_linear_classifier_learns_them():
    digits = DigitsDataModule()
    torch.manual_seed(0)
    classifier = torch.nn.Linear(digits.num_features, digits.num_classes)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    loader = digits.train_dataloader()
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)
        for inputs, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(classifier(inputs), labels).backward()
            optimizer.step()
    inputs, labels = digits.splits.test
    assert (classifier(inputs).argmax(1) == labels).float().mean() > 0.9
