"""What README, docs and cards show is run: Python as it stands, YAML and commands at least until they are parsed.

The commands on a finished fit run for real. Backbones by name get random weights: nothing is downloaded.
"""

import os
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pandas
import pytest
import timm
import torch
import yaml
from PIL import Image

from glai_lightning import SupervisedModule, mlp_head
from glai_lightning.cli.main import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("recipes/*.md"))]
CHECKPOINT = Path("runs/supervised/version_0/checkpoints/best.ckpt")
SHORT = ["--trainer.max_epochs=3", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
PREPARING = ("python3 -m venv ", "source ", "pip install ", "uv pip install ", "make ")


def blocks(language):
    """Return the code in one language, or in none, with the document and the line that it stands in."""
    found, seen = [], set()
    for document in DOCUMENTS:
        text = document.read_text()
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE):
            if match[2] == language and match[3] not in seen:
                seen.add(match[3])
                name = f"{document.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
                found.append(pytest.param(document, textwrap.dedent(match[3]), id=name))
    return found


def commands():
    """Return every command once: of the blocks without a language, of the prose, and of the heads of the recipes."""
    lines = [line for block in blocks("") for line in block.values[1].replace("\\\n", " ").splitlines()]
    for document in DOCUMENTS:
        prose = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        lines += re.findall(r"`(glai \w+ [^`]+)`", prose)
    for recipe in ROOT.glob("recipes/*.yaml"):
        lines += re.findall(r"^#   (glai .*)$", recipe.read_text(), flags=re.MULTILINE)
    return sorted({" ".join(shlex.split(line, comments=True)) for line in lines} - {""})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a finished fit of the supervised recipe, and with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        os.symlink(ROOT / "recipes", "recipes")
        for recipe in ROOT.glob("recipes/*.yaml"):
            (folder / recipe.name).write_text(recipe.read_text())
        assert main(["fit", "--config", "supervised.yaml", *SHORT]) == 0
        generator = np.random.default_rng(0)
        np.savez("rows.npz", x=generator.integers(0, 17, (20, 64)))
        (folder / "best.ckpt").write_bytes(CHECKPOINT.read_bytes())
        frame = pandas.DataFrame({"age": range(40), "town": ["Lima", "Oslo"] * 20, "churned": ["yes", "no"] * 20})
        frame.to_csv("customers.csv", index=False)
        for number in range(10):
            image = Path(f"my_images/train/{'cat' if number % 2 else 'dog'}/{number}.jpg")
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
        np.savez("samples.npz", x=generator.random((2000, 4)), y=np.arange(2000) % 100)
        portion = {"x": generator.integers(0, 17, (60, 64)), "y": np.arange(60) % 10}
        for name, rows in (("portion", 60), ("withdrawn", 20)):
            np.savez(f"{name}.npz", **{key: values[:rows] for key, values in portion.items()})
        for site in ("site.pt", "other_site.pt"):
            solve = ["solve", "--ckpt_path=best.ckpt", f"--statistics={site}", "--add=portion.npz", "--to=updated.ckpt"]
            assert main(solve) == 0
        np.savez("views.npz", views=generator.random((2, 40, 192), dtype=np.float32))
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *names, **options: create(*names, **{**options, "pretrained": False})
    )


@pytest.fixture(scope="module")
def names():
    """Names that the Python of one document defines for what follows in it."""
    return {}


@pytest.mark.parametrize(("document", "code"), blocks("python"))
def test_python_runs(document, code, names):
    given = {
        "rows": np.load("rows.npz")["x"],
        "module": SupervisedModule(mlp_head(4, 8, 3)),
        "loader": [(torch.ones(2, 4), torch.tensor([0, 1]))],
    }
    known = names.setdefault(document, given)
    exec(compile(code, str(document), "exec"), known)
    if "module" in known and "data" in known:
        known["data"].setup()


@pytest.mark.parametrize(("document", "text"), blocks("yaml"))
def test_yaml_goes_into_the_recipe_that_it_is_about(document, text, capsys):
    configuration = yaml.safe_load(text)
    if {"head", "backbone"} & configuration.keys():
        configuration = {"model": {"init_args": configuration}}
    elif "groups" in configuration:
        configuration = {
            "data": {"class_path": "glai_lightning.datamodules.EpisodesDataModule", "init_args": configuration}
        }
    Path("block.yaml").write_text(yaml.safe_dump(configuration))
    base = document.with_suffix(".yaml") if document.parent.name == "recipes" else ROOT / "recipes" / "supervised.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(base), "--config", "block.yaml", "--print_config"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert yaml.safe_load(printed.out).keys() >= configuration.keys()


@pytest.mark.parametrize("command", commands())
def test_commands_are_taken(command, capsys):
    program, *arguments = shlex.split(command.replace("FILE", "rows.npz"))
    if command.startswith(PREPARING):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", *(re.findall(r"\[(.*)\]", command) or [""]))) <= extras.keys()
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert program != "make" or arguments[0] in targets
        return
    assert program == "glai"
    if arguments[0] == "demo":
        arguments.append("--help")
    elif arguments[0] in ("fit", "compare") and "--help" not in arguments:
        arguments.append("--print_config")
    elif arguments[0] == "recipes":
        arguments += ["--to", "copies", "--overwrite"]
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 0, capsys.readouterr().err


def test_benchmarks_that_pages_name_are_there_and_take_their_options():
    # Options of all benchmarks, and those that one of them hands on to `glai compare`.
    files = ("benchmarks/measuring.py", "glai_lightning/cli/compare.py")
    shared, named, faults = "".join((ROOT / file).read_text() for file in files), 0, []
    for document in [*DOCUMENTS, ROOT / "benchmarks" / "README.md"]:
        for name, options in re.findall(r"`python\s+(benchmarks/\w+\.py)([^`]*)`", document.read_text()):
            named += 1
            script = (ROOT / name).read_text() if (ROOT / name).exists() else ""
            unknown = [option for option in re.findall(r"--\w+", options) if f'"{option}"' not in script + shared]
            if not script or unknown:
                faults.append(
                    f"Expected {name} of {document.name} to be a script that takes {unknown}, but it is none."
                )
    assert named > 20
    assert not faults, "\n".join(faults)


def test_there_is_something_to_run():
    assert len(blocks("python")) > 10
    assert len(blocks("yaml")) > 6
    assert len(commands()) > 20
