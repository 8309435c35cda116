"""The recipes with backbones by name, on tiny data and backbones of random weights: nothing is downloaded."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from text_encoders import write_encoder, write_sentence_encoder

from glai_lightning.cli.main import main

RECIPES = Path(__file__).parent.parent.parent / "recipes"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_images(folder):
    """Write bright and dark images, wider than high."""
    generator = np.random.default_rng(0)
    for name, low in (("bright", 128), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for image in range(10):
            pixels = generator.integers(low, low + 128, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")


def read_predictions():
    with Path("predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table_of(recipe, capsys, *arguments):
    assert main(["fit", "--config", str(RECIPES / f"{recipe}.yaml"), *QUIET, *arguments]) == 0
    return capsys.readouterr().out.split("Fit report")[1]


def test_the_images_recipe_freezes_its_head_and_is_tested(capsys):
    write_images(Path("my_images/train"))
    small = ["--model.backbone.name=test_resnet", "--model.backbone.pretrained=false", "--model.head.in_features=96"]
    table = table_of("images", capsys, *small, "--data.num_workers=0", "--trainer.max_epochs=10")
    assert "structure  " in table
    assert "(best.ckpt)" in table
    assert Path("runs/images/version_0/structure_churn.png").exists()
    assert main(["predict", "--ckpt_path=best", "--data=my_images/train"]) == 0
    predicted = read_predictions()
    assert [row["file"] for row in predicted][:2] == ["bright/0.png", "bright/1.png"]
    assert len(predicted) == 20
    assert {row["label"] for row in predicted} <= {"bright", "dark"}
    assert main(["predict", "--ckpt_path=best", "--data=my_images/train", "--to=predictions.npz"]) == 0
    with np.load("predictions.npz") as arrays:
        assert arrays["file"].tolist() == [row["file"] for row in predicted]
        written = [[float(row["probability_bright"]), float(row["probability_dark"])] for row in predicted]
        assert np.allclose(arrays["probabilities"], written, atol=1e-5)


@pytest.mark.parametrize("backbone", ["SentenceTransformersBackbone", "TransformersBackbone"])
def test_the_texts_recipe_freezes_its_head_and_is_tested(backbone, tmp_path, capsys):
    encoder = write_encoder(tmp_path / "encoder")
    if backbone == "SentenceTransformersBackbone":
        encoder = write_sentence_encoder(tmp_path / "sentences", encoder)
    sentences = [f"{'very ' * (row % 5)}{verdict} film .,{verdict}" for row in range(30) for verdict in ("good", "bad")]
    Path("my_texts.csv").write_text("\n".join(["text,label", *sentences]))
    small = [f"--model.backbone=glai_lightning.backbones.{backbone}", f"--model.backbone.name={encoder}"]
    table = table_of("texts", capsys, *small, "--model.head.in_features=16")
    assert "structure  " in table
    assert "(best.ckpt)" in table
    assert Path("runs/texts/version_0/structure_churn.png").exists()
    Path("unlabelled.csv").write_text("text\na good film .\n")
    assert main(["predict", "--ckpt_path=best", "--data=unlabelled.csv"]) == 0
    assert len(read_predictions()) == 1
