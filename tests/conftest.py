import gc
import json
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

# Nothing is downloaded; read when the libraries of the hub are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")

#: Seconds after which a test in a process of its own is ended.
LONGEST = 240


def pytest_addoption(parser):
    parser.addoption("--fuzz-examples", type=int, help="examples of each test in test_fuzz.py, instead of its own")
    parser.addoption("--fuzz-fits", type=int, help="fits of test_fuzz_fits.py, instead of its own number")


def pytest_collection_finish():
    """Leave everything that was imported out of garbage collections, which comparisons ask for, and of forks."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run tests that start processes, or a process group, in a process of their own.

    Lightning leaves the address of a process group in the environment, where the next one would look for its own.
    """
    if pyfuncitem.get_closest_marker("processes") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder, "outcome.json")
        process = multiprocessing.get_context("fork").Process(
            target=_run_and_tell, args=(pyfuncitem.obj, arguments, pyfuncitem.user_properties, outcome)
        )
        process.start()
        process.join(LONGEST)
        if process.is_alive():
            process.kill()
        assert outcome.exists(), f"ended with exit code {process.exitcode}"
        failure, pyfuncitem.user_properties[:] = json.loads(outcome.read_text())
    assert failure is None, failure
    return True


def _run_and_tell(test, arguments, properties, outcome):
    failure = None
    try:
        test(**arguments)
    except BaseException:
        failure = traceback.format_exc()
    outcome.write_text(json.dumps([failure, properties]))
    os._exit(0)


def pytest_terminal_summary(terminalreporter):
    """Say how many cells of the matrices ran (fits cut and resumed, fits in several processes), how much was fuzzed."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    noted = [dict(report.user_properties) for report in reports]
    cells, mismatches, examples, fits_at_random = (
        sum(properties.get(name, 0) for properties in noted)
        for name in ("resume cells", "resume mismatches", "fuzzed examples", "fuzzed fits")
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
    if fits_at_random:
        terminalreporter.write_line(f"fuzz: {fits_at_random:,} fits at random")
