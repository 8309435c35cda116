"""A checkpoint is a model: what it takes to use it travels in it, in tensors and primitives."""

import pytest
import torch
from fits import CLASSES, FEATURES, HIDDEN, make_data, make_loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader

from glai_lightning import GLAIHead, HeadModule, SimCLRModule, SupervisedModule, mlp_head
from glai_lightning.backbones import TimmBackbone, TorchvisionBackbone, conv_backbone
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import FeaturesDataModule, TextsDataModule


def far_arrays():
    """Columns far from zero and of very different scales, which a head cannot do with as they are."""
    x, y = make_data(240)
    x = x * torch.logspace(-3, 3, FEATURES) + torch.logspace(3, 0, FEATURES)
    return {"x_train": x[:180], "y_train": y[:180], "x_test": x[180:], "y_test": y[180:]}


def far_data():
    return FeaturesDataModule(arrays=far_arrays())


def fitted(module, data, folder, *callbacks, epochs=3):
    trainer = make_trainer(*callbacks, max_epochs=epochs)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


def head(**options):
    return mlp_head(FEATURES, [HIDDEN, 16], CLASSES, **options)


@pytest.mark.parametrize("paths", [None, "output", "tangent", "independent"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_checkpoint_alone_predicts_what_the_fit_predicted_from_rows_as_they_come(paths, batch_norm, tmp_path):
    module, data = SupervisedModule(head(batch_norm=batch_norm, dropout=0.1)), far_data()
    freeze = [] if paths is None else [StructureFreezeCallback(paths=paths, freeze_at_epoch=1)]
    path = fitted(module, data, tmp_path, *freeze)
    expected = torch.cat(make_trainer().predict(module, data)).softmax(1)
    loaded = SupervisedModule.load_from_checkpoint(path)
    assert isinstance(loaded.head, GLAIHead) is (paths is not None)
    rows = far_arrays()["x_test"]
    for same in (rows, rows.double(), rows.numpy(), rows.tolist()):
        predicted = loaded.predict(same, batch_size=7)
        torch.testing.assert_close(predicted.probabilities, expected, rtol=0, atol=1e-5)
        assert predicted.labels == expected.argmax(1).tolist()


def test_a_checkpoint_holds_tensors_and_primitives_alone(tmp_path):
    module = SupervisedModule(mlp_head(4, HIDDEN, CLASSES), conv_backbone(channels=4, blocks=2))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, DataLoader([(torch.rand(4, 4), 1), (torch.rand(4, 4), 0)], batch_size=2))
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    described = torch.load(path, weights_only=True)["glai_lightning"]
    assert described["version"] == 1
    assert described["head"]["layers"]["0"]["arguments"] == {"in_features": 4, "out_features": HIDDEN, "bias": True}
    assert described["classes"] is None
    images = torch.rand(3, 4, 4)
    loaded = SupervisedModule.load_from_checkpoint(path)
    torch.testing.assert_close(loaded.predict(images).probabilities, module.eval()(images).softmax(1))


@pytest.mark.parametrize(("kind", "name"), [(TimmBackbone, "test_resnet"), (TorchvisionBackbone, "mobilenet_v3_small")])
def test_an_image_backbone_travels_with_its_preprocessing(kind, name, tmp_path):
    backbone = kind(name, pretrained=False)
    backbone.preprocessing["mean"] = [0.1, 0.2, 0.3]
    images = torch.randint(0, 256, (8, 3, 40, 50), dtype=torch.uint8)
    module = SupervisedModule(mlp_head(backbone.num_features, 16, 2), backbone)
    path = fitted(module, DataLoader(list(zip(images, torch.arange(8) % 2, strict=True)), batch_size=4), tmp_path)
    loaded = SupervisedModule.load_from_checkpoint(path)
    assert loaded.backbone.preprocessing == backbone.preprocessing
    expected = module.eval()(images).softmax(1)
    assert torch.equal(loaded.predict(images).probabilities, expected)
    torch.testing.assert_close(loaded.predict(list(images), batch_size=3).probabilities, expected)


def test_classes_travel_and_are_what_is_predicted(tmp_path):
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *["good,yes", "bad,no"] * 20]))

    class Letters(nn.Module):
        def forward(self, texts):
            return torch.tensor([[float(text.count(letter)) for letter in "god"] for text in texts])

    module = SupervisedModule(mlp_head(3, 16, 2), Letters())
    path = fitted(module, TextsDataModule(tmp_path / "texts.csv"), tmp_path, epochs=20)
    loaded = SupervisedModule.load_from_checkpoint(path, backbone=Letters())
    assert loaded.classes == ["no", "yes"]
    assert loaded.predict(["bad", "good", "bad"]).labels == ["no", "yes", "no"]


