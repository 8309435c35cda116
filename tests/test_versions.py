"""The matrix of docs/versioning.md: what it names, what the project asks for, and what is installed."""

import ast
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.version import Version

import glai_lightning

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "versioning.md").read_text()


def requirements():
    """Return the lowest version of each package that the package itself can use."""
    extras = PROJECT["optional-dependencies"]
    used = re.findall(r"\w+", re.search(r"\[(.*)\]", extras["all"][0])[1])
    lines = [*PROJECT["dependencies"], *(line for extra in used for line in extras[extra])]
    return {re.match(r"[\w-]+", line)[0]: re.search(r">=([\d.]+)", line)[1] for line in lines}


def table(columns):
    return dict(re.findall(r"^\| ([\w.-]+) \| " + columns, PAGE, flags=re.MULTILINE))


def unequal(named, asked_for, column):
    """Say which packages the page names with another version than is asked for or tested, in sentences."""
    return [
        f"Expected docs/versioning.md to name {name} with {asked_for.get(name)} as the {column} version, but got "
        f"{named.get(name)}."
        for name in sorted(named.keys() | asked_for.keys())
        if named.get(name) != asked_for.get(name)
    ]


def outside_of_the_matrix(lowest, installed):
    """Say which installed packages lie below the lowest version, in sentences."""
    return [
        f"Expected {name} to be at least {lowest[name]}, which docs/versioning.md names as the lowest, but got {found}."
        for name, found in installed.items()
        if Version(found) < Version(lowest[name])
    ]


def test_the_page_names_the_versions_that_the_project_asks_for_and_is_tested_on():
    constraints = (ROOT / "constraints.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, flags=re.MULTILINE))
    assert unequal(table(r"([\d.]+) \| [\d.]+ \|$"), requirements(), "lowest") == []
    tested = {name: tested.get(name) for name in requirements()}
    assert unequal(table(r"[\d.]+ \| ([\d.]+) \|$"), tested, "tested") == []
    assert outside_of_the_matrix(requirements(), tested) == []


def test_every_installed_package_is_inside_of_the_matrix():
    assert outside_of_the_matrix(requirements(), {name: version(name) for name in requirements()}) == []


def test_a_package_outside_of_the_matrix_is_named_in_a_sentence():
    (other,) = unequal({"numpy": "2.0", "torch": "2.11"}, {"numpy": "2.1", "torch": "2.11"}, "lowest")
    assert other == "Expected docs/versioning.md to name numpy with 2.1 as the lowest version, but got 2.0."
    (sentence,) = outside_of_the_matrix({"numpy": "2.0", "torch": "2.11"}, {"numpy": "1.26.4", "torch": "2.11.0"})
    assert sentence.startswith("Expected numpy to be at least 2.0, ")
    assert sentence.endswith("but got 1.26.4.")


def test_page_sessions_and_workflow_name_the_same_pythons():
    assignments = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    pythons = assignments["PYTHONS"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    named = re.findall(r"^\| (3\.\d+) \|", PAGE, flags=re.MULTILINE)
    assert pythons == jobs["tests"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={assignments['LOWEST_PYTHON']}" == f">={pythons[0]}"
    classified = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    without = re.findall(r"On Python (3\.\d+) the sources compile", PAGE)
    assert sorted([*classified, *without]) == pythons


def test_the_version_is_one_everywhere():
    released, day = re.search(
        r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    ).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == glai_lightning.__version__ == released == citation["version"]
    assert citation["date-released"].isoformat() == day
