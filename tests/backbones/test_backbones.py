"""Backbones of the real libraries, small and randomly initialised: nothing is downloaded."""

import shutil
import sys

import pytest
import timm
import torch
from fits import make_trainer
from PIL import Image
from text_encoders import write_encoder, write_sentence_encoder
from torch import nn
from torch.utils.data import DataLoader

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.backbones import (
    SentenceTransformersBackbone,
    TimmBackbone,
    TorchvisionBackbone,
    TransformersBackbone,
    conv_backbone,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def sentence_encoder(encoder, tmp_path_factory):
    return write_sentence_encoder(tmp_path_factory.mktemp("sentences"), encoder)


def test_timm_images_are_preprocessed_as_its_evaluation_transform_does():
    backbone = TimmBackbone("test_resnet", pretrained=False).eval()
    pixels = torch.randint(0, 256, (3, 200, 240), dtype=torch.uint8)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone.model))
    expected = transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    # Pillow rounds to whole pixel values after resizing.
    assert (backbone.preprocess(pixels[None])[0] - expected).abs().max() < 0.05
    assert backbone(pixels[None]).shape == (1, backbone.num_features)


def test_torchvision_images_are_preprocessed_as_its_weights_say():
    from torchvision.models import ResNet18_Weights

    backbone = TorchvisionBackbone("resnet18", pretrained=False).eval()
    images = torch.randint(0, 256, (2, 3, 260, 300), dtype=torch.uint8)
    assert torch.equal(backbone.preprocess(images), ResNet18_Weights.DEFAULT.transforms()(images))
    assert backbone(images).shape == (2, 512)


@pytest.mark.parametrize(("kind", "name"), [(TimmBackbone, "test_resnet"), (TorchvisionBackbone, "mobilenet_v3_small")])
def test_weights_come_from_a_local_file_with_or_without_a_classifier(kind, name, tmp_path):
    source = kind(name, pretrained=False)
    torch.save(source.model.state_dict(), tmp_path / "weights.pt")
    loaded = kind(name, weights=tmp_path / "weights.pt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())
    whole = timm.create_model(name) if kind is TimmBackbone else __import__("torchvision").models.get_model(name)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    kind(name, weights=tmp_path / "whole.pt")


@pytest.mark.parametrize(("kind", "near"), [(TimmBackbone, "resnet18"), (TorchvisionBackbone, "resnet18")])
def test_an_unknown_model_is_answered_with_those_near(kind, near):
    with pytest.raises(ValueError, match=f"but got 'resnet19'. Near it are .*'{near}'"):
        kind("resnet19")


@pytest.mark.parametrize("kind", [TimmBackbone, TorchvisionBackbone])
def test_weights_that_are_not_there_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="Expected `weights` to be an existing file"):
        kind("resnet18", weights=tmp_path / "weights.pt")


@pytest.mark.parametrize("kind", [TimmBackbone, TorchvisionBackbone])
def test_random_weights_are_said_loudly(kind):
    with pytest.warns(UserWarning, match=rf"The weights of `{kind.__name__}\('resnet18'\)` are random"):
        kind("resnet18", pretrained=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimmBackbone(3), "Expected `name` to be the name of a model, but got 3"),
        (lambda: TorchvisionBackbone("resnet18", pretrained="no"), "Expected `pretrained` to be True or False"),
        (lambda: TransformersBackbone(["bert"]), "Expected `name` to be the name of a model"),
        (lambda: SentenceTransformersBackbone(None), "Expected `name` to be the name of a model"),
    ],
)
def test_arguments_of_another_type_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("kind", [TransformersBackbone, SentenceTransformersBackbone])
def test_a_model_that_cannot_be_read_is_answered_with_a_sentence(kind, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="to be a model whose files are at hand or can be downloaded, but they cannot"):
        kind(str(tmp_path))


