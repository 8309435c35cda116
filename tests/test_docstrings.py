"""Examples in docstrings run, under the names by which the package is imported."""

import doctest
import importlib
import pkgutil

import pytest

import glai_lightning

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(glai_lightning.__path__, "glai_lightning.")
    if not module.name.endswith("__main__")
) + [
    f"glai_lightning.{package}.{module.name}"
    for package in ("callbacks", "datamodules")
    for module in pkgutil.iter_modules(importlib.import_module(f"glai_lightning.{package}").__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples_to_run():
    found = (test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name)))
    assert sum(len(test.examples) for test in found) > 60
