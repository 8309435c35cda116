"""The matrix of docs/versioning.md: `nox -s tests-3.12`, `nox -s lowest`, `nox -s build`."""

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "tests", "lowest", "build"]

PYTHONS = ["3.11", "3.12", "3.13"]
LOWEST_PYTHON = "3.11"
#: CUDA builds of PyTorch are ten times as large, and the tests run on the CPU.
CPU = "--torch-backend=cpu"
#: What an engine of the lowest versions has to pass; data modules and backbones bring packages of their own.
LOWEST_TESTS = ["tests/heads", "tests/solvers", "tests/fitting", "tests/test_versions.py"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """All tests, on the versions of constraints.txt."""
    session.install(CPU, "-c", "constraints.txt", "-e", ".[test]", "pip", "setuptools", "wheel")
    session.run("python", "tests/torchvision_operators.py")
    session.run("tests/install_learn2learn.sh", str(Path(session.bin, "python")), external=True)
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python=LOWEST_PYTHON)
def lowest(session: nox.Session) -> None:
    """Heads, solvers and fits, on the lowest versions that pyproject.toml names."""
    session.install(CPU, "--resolution=lowest-direct", "-e", ".[test]")
    session.run("python", "tests/torchvision_operators.py")
    session.run("python", "-m", "pytest", *(session.posargs or LOWEST_TESTS))


@nox.session(python=LOWEST_PYTHON)
def lint(session: nox.Session) -> None:
    """Lint code and notebooks."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=LOWEST_PYTHON)
def build(session: nox.Session) -> None:
    """Both distributions, their metadata, and an import from each."""
    session.install("build", "twine")
    made = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", made)
    distributions = sorted(map(str, Path(made).glob("glai_lightning-*")))
    session.run("twine", "check", "--strict", *distributions)
    for distribution in distributions:
        session.install(CPU, "--reinstall-package=glai-lightning", distribution)
        # Isolated, or it would import the sources in the current folder.
        imports = "import glai_lightning.callbacks, glai_lightning.cli, glai_lightning.recipes"
        session.run("python", "-I", "-c", f"{imports}; print(glai_lightning)")
