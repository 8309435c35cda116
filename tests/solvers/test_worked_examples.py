"""The worked examples of statistics that add up, on generated data; the benchmark runs them on real data."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def found():
    """Return the row of every example: five classes in steps, sites, a class that is forgotten."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        examples = importlib.import_module("path_statistics")
    finally:
        sys.path.remove(str(BENCHMARKS))
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(10, 2, 8, generator=generator)

    def rows(count):
        labels = torch.arange(count) % 10
        which = torch.randint(2, (count,), generator=generator)
        return centres[labels, which] + torch.randn(count, 8, generator=generator), labels

    made = examples.run((rows(1000), rows(200), rows(400)), num_steps=5, hidden=32, random=[32, 96], epochs=4)
    return {(row["example"], row["features"]): row for row in made}


def test_classes_in_steps_end_where_all_rows_at_once_do(found):
    for features in ("32, trained on first step", "32, trained on all rows", "32, random", "96, random"):
        row = found["steps", features]
        assert row["accuracy"] == row["joint_accuracy"]
        assert row["accuracy"] > 50.0
    assert found["steps", "96, random"]["bytes"] > 8 * found["steps", "32, trained on first step"]["bytes"] / 2
    assert found["steps", "Adam on the new rows"]["accuracy"] <= 20.0 < found["steps", "MLP trained anew"]["accuracy"]


def test_sites_that_exchange_no_rows_have_the_solution_of_all_rows(found):
    row = found["sites", "32, trained on first step"]
    assert float(row["relative_difference"]) < 1e-10
    assert row["each_alone"] < row["accuracy"] - 10.0


def test_a_class_that_is_forgotten_was_never_there(found):
    row = found["forgotten", "32, trained on first step"]
    assert float(row["relative_difference"]) < 1e-8
    assert row["accuracy"] == row["joint_accuracy"]
