import json
import os
import subprocess
import sys

# Nothing is downloaded; read when the libraries of the hub are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")

FRESH = "GLAI_TESTS_IN_A_FRESH_PROCESS"
#: Begins a line of the output of a fresh process that says what its test recorded.
PROPERTIES = "properties: "


def pytest_addoption(parser):
    parser.addoption("--fuzz-examples", type=int, help="examples of each test in test_fuzz.py, instead of its own")


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run tests that start processes, or a process group, in an interpreter of their own.

    Lightning leaves the address of a process group in the environment, where the next one would look for its own.
    """
    if pyfuncitem.get_closest_marker("processes") is None or FRESH in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {FRESH: "1"}
    ran = subprocess.run(
        command,
        cwd=pyfuncitem.config.rootpath,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for line in ran.stdout.splitlines():
        if line.startswith(PROPERTIES):
            pyfuncitem.user_properties += json.loads(line.removeprefix(PROPERTIES)).items()
    return True


def pytest_terminal_summary(terminalreporter):
    """Say how many cells of the matrices ran (fits cut and resumed, fits in several processes), how much was fuzzed."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    noted = [dict(report.user_properties) for report in reports]
    if FRESH in os.environ:
        for properties in noted:
            terminalreporter.write_line(PROPERTIES + json.dumps(properties))
        return
    cells, mismatches, examples = (
        sum(properties.get(name, 0) for properties in noted)
        for name in ("resume cells", "resume mismatches", "fuzzed examples")
    )
    for kind in ("identical processes", "processes as one"):
        fits = sum(properties.get(f"{kind}: cells", 0) for properties in noted)
        largest = max((properties.get(f"{kind}: difference", 0.0) for properties in noted), default=0.0)
        if fits:
            terminalreporter.write_line(f"{kind}: {fits} fits, largest difference {largest:.2g}")
    if cells:
        terminalreporter.write_line(f"resume matrix: {cells} cells ran, {mismatches} mismatches")
    if examples:
        terminalreporter.write_line(f"fuzz: {examples:,} malformed arguments, state dicts, states and files")
