import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch.utils.data import Dataset

from glai_lightning.datamodules import DigitViewsDataModule, ViewsDataModule
from glai_lightning.datamodules.loader import EqualBatchSampler


def numbered(num_views=4, samples=30, labelled=True):
    """Views whose columns tell the view and the sample, and labels that number the samples."""
    views = torch.arange(num_views)[:, None] * 1000.0 + torch.arange(samples)
    arrays = {"views": torch.stack([views, -views], dim=-1)}
    return arrays | {"y": torch.arange(samples)} if labelled else arrays


class Images(Dataset):
    """Grey squares of PIL, with labels that number them."""

    def __init__(self, samples=12, labelled=True):
        self.samples = samples
        self.labelled = labelled

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        if index >= self.samples:
            raise IndexError
        image = Image.fromarray(np.full((16, 16, 3), 20 * index, dtype=np.uint8))
        return (image, index) if self.labelled else image


def noisy(image):
    return torch.rand(3, 4, 4) + np.random.rand()


def live(labelled=True, **options):
    options = {"transform": noisy, "batch_size": 4, "seed": 1} | options
    return ViewsDataModule(dataset=Images(labelled=labelled), **options)


def batches_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def by_sample(batches):
    return {int(label): views[:, row] for views, labels in batches for row, label in enumerate(labels)}


def test_every_training_sample_is_seen_once_an_epoch_through_two_different_views_of_its_own():
    data = ViewsDataModule(arrays=numbered(), batch_size=8)
    batches = batches_of(data)
    assert [views.shape for views, _ in batches] == [(2, 8, 2)] * 3
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == sorted(data.splits["train"].labels.tolist())
    cached = data.splits["train"].views
    for label, views in by_sample(batches).items():
        own = cached[:, data.splits["train"].labels == label].squeeze(1)
        which = [int((own == view).all(1).nonzero()) for view in views]
        assert len(set(which)) == 2


def test_views_are_drawn_anew_in_every_epoch_and_alike_by_the_same_seed():
    first, again, second = (
        by_sample(batches_of(ViewsDataModule(arrays=numbered(), batch_size=8), epoch)) for epoch in (0, 0, 1)
    )
    assert all(torch.equal(first[label], again[label]) for label in first)
    assert any(not torch.equal(first[label], second[label]) for label in first)


def test_all_views_can_be_asked_for():
    data = ViewsDataModule(arrays=numbered(), batch_size=8, num_views=4)
    views, labels = batches_of(data)[0]
    assert views.shape == (4, 8, 2)
    index = [data.splits["train"].labels.tolist().index(label) for label in labels.tolist()]
    assert torch.equal(views, data.splits["train"].views[:, index])