@pytest.mark.parametrize(("kind", "name"), [(TimmBackbone, "test_resnet"), (TorchvisionBackbone, "mobilenet_v3_small")])
def test_images_of_any_size_and_mode_are_one_batch(kind, name):
    backbone = kind(name, pretrained=False).eval()
    grey = Image.fromarray(torch.randint(0, 256, (90, 70), dtype=torch.uint8).numpy())
    pixels = torch.randint(0, 256, (3, 200, 240), dtype=torch.uint8)
    images = [grey, pixels, pixels.permute(1, 2, 0).numpy(), Image.fromarray(pixels.permute(1, 2, 0).numpy())]
    embeddings = backbone(images)
    assert embeddings.shape == (4, backbone.num_features)
    for same in embeddings[1:]:
        torch.testing.assert_close(same, backbone(pixels[None])[0])
    with pytest.raises(ValueError, match=r"Expected an image to be .* but got the shape \(1, 9, 9\)"):
        backbone([torch.zeros(1, 9, 9)])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_are_pooled_whatever_they_are_padded_to(encoder, pooling):
    backbone = TransformersBackbone(str(encoder), pooling=pooling).eval()
    texts = ["good film .", "very very bad film . . . . . . . . . . . ."]
    together = backbone(texts)
    assert together.shape == (2, 16) == (2, backbone.num_features)
    torch.testing.assert_close(together[:1], backbone(texts[:1]))
    torch.testing.assert_close(together, backbone(backbone.tokenize(texts)))


def test_sentences_are_embedded_as_the_library_does(sentence_encoder):
    backbone = SentenceTransformersBackbone(str(sentence_encoder)).eval()
    texts = ["good film .", "very bad"]
    torch.testing.assert_close(backbone(texts), torch.tensor(backbone.model.encode(texts)))
    torch.testing.assert_close(backbone(backbone.tokenize(texts)), backbone(texts))
    assert backbone.num_features == 16


def test_an_unknown_pooling_is_refused(encoder):
    with pytest.raises(ValueError, match="Expected `pooling` to be 'mean' or 'cls', but got 'max'"):
        TransformersBackbone(str(encoder), pooling="max")


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda: TimmBackbone("resnet18"), "timm", "vision"),
        (lambda: TorchvisionBackbone("resnet18"), "torchvision.models", "vision"),
        (lambda: TransformersBackbone("bert"), "transformers", "text"),
        (lambda: SentenceTransformersBackbone("bert"), "sentence_transformers", "text"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(make, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'glai-lightning\[{extra}\]'"):
        make()


def test_a_head_is_trained_on_texts_and_the_frozen_backbone_stands_still(encoder):
    backbone = TransformersBackbone(str(encoder))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    module = SupervisedModule(mlp_head(16, 32, 2), backbone)
    texts = [(["good film", "very bad film"][label], label) for label in (0, 1) * 16]

    def collate(batch):
        return [text for text, _ in batch], torch.tensor([label for _, label in batch])

    make_trainer(max_epochs=30).fit(module, DataLoader(texts, batch_size=8, collate_fn=collate))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not any(child.training for child in backbone.modules())
    logits = module.eval()(["good film", "very bad film"])
    assert nn.functional.cross_entropy(logits, torch.tensor([0, 1])) < 0.6


@pytest.mark.parametrize("kind", [TransformersBackbone, SentenceTransformersBackbone])
def test_a_text_encoder_travels_in_the_checkpoint_with_its_tokenizer(kind, encoder, sentence_encoder, tmp_path):
    source = shutil.copytree(encoder if kind is TransformersBackbone else sentence_encoder, tmp_path / "encoder")
    module = SupervisedModule(mlp_head(16, 8, 2), kind(str(source)))
    texts = ["good film .", "very very bad film", "bad ."]
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, DataLoader([(text, 0) for text in texts], batch_size=3))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    shutil.rmtree(source)
    loaded = SupervisedModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(loaded.predict(texts).probabilities, module.eval()(texts).softmax(1))


def test_conv_backbone_halves_images_in_every_block():
    grey, coloured = torch.zeros(2, 28, 28), torch.zeros(2, 3, 8, 8)
    assert conv_backbone(channels=4)(grey).shape == (2, 4)
    assert conv_backbone(3, channels=4, blocks=2)(coloured).shape == (2, 16)


@pytest.mark.parametrize(("blocks", "error"), [(0, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)])
def test_conv_backbone_refuses_a_size_that_is_none(blocks, error):
    with pytest.raises(error, match=r"Expected `blocks` to be an integer of at least 1, but got"):
        conv_backbone(blocks=blocks)