def test_what_is_not_described_is_asked_for(tmp_path):
    class Own(nn.Sequential):
        pass

    module = SupervisedModule(Own(*head()))
    path = fitted(module, make_loader(), tmp_path)
    with pytest.raises(ValueError, match=r"Expected `head` to be given for .* which does not describe it, but got"):
        SupervisedModule.load_from_checkpoint(path)
    loaded = SupervisedModule.load_from_checkpoint(path, head=Own(*head()))
    assert torch.equal(loaded.head[0].weight, module.head[0].weight)


@pytest.mark.parametrize("cls", [HeadModule, SimCLRModule])
def test_other_modules_are_loaded_without_arguments_too(cls, tmp_path):
    module = cls(head())
    trainer = make_trainer(max_epochs=0)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = cls.load_from_checkpoint(tmp_path / "model.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["head"]["layers"]["0"].update({"class": "os.system"}), "but it names 'os.system'"),
        (lambda d: d["head"]["layers"]["0"].update({"class": "torch.nn.Module.load"}), "but it names"),
        (lambda d: d["head"]["layers"]["0"].update({"class": "glai_lightning.cli.main"}), "but it names"),
        (lambda d: d["head"]["layers"]["0"]["arguments"].update({"in_features": 10**12}), "at most the .* numbers"),
        (lambda d: d["head"]["layers"]["0"].pop("arguments"), "but it cannot be made"),
        (lambda d: d["head"]["layers"]["1"]["arguments"].update({"depth": 3}), "but it cannot be made"),
        (lambda d: d.update({"version": 2}), "to describe its module in version 1, but got version 2"),
        (lambda d: d.update({"task": "regression"}), "Expected the checkpoint of a classification, but got one of a"),
        (lambda d: d.update({"module": "glai_lightning.SimCLRModule"}), "checkpoint of a `SupervisedModule`, but got"),
        (lambda d: d.update({"head": [1]}), "Expected the description of a module"),
        (lambda d: d.update({"classes": ["a", 3]}), "to hold at most 3 class names, but got"),
        (
            lambda d: d.update(
                {
                    "has_backbone": True,
                    "backbone": {
                        "class": "glai_lightning.backbones.TransformersBackbone",
                        "description": {
                            "files": {"../out.json": torch.zeros(1, dtype=torch.uint8)},
                            "pooling": "mean",
                            "max_length": 3,
                        },
                    },
                }
            ),
            "to lie in one folder, but got '../out.json'",
        ),
    ],
)
def test_a_description_from_anywhere_is_answered_with_a_sentence(spoil, message, tmp_path):
    path = fitted(SupervisedModule(head()), make_loader(), tmp_path, epochs=1)
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint["glai_lightning"])
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        SupervisedModule.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(3, FEATURES + 1), ValueError, r"rows of 8 numbers, but got the shape \(3, 9\)"),
        (torch.zeros(FEATURES), ValueError, "rows of 8 numbers"),
        ([], ValueError, "at least one input, but got none"),
        ("good", TypeError, "to be a tensor or a sequence, but got `str`"),
        (3, TypeError, "to be a tensor or a sequence"),
        ([["a"] * FEATURES], ValueError, "rows of numbers, but they cannot be read"),
        ([[0.0] * FEATURES, [float("nan")] * FEATURES], ValueError, r"row 1 \(counted from 0\) holds others"),
    ],
)
def test_inputs_that_are_none_are_answered_with_a_sentence(inputs, error, message):
    module = SupervisedModule(head())
    with pytest.raises(error, match=message):
        module.predict(inputs)


def test_a_prediction_leaves_the_module_as_it_was():
    module = SupervisedModule(head(dropout=0.5), nn.Dropout(0.5)).train()
    modes = [child.training for child in module.modules()]
    assert torch.equal(*(module.predict(torch.ones(2, FEATURES)).probabilities))
    assert [child.training for child in module.modules()] == modes


def test_a_regression_predicts_values(tmp_path):
    x = torch.randn(100, FEATURES) * 3 + 50
    y = x[:, 0] - 50
    data = FeaturesDataModule(arrays={"x_train": x, "y_train": y, "x_test": x, "y_test": y})
    module = SupervisedModule(mlp_head(FEATURES, 32, 1), task="regression")
    path = fitted(module, data, tmp_path, epochs=30)
    values = SupervisedModule.load_from_checkpoint(path).predict(x)
    torch.testing.assert_close(values, torch.cat(make_trainer().predict(module, data)), rtol=0, atol=1e-4)


def test_embeddings_that_a_data_module_standardised_cannot_be_taken_as_they_come(tmp_path):
    module = SupervisedModule(head(), nn.Linear(FEATURES, FEATURES))
    path = fitted(module, far_data(), tmp_path)
    loaded = SupervisedModule.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="the data module of the fit standardised"):
        loaded.predict(torch.zeros(2, FEATURES))
