"""What ``glai`` says of itself."""

import sys

import pytest
import yaml

from glai_lightning import __version__
from glai_lightning.cli.help import class_help, command_help, overview
from glai_lightning.cli.main import main
from glai_lightning.comparison.variants import VARIANTS
from glai_lightning.datamodules import __all__ as data_modules

COMMANDS = ("fit", "validate", "test", "predict", "export", "solve", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_a_page_of_80_columns(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text == command_help(command) + "\n"
    lines = text.splitlines()
    assert len(lines) < 120
    assert max(map(len, lines)) <= 80
    assert "..." not in text.replace("...)", "")


def test_bare_glai_and_its_help_show_the_commands_and_a_first_step(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    first, second = capsys.readouterr().out.split(overview())[:2]
    assert first.strip() == second.strip() == ""
    assert "glai fit --config supervised.yaml" in overview()
    assert all(f"\n  {command} " in overview() for command in (*COMMANDS, "recipes"))
    assert len(overview().splitlines()) < 120


def test_the_help_of_fit_lists_modules_and_data_modules():
    text = command_help("fit")
    for name in ("SupervisedModule", "mlp_head", "TimmBackbone", "StructureFreezeCallback", *data_modules):
        assert f"\n  {name}" in text


def test_the_help_of_compare_lists_its_variants_and_exit_codes():
    text = " ".join(command_help("compare").split())
    assert all(variant.description.split(",")[0] in text for variant in VARIANTS.values())
    assert "0 faster and not worse, 3 no difference, 4 slower or worse" in text


def test_a_class_is_described_with_all_its_arguments(capsys):
    assert main(["fit", "--help", "SupervisedModule"]) == 0
    text = capsys.readouterr().out
    for argument in ("head", "backbone", "freeze_backbone", "optimizer", "lr_scheduler", "num_classes", "task"):
        assert f"\n  {argument} " in text
    assert "(default: 'classification')" in " ".join(text.split())
    assert "glai_lightning.modules.supervised.SupervisedModule" in text


def test_a_class_of_any_library_is_described():
    assert "max_epochs" in class_help("lightning.pytorch.Trainer")


def test_a_class_that_is_not_there_is_answered_with_those_that_are(capsys):
    assert main(["fit", "--help", "Nothing"]) == 1
    assert "'SupervisedModule'" in capsys.readouterr().err


def test_versions_are_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"glai-lightning {__version__}, torch ")


OWN = """
from glai_lightning import SupervisedModule, mlp_head


class Own(SupervisedModule):
    def __init__(self):
        super().__init__(mlp_head(64, 8, 10))
"""


def test_a_module_in_the_current_folder_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(OWN)
    configuration = {"model": "own_module.Own", "data": "glai_lightning.datamodules.DigitsDataModule"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**configuration, "trainer": {"fast_dev_run": True}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["fit", "--config", "own.yaml"]) == 0