def test_cached_views_are_standardised_by_the_training_samples():
    data = ViewsDataModule(arrays={"views": torch.randn(3, 100, 2, 5).half() * 4 + 7}, test_fraction=0.1)
    training = data.splits["train"].views
    assert training.shape == (3, 70, 2, 5)
    assert training.dtype == torch.float32
    columns = training.flatten(2).flatten(0, 1)
    torch.testing.assert_close(columns.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(columns.var(0, correction=0), torch.ones(10))
    assert {split: rows.num_rows for split, rows in data.splits.items()} == {"train": 70, "val": 20, "test": 10}


def test_validation_is_the_same_in_every_epoch():
    for data in (ViewsDataModule(arrays=numbered()), live()):
        loader = data.val_dataloader()
        (first, _), *_ = list(loader)
        loader.sampler.set_epoch(5)
        (second, _), *_ = list(loader)
        assert torch.equal(first, second)


def test_without_labels_a_batch_has_none():
    for data in (ViewsDataModule(arrays=numbered(labelled=False)), live(labelled=False)):
        assert data.num_classes is None
        assert all(labels is None for _, labels in batches_of(data))


def test_a_file_is_read(tmp_path):
    np.savez(tmp_path / "views.npz", **{key: value.numpy() for key, value in numbered().items()})
    views, labels = batches_of(ViewsDataModule(tmp_path / "views.npz", batch_size=8))[0]
    assert (views.shape, labels.shape) == ((2, 8, 2), (8,))


def test_augmentation_follows_from_seed_epoch_and_sample_and_leaves_generators_alone():
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    small, large = by_sample(batches_of(live(batch_size=2))), by_sample(batches_of(live(batch_size=12)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert small.keys() == large.keys()
    assert all(torch.equal(small[label], large[label]) for label in small)
    assert all(not torch.equal(*views) for views in small.values())
    later = by_sample(batches_of(live(), epoch=1))
    assert all(not torch.equal(small[label], later[label]) for label in small)


def test_workers_make_the_same_batches():
    ours, theirs = batches_of(live(), epoch=2), batches_of(live(num_workers=2), epoch=2)
    assert len(ours) == len(theirs) == 3
    for (views, labels), (same_views, same_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(views, same_views)
        assert torch.equal(labels, same_labels)


def test_lightlys_transform_makes_the_views_of_images():
    transform = SimCLRTransform(input_size=8, gaussian_blur=0.5)
    views, labels = batches_of(live(transform=transform))[0]
    assert (views.shape, labels.shape) == ((2, 4, 3, 8, 8), (4,))
    again, _ = batches_of(live(transform=transform))[0]
    assert torch.equal(views, again)


class Reader(pl.LightningModule):
    """Notes what it reads, and saves a checkpoint after a step."""

    def __init__(self, save_at_step=None, path=None):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.read, self.save_at_step, self.path = [], save_at_step, path

    def training_step(self, batch, batch_idx):
        self.read.append((batch[1].tolist(), batch[0].sum().item()))
        return self.linear(batch[0].mean().reshape(1)).mean()

    def on_train_batch_end(self, *_):
        if self.global_step == self.save_at_step:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", enable_checkpointing=False, max_epochs=3, **quiet, **options)


@pytest.mark.parametrize("save_at_step", [2, 3, 4])
@pytest.mark.parametrize(
    "make",
    [lambda: ViewsDataModule(arrays=numbered(), batch_size=8), live, lambda: live(num_workers=1)],
    ids=["cached", "live", "live with a worker"],
)
def test_a_fit_cut_anywhere_goes_on_with_the_same_views(make, save_at_step, tmp_path):
    whole = Reader(save_at_step, tmp_path / "cut.ckpt")
    trainer().fit(whole, make())
    resumed = Reader()
    trainer().fit(resumed, make(), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert resumed.read == whole.read[save_at_step:]


class SaveRead(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.read, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.processes
def test_two_processes_read_batches_of_equal_size_and_no_sample_twice(tmp_path):
    # 15 samples to train on: two batches of three for each process, because Lightning shuffles the batches themselves.
    data = ViewsDataModule(arrays=numbered(samples=19), batch_size=4, val_fraction=0.2)
    trainer(devices=2, strategy="ddp_fork", callbacks=[SaveRead(tmp_path)]).fit(Reader(), data)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    epochs = []
    for epoch in range(3):
        batches = [labels for rank in ranks for labels, _ in rank[2 * epoch : 2 * epoch + 2]]
        assert [len(labels) for labels in batches] == [3] * 4
        epochs.append({label for labels in batches for label in labels})
    assert all(len(read) == 12 for read in epochs)
    assert epochs[0] != epochs[1]


def test_a_fit_without_test_samples_has_nothing_to_test():
    data = ViewsDataModule(arrays=numbered())
    assert data.test_dataloader() == []
    assert len(ViewsDataModule(arrays=numbered(), test_fraction=0.2).test_dataloader()) == 1


def test_digits_are_seen_through_views_that_differ():
    data = DigitViewsDataModule(batch_size=100)
    views, _ = next(iter(data.train_dataloader()))
    assert views.shape == (2, 99, 1, 8, 8)
    assert data.num_classes == 10
    assert {split: rows.num_rows for split, rows in data.splits.items()} == {"train": 1079, "val": 359, "test": 359}
    near = (views[0] - views[1]).flatten(1).norm(dim=1).mean()
    far = (views[0] - views[1].roll(1, 0)).flatten(1).norm(dim=1).mean()
    assert 0.2 * far < near < 0.9 * far


NAN_VIEW = torch.full((2, 10, 3), 1.0)
NAN_VIEW[1, 4, 2] = torch.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Expected one of `path`, `arrays` and `dataset`, but got none."),
        ({"path": "views.npz", "arrays": {}}, "but got `path` and `arrays`."),
        ({"path": "nowhere.npz"}, "Expected `path` to be an existing file, but got 'nowhere.npz'."),
        ({"arrays": {"x": 1}}, "Expected `arrays` to hold `views`, but it lacks `views`: it holds `x`."),
        ({"dataset": Images()}, "but got no transform with `dataset`."),
        ({"arrays": numbered(), "transform": noisy}, "but got a transform with `arrays`."),
        ({"arrays": numbered(), "num_views": 1}, "Expected `num_views` to be an integer of at least 2, but got 1."),
        ({"arrays": numbered(), "batch_size": 1}, "Expected `batch_size` to be an integer of at least 2, but got 1."),
        (
            {"arrays": numbered(), "val_fraction": 0.0},
            "Expected `val_fraction` to be a finite number in (0, 1), but got 0.0.",
        ),
        ({"arrays": numbered(), "test_fraction": 0.8}, "but got 0.8 with a `val_fraction` of 0.2."),
        ({"arrays": numbered(1)}, "Expected `views` to hold at least 2 views, but got 1."),
        ({"arrays": {"views": torch.zeros(2, 10)}}, "Expected `views` to have the shape (views, samples, features...)"),
        ({"arrays": {"views": NAN_VIEW}}, "Expected `views` to hold finite numbers, but got 1 NaN and 0 infinite"),
        (
            {"arrays": numbered() | {"y": torch.arange(7)}},
            "an integer for each of the 30 samples in `views`, but got (7,)",
        ),
        ({"arrays": numbered() | {"y": torch.zeros(30)}}, "an integer for each of the 30 samples"),
        ({"arrays": numbered() | {"y": -torch.arange(30)}}, "class labels of at least 0, but got -29"),
        ({"arrays": numbered(samples=4)}, "Expected at least two samples in each split, but got 1 of 4 for 'val'."),
    ],
)
def test_wrong_data_is_refused(arguments, message):
    with pytest.raises(ValueError, match="Expected") as caught:
        ViewsDataModule(**arguments).setup()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: [torch.zeros(2)], r"`num_views` \(2\) views of a sample, or one tensor, but got 1"),
        (lambda image: [torch.zeros(3), torch.zeros(2)], r"to have the same shape, but got \[\(2,\), \(3,\)\]"),
        (
            lambda image: torch.tensor([0.0, torch.inf]),
            "finite views, but got NaN or infinite numbers in one of sample",
        ),
    ],
)
def test_wrong_views_are_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        batches_of(live(transform=transform))


def test_a_transform_that_leaves_images_is_refused():
    with pytest.raises(TypeError, match="Expected `transform` to return tensors, but got `Image`"):
        batches_of(live(transform=lambda image: [image, image]))


def test_more_processes_than_pairs_of_samples_are_refused():
    with pytest.raises(ValueError, match="at least two rows for each of 4 processes, but got 7 rows"):
        EqualBatchSampler(7, 4, num_shards=4)


@pytest.mark.parametrize("num_rows", range(2, 40))
@pytest.mark.parametrize("batch_size", [2, 3, 4, 7])
def test_no_batch_is_larger_than_asked_for_by_more_than_one_or_left_with_a_single_row(num_rows, batch_size):
    sizes = [len(rows) for rows in EqualBatchSampler(num_rows, batch_size)]
    assert sum(sizes) == num_rows
    assert min(sizes) >= 2
    assert max(sizes) <= batch_size + (batch_size < 4)
    assert max(sizes) - min(sizes) <= 1
