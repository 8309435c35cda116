"""``glai export``, as a user runs it after a fit."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from fits import save_unfitted

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.backbones import conv_backbone
from glai_lightning.cli.main import main

RECIPE = str(Path(__file__).parent.parent.parent / "recipes" / "supervised.yaml")
SHORT = ["--trainer.max_epochs=3", "--model.head.hidden_features=32", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def save(module, path, spoil=lambda checkpoint: None):
    """Write the checkpoint of a module that was not fitted, with a description that is spoilt."""
    save_unfitted(module, path)
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint["glai_lightning"])
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", RECIPE, *SHORT, *QUIET]) == 0
        save(SupervisedModule(mlp_head(64, 8, 3), conv_backbone(3, 4, 1)), "images.ckpt")
        save(SupervisedModule(torch.nn.Linear(4, 3), num_classes=3), "own.ckpt", lambda d: d.update(head=None))
        save(SupervisedModule(mlp_head(4, 8, 3)), "later.ckpt", lambda d: d.update(version=9))
        np.savez("rows.npz", x=np.random.default_rng(0).integers(0, 17, (7, 64)).astype(np.float32))
        Path("fit.yaml").write_text("model: torch.nn.Linear")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(fitted, monkeypatch):
    monkeypatch.chdir(fitted)


def export(*arguments):
    return main(["export", *arguments])


def test_the_exported_model_predicts_what_glai_predict_writes(capsys):
    rows = np.load("rows.npz")["x"]
    assert main(["predict", "--ckpt_path=best", "--data=rows.npz", "--to=rows_labelled.npz"]) == 0
    assert export("--ckpt_path=best", "--to=onnx") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("best.ckpt as onnx: model.onnx")
    (logits,) = onnxruntime.InferenceSession("model.onnx").run(None, {"inputs": rows})
    predicted = np.load("rows_labelled.npz")["probabilities"]
    assert np.abs(torch.from_numpy(logits).softmax(1).numpy() - predicted).max() < 1e-5


@pytest.mark.parametrize("to", ["torch-export", "mlp", "safetensors"])
def test_every_format_is_written_where_it_is_asked_for(to, tmp_path):
    path = tmp_path / "model.pt2"
    assert export("--ckpt_path=last", f"--to={to}", f"--output={path}") == 0
    assert path.stat().st_size > 1000


def test_a_module_that_does_not_describe_itself_is_made_by_the_configuration_of_its_fit():
    Path("own.yaml").write_text(
        "model: {class_path: glai_lightning.SupervisedModule, init_args: {num_classes: 3, head: "
        "{class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 3}}}}"
    )
    assert export("--ckpt_path=own.ckpt", "--config=own.yaml", "--to=safetensors") == 0


def test_a_backbone_of_the_users_own_needs_the_shape_of_an_input():
    assert export("--ckpt_path=images.ckpt", "--to=torch-export", "--shape=3,8,8") == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to=onnx"], "Expected `--ckpt_path` to name a checkpoint, 'best' or 'last', but got none."),
        (["--ckpt_path=best"], "Expected `--to` to be 'onnx', 'torch-export', 'mlp' or 'safetensors', but got None."),
        (["--ckpt_path=best", "--to=m.onnx"], "but got 'm.onnx': `--output` names the file."),
        (["--ckpt_path=nowhere.ckpt", "--to=onnx"], "but got 'nowhere.ckpt', which does not exist"),
        (["--ckpt_path=rows.npz", "--to=onnx"], "Expected 'rows.npz' to be a checkpoint"),
        (["--ckpt_path=later.ckpt", "--to=onnx"], "to describe its module in version 1, but got version 9"),
        (["--ckpt_path=own.ckpt", "--to=onnx"], "Expected `--config` to name the configuration of the fit"),
        (["--ckpt_path=own.ckpt", "--to=onnx", "--config=nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["--ckpt_path=own.ckpt", "--to=onnx", "--config=rows.npz"], "to be a YAML file in UTF-8, but got 'rows.npz'"),
        (["--ckpt_path=own.ckpt", "--to=onnx", "--config=fit.yaml"], "to configure a `HeadModule` as `model`, but: "),
        (["--ckpt_path=images.ckpt", "--to=onnx"], "`glai export --shape 3,32,32` makes up one of that shape"),
        (["--ckpt_path=images.ckpt", "--to=onnx", "--shape=3x8"], "to hold the sizes of one input, as in 3,32,32"),
        (["--ckpt_path=images.ckpt", "--to=onnx", "--shape=3,9,99"], "that torch can trace, but it cannot: mat1 and"),
        (["--ckpt_path=best", "--to=mlp", "--output=nowhere/m.pt"], "to lie in an existing folder"),
        (["--ckpt_path=best", "--to=mlp", "--output=/proc/m.pt"], "'/proc/m.pt'"),
        (["--ckpt_path=best", "--to=mlp", "--output=/dev/full"], "No space left on device"),
    ],
)
def test_what_cannot_be_exported_is_answered_with_a_sentence(arguments, sentence, capsys):
    assert export(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line
