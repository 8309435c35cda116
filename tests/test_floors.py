"""The floors of the package: what may import what, read from the syntax trees of all of its files."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import glai_lightning

REPOSITORY = Path(__file__).parent.parent
#: Where the sources of each part of the package lie.
FOLDERS = {
    "glai_lightning": REPOSITORY / "glai_lightning",
    "glai_lightning.callbacks": REPOSITORY / "callbacks",
    "glai_lightning.datamodules": REPOSITORY / "datamodules",
    "glai_lightning.recipes": REPOSITORY / "recipes",
}

GROUND = {"checks", "optional"}
ENGINE = {"heads", "solvers"}
MIDDLE = {"callbacks", "modules", "datamodules", "backbones"}
#: Each part, and the other parts that it may import. A part that is not here fails the test.
MAY_IMPORT = {
    "checks": set(),
    "optional": {"checks"},
    "heads": GROUND,
    "solvers": GROUND | {"heads"},
    "fitting": GROUND | ENGINE,
    **dict.fromkeys(MIDDLE, GROUND | ENGINE | {"fitting"}),
    "recipes": set(),
    "comparison": GROUND | ENGINE | {"fitting"} | MIDDLE,
    "cli": GROUND | ENGINE | {"fitting", "comparison", "recipes"} | MIDDLE,
    "__main__": {"cli"},
    "__init__": ENGINE | {"modules", "_clone"},
    "environment": {"callbacks"},
    "_clone": set(),
}
#: Parts that are built on all others may use the package as its users do.
TOP = {"comparison", "cli"}
OPEN = {f"glai_lightning.{name}" for name in glai_lightning.__all__}
#: What else the engine may import, beside the standard library.
ENGINE_LIBRARIES = {"torch"}
MOST_LINES = 450


def source_files(folders=FOLDERS):
    """Yield the part that each source file belongs to, and the file."""
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if package == "glai_lightning":
                yield inside.parts[0].removesuffix(".py"), path
            else:
                yield package.split(".")[1], path


def imported_names(tree):
    """Yield the qualified name of everything that a file imports, anywhere in it, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which part they mean"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(files):
    """Return the imports that go up, or sideways, or to a library that the engine does without."""
    wrong = []
    for part, path in files:
        if part not in MAY_IMPORT:
            wrong.append(f"{path}: {part} has no floor")
            continue
        for name, line in imported_names(ast.parse(path.read_text())):
            library, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if library != "glai_lightning":
                if part in ENGINE | GROUND and library not in {*sys.stdlib_module_names, *ENGINE_LIBRARIES}:
                    wrong.append(f"{path}:{line}: {part} imports {library}")
            elif part in TOP and name in OPEN:
                continue
            elif other != part and other not in MAY_IMPORT[part]:
                wrong.append(f"{path}:{line}: {part} imports {other or 'all of it'}")
    return wrong


def test_imports_go_down_only():
    assert not wrong_imports(source_files())


@pytest.mark.parametrize(
    ("part", "line", "message"),
    [
        ("heads", "from glai_lightning.solvers.logistic import solve_logistic", "heads imports solvers"),
        ("heads", "from lightning.pytorch import Trainer", "heads imports lightning"),
        ("solvers", "import numpy as np", "solvers imports numpy"),
        ("fitting", "from glai_lightning.callbacks import FitReport", "fitting imports callbacks"),
        ("modules", "from glai_lightning import callbacks", "modules imports callbacks"),
        ("backbones", "import glai_lightning.datamodules.arrays", "backbones imports datamodules"),
        ("callbacks", "def late():\n    from glai_lightning.cli import main", "callbacks imports cli"),
        (
            "datamodules",
            "if TYPE_CHECKING:\n    from glai_lightning.modules import HeadModule",
            "datamodules imports mod",
        ),
        ("fitting", "import glai_lightning", "fitting imports all of it"),
        ("utils", "", "utils has no floor"),
    ],
)
def test_an_import_that_goes_up_is_found_wherever_it_stands(part, line, message, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(line)
    (found,) = wrong_imports([(part, path)])
    assert message in found


def test_every_part_and_every_package_has_sources():
    files = list(source_files())
    assert {part for part, _ in files} == set(MAY_IMPORT)
    assert all(folder.is_dir() for folder in FOLDERS.values())


def test_no_source_file_is_too_long_to_be_read():
    lines = {path: len(path.read_text().splitlines()) for _, path in source_files()}
    assert {str(path): count for path, count in lines.items() if count > MOST_LINES} == {}


#: Statements, each of which is run without what the ones before it have imported of this package, and what they leave
#: alone. Libraries stay imported, so those that need few come first.
STATEMENTS = {
    "import glai_lightning.cli": ["lightning", "glai_lightning.comparison"],
    "from glai_lightning.cli.main import main; main([]); main(['recipes'])": ["lightning"],
    "import glai_lightning.environment": ["lightning", "glai_lightning.callbacks", "torchmetrics"],
    "import glai_lightning, glai_lightning.heads": ["lightning", "torchmetrics", "matplotlib", "torchvision"],
    "import glai_lightning.solvers": ["lightning", "torchmetrics", "matplotlib", "sklearn", "scipy"],
    "from glai_lightning import HeadModule": ["glai_lightning.callbacks", "glai_lightning.datamodules", "sklearn"],
    "import glai_lightning.callbacks": ["glai_lightning.modules", "glai_lightning.datamodules", "sklearn"],
    "import glai_lightning.datamodules": ["glai_lightning.callbacks", "glai_lightning.modules", "sklearn"],
    # The twin of Lightning, which other parts of lightly import.
    "import lightly.transforms; from glai_lightning import SimCLRModule, mlp_head; SimCLRModule(mlp_head(4, 8, 3))": [
        "pytorch_lightning"
    ],
}
IMPORTS = """
import json, sys
for statement, absent in json.loads(sys.argv[1]).items():
    for name in [name for name in sys.modules if name.partition(".")[0] == "glai_lightning"]:
        del sys.modules[name]
    exec(statement, {})
    print(json.dumps([statement, sorted(set(absent) & set(sys.modules))]), file=sys.stderr)
"""


def test_an_import_brings_no_more_than_it_needs():
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, json.dumps(STATEMENTS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    brought = dict(json.loads(line) for line in ran.stderr.splitlines() if line.startswith('["'))
    assert brought == {statement: [] for statement in STATEMENTS}
