import sys
import warnings

import numpy as np
import pytest
import torch
from fits import make_trainer
from PIL import Image
from torchvision.transforms import v2

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.backbones import TimmBackbone
from glai_lightning.datamodules import ImageFolderDataModule


def write_images(folder, classes=("cat", "dog"), number=10, size=(9, 8)):
    """Write grey images whose brightness numbers them."""
    for position, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(number):
            pixels = np.full((size[1], size[0], 3), position * number + image, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image:02}.png")


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "images" / "train")
    return tmp_path / "images"


def batches_of(data, split="train", epoch=0):
    loader = getattr(data, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def brightness(batches):
    return [int(image.float().mean()) for images, _ in batches for image in images]


def test_every_image_is_in_one_split_with_the_label_of_its_folder(root):
    data = ImageFolderDataModule(root, batch_size=4)
    assert (data.classes, data.num_classes) == (["cat", "dog"], 2)
    batches = [batch for split in ("train", "val", "test") for batch in batches_of(data, split)]
    images, labels = batches[0]
    assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 8, 9), torch.uint8, torch.int64)
    assert sorted(brightness(batches)) == list(range(20))
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert labels == [int(number >= 10) for number in brightness(batches)]
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [12, 4, 4]


def test_folders_of_their_own_are_validated_and_tested_on(root):
    write_images(root / "val", number=3)
    data = ImageFolderDataModule(root, test_fraction=0)
    assert len(data.splits["train"]) == 20
    assert brightness(batches_of(data, "val")) == list(range(6))
    assert data.test_dataloader() == []
    write_images(root / "test", number=2)
    assert brightness(batches_of(ImageFolderDataModule(root), "test")) == list(range(4))


def test_order_and_random_transforms_follow_from_seed_and_epoch(root):
    def make(num_workers=0):
        transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise()])
        return ImageFolderDataModule(root, transform, batch_size=5, num_workers=num_workers)

    first, again, worker, later = (
        torch.cat([images for images, _ in batches_of(make(workers), epoch=epoch)])
        for workers, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, again)
    assert torch.equal(first, worker)
    assert not torch.equal(first, later)
    validated = [torch.cat([images for images, _ in batches_of(make(), "val", epoch)]) for epoch in (0, 1)]
    assert torch.equal(*validated)


def test_a_position_within_an_epoch_is_restored(root):
    loader = ImageFolderDataModule(root, batch_size=5).train_dataloader()
    whole = brightness(loader)
    iterator = iter(loader)
    read = brightness([next(iterator)])
    resumed = ImageFolderDataModule(root, batch_size=5).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert read + brightness(resumed) == whole


def damage(root):
    (root / "train" / "cat" / "03.png").write_bytes(b"")
    whole = (root / "train" / "dog" / "04.png").read_bytes()
    (root / "train" / "dog" / "04.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "dog" / "05.png").write_text("no image")


@pytest.mark.parametrize("name", ["cat/03.png", "dog/04.png", "dog/05.png"])
def test_an_image_that_cannot_be_read_is_named(root, name):
    whole = root / "train" / name
    kept = whole.read_bytes()
    damage(root)
    damaged = whole.read_bytes()
    for other in ("cat/03.png", "dog/04.png", "dog/05.png"):
        (root / "train" / other).write_bytes(damaged if other == name else kept)
    write_images(root / "val", number=1)
    data = ImageFolderDataModule(root, test_fraction=0)
    with pytest.raises(ValueError, match=rf"Expected an image that can be read, but got '.*{name}'"):
        batches_of(data)


def test_images_that_cannot_be_read_are_skipped_with_one_warning_that_names_them(root):
    damage(root)
    data = ImageFolderDataModule(root, on_error="skip", num_workers=2)
    with pytest.warns(UserWarning, match=r"Skipped images that cannot be read, 3: .*03.png.*04.png.*05.png") as caught:
        data.setup()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = [batch for split in ("train", "val", "test") for batch in batches_of(data, split)]
    assert sorted(brightness(batches)) == sorted(set(range(20)) - {3, 14, 15})


def test_images_of_different_sizes_are_refused_and_a_transform_makes_them_one(root):
    write_images(root / "val", ["cat"], number=1)
    write_images(root / "val", ["dog"], number=1, size=(20, 20))
    with pytest.raises(ValueError, match=r"to have the same shape, but got \[\(3, 8, 9\), \(3, 20, 20\)\]"):
        batches_of(ImageFolderDataModule(root), "val")
    ((images, _),) = batches_of(ImageFolderDataModule(root, v2.Resize([6, 7])), "val")
    assert (images.shape, images.dtype) == ((2, 3, 6, 7), torch.uint8)


@pytest.mark.parametrize(
    ("folders", "arguments", "message"),
    [
        ([], {}, "Expected `root` to be an existing folder, but got '"),
        (["val/cat"], {}, "Expected `root` to be a folder that holds 'train', but got '"),
        (["train"], {}, "Expected folders of at least two classes in '.*train', but got none."),
        (["train/cat"], {}, "Expected folders of at least two classes in '.*train', but got cat."),
        (["train/cat", "train/dog"], {}, "Expected images in the folders of '.*train', but got none that can be read."),
        (
            ["train/cat", "train/dog"],
            {"val_fraction": 1.0},
            r"Expected `val_fraction` to be a finite number in \(0, 1\), but got 1.0",
        ),
        (["train/cat", "train/dog"], {"test_fraction": 0.8}, r"Expected `test_fraction` to be in \[0, 1 - `val_f"),
        (["train/cat", "train/dog"], {"on_error": "keep"}, "Expected `on_error` to be 'raise' or 'skip', but got"),
        (
            ["train/cat", "train/dog"],
            {"batch_size": 0},
            "Expected `batch_size` to be an integer of at least 1, but got 0.",
        ),
    ],
)
def test_wrong_folders_and_arguments_are_refused(folders, arguments, message, tmp_path):
    for folder in folders:
        (tmp_path / "images" / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(tmp_path / "images", **arguments).setup()


def test_a_class_without_images_is_named(root):
    (root / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"Expected images of every class in '.*train', but got none of eel."):
        ImageFolderDataModule(root).setup()


def test_other_classes_than_those_of_training_are_refused(root):
    write_images(root / "test", ["cat", "eel"], number=1)
    with pytest.raises(ValueError, match=r"test' to be those of 'train', cat, dog, but got cat, eel."):
        ImageFolderDataModule(root).setup()


def test_too_few_images_to_split_are_refused(tmp_path):
    write_images(tmp_path / "train", number=1)
    with pytest.raises(ValueError, match=r"Expected at least one sample in each split, but got 0 of 2 for 'val'."):
        ImageFolderDataModule(tmp_path).setup()


def test_without_torchvision_the_line_that_installs_it_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glai-lightning\[vision\]'"):
        ImageFolderDataModule(root)


def test_a_head_on_a_named_backbone_is_trained_on_a_folder(root):
    backbone = TimmBackbone("test_resnet", pretrained=False)
    module = SupervisedModule(mlp_head(backbone.num_features, 8, 2), backbone)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, ImageFolderDataModule(root))
    assert "val/accuracy" in trainer.callback_metrics
