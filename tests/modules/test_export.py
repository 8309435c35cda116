"""Files for use without this package give what the module gives, to 1e-5, at any batch size."""

import copy
import functools
import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from fits import CLASSES, FEATURES, HIDDEN, make_data, make_trainer
from safetensors import safe_open
from torch import nn

from glai_lightning import PrototypicalModule, SimCLRModule, SupervisedModule, mlp_head
from glai_lightning.backbones import TimmBackbone, TorchvisionBackbone, conv_backbone
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.heads import freeze_in_place
from glai_lightning.modules.export import export_model

ROWS = make_data(240)[0] * 100 + 1000


@functools.cache
def fitted_module():
    """A module that was fitted on standardised rows."""
    x, y = ROWS, make_data(240)[1]
    module = SupervisedModule(mlp_head(FEATURES, [HIDDEN, 16], CLASSES, batch_norm=True, dropout=0.2))
    arrays = {"x_train": x[:180], "y_train": y[:180], "x_test": x[180:], "y_test": y[180:]}
    make_trainer(max_epochs=2).fit(module, FeaturesDataModule(arrays=arrays))
    module.trainer = None
    return module


def frozen_module(paths="output"):
    """The fitted module, its head frozen."""
    module = copy.deepcopy(fitted_module())
    if paths is not None:
        module.head = freeze_in_place(module.head, paths=paths)
    return module.eval()


def run_onnx(path, *inputs):
    session = onnxruntime.InferenceSession(str(path))
    fed = {entry.name: part.numpy() for entry, part in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(["outputs"], fed)[0])


def run_torch_export(path, *inputs):
    return torch.export.load(path).module()(*inputs)


def run_mlp(path, inputs):
    saved = torch.load(path, weights_only=True)
    mlp = nn.Sequential(*(getattr(nn, name.removeprefix("torch.nn."))(**options) for name, options in saved["layers"]))
    mlp.load_state_dict(saved["state_dict"])
    return mlp.eval()(inputs)


FILES = {"onnx": ("model.onnx", run_onnx), "torch-export": ("model.pt2", run_torch_export), "mlp": ("m.pt", run_mlp)}


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("paths", [None, "output", "tangent", "independent"])
def test_a_file_gives_what_the_module_gives_for_rows_as_they_come(paths, to, tmp_path):
    module = frozen_module(paths)
    name, run = FILES[to]
    if to == "mlp" and paths in ("tangent", "independent"):
        with pytest.raises(ValueError, match="Expected `paths` to be 'output' to make an MLP of the head"):
            export_model(module, to, tmp_path / name)
        return
    path = export_model(module, to, tmp_path / name)
    expected = module.deployed()(ROWS)
    for batch in (1, 2, 240):
        torch.testing.assert_close(run(path, ROWS[:batch]), expected[:batch], rtol=0, atol=1e-5)


def test_onnx_is_written_by_lightnings_own_method(tmp_path):
    module = frozen_module()
    module.train()
    module.to_onnx(tmp_path / "model.onnx")
    assert module.training
    expected = module.eval().deployed()(ROWS[:5])
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", ROWS[:5]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: conv_backbone(3, 4, 2),
        lambda: TimmBackbone("test_resnet", pretrained=False),
        lambda: TorchvisionBackbone("mobilenet_v3_small", pretrained=False),
    ],
    ids=["convolutional", "timm", "torchvision"],
)
def test_an_image_backbone_is_exported_with_its_preprocessing(make, to, tmp_path):
    backbone = make().eval()
    side = backbone.preprocessing["size"][0] if hasattr(backbone, "preprocessing") else 16
    images = torch.rand(3, 3, side, side)
    module = SupervisedModule(mlp_head(backbone(images).shape[1], 8, 2), backbone).eval()
    # Not measured: embeddings of random weights hardly vary, and rounding would be blown up with them.
    module.standardise.set(torch.full((backbone(images).shape[1],), 0.1), torch.full((backbone(images).shape[1],), 2.0))
    name, run = FILES[to]
    path = export_model(module, to, tmp_path / name, images[:2] if side == 16 else None)
    expected = module(images)
    for batch in (1, 3):
        torch.testing.assert_close(run(path, images[:batch]), expected[:batch], rtol=0, atol=1e-5)


def test_an_exported_prototypical_module_classifies_episodes_as_the_module_does(tmp_path):
    module = PrototypicalModule(mlp_head(FEATURES, HIDDEN, 8)).eval()
    module.standardise.set(ROWS.mean(0), ROWS.std(0))
    module.inputs_standardised = True
    rows, labels = module.standardise(ROWS[:18]).float(), torch.arange(6) % 3
    expected = module.predict_step({"support": rows[:6], "support_labels": labels, "query": rows[6:]}, 0)
    embeddings = run_torch_export(export_model(module, "torch-export", tmp_path / "model.pt2"), ROWS[:18])
    prototypes = torch.stack([embeddings[:6][labels == label].mean(0) for label in range(3)])
    logits = -(embeddings[6:, None] - prototypes).square().sum(2)
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1), rtol=0, atol=1e-5)


def test_an_exported_simclr_module_projects_as_the_module_does(tmp_path):
    backbone, images = conv_backbone(3, 4, 1).eval(), torch.rand(5, 3, 8, 8)
    module = SimCLRModule(mlp_head(backbone(images).shape[1], 8, 2), backbone).eval()
    path = export_model(module, "torch-export", tmp_path / "model.pt2", images[:2])
    torch.testing.assert_close(run_torch_export(path, images), module(images), rtol=0, atol=1e-5)


def test_safetensors_hold_the_weights_and_a_description(tmp_path):
    module = frozen_module()
    path = export_model(module, "safetensors", tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["glai_lightning"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert described["head"]["layers"]["0"]["class"] == "torch.nn.Linear"
    assert all(torch.equal(value, weights[key]) for key, value in module.deployed().state_dict().items())


class Odd(nn.Module):
    """A head that torch cannot trace."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.linear(x) if float(x.sum()) > 0 else self.linear(-x)


def odd_module():
    return SupervisedModule(Odd(), num_classes=CLASSES)


@pytest.mark.parametrize(
    ("make", "to", "name", "message"),
    [
        (frozen_module, "tflite", "m", "Expected `to` to be 'onnx', 'torch-export', 'mlp' or 'safetensors', but got"),
        (frozen_module, "onnx", "nowhere/m.onnx", "to lie in an existing folder, but got"),
        (frozen_module, "onnx", ".", "to be a file, but got the folder"),
        (frozen_module, "torch-export", "m.bin", r"to end in '\.pt2' for 'torch-export', but got"),
        (
            lambda: SupervisedModule(Odd(), num_classes=3),
            "torch-export",
            "m.pt2",
            "that torch can trace, but it cannot",
        ),
        (odd_module, "onnx", "m.onnx", "that torch can trace, but it cannot"),
        (
            lambda: SupervisedModule(Odd(), num_classes=3),
            "mlp",
            "m.pt",
            "an `nn.Sequential`, .* but got `Odd`",
        ),
        (lambda: SupervisedModule(mlp_head(4, 8, 3), conv_backbone()), "onnx", "m.onnx", "an example of the inputs of"),
        (lambda: nn.Linear(3, 4), "onnx", "m.onnx", "Expected `module` to be a `HeadModule`, but got Linear"),
    ],
)
def test_what_cannot_be_exported_is_answered_with_a_sentence(make, to, name, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        export_model(make(), to, tmp_path / name)
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_a_missing_onnx_is_named_with_the_line_that_installs_it(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"Expected `{library}` to be installed for an export to ONNX") as e:
        SupervisedModule(mlp_head(4, 8, 3)).to_onnx("model.onnx")
    assert "pip install 'glai-lightning[export]'" in str(e.value)
