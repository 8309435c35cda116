"""``glai solve``: the last layer of a trained model anew, from statistics that samples are added to or taken from."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glai_lightning.checks import UserValueError, expect_writable
from glai_lightning.cli.checkpoints import checked_checkpoint
from glai_lightning.cli.export import load_module
from glai_lightning.cli.samples import is_samples, labelled_batches
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.modules.checkpoint_file import DESCRIPTION
from glai_lightning.modules.supervised import SupervisedModule
from glai_lightning.solvers import PathStatistics


def run_solve(arguments: Sequence[str]) -> Path:
    """Run ``glai solve``, and say what was done.

    Args:
        arguments: what follows ``glai solve`` on the command line.

    Returns:
        The checkpoint that was written.

    Raises:
        MisconfigurationException: if there is no checkpoint, or there are neither statistics nor samples.
        ValueError: if a file is not what it has to be, or its samples do not fit the statistics. Nothing is written
            then.
        SystemExit: for arguments that cannot be parsed (code 2).
    """
    parser = argparse.ArgumentParser("glai solve", allow_abbrev=False)
    parser.add_argument("--config")
    for name in ("--ckpt_path", "--statistics"):
        parser.add_argument(name, required=True)
    for name in ("--add", "--forget", "--validation"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--l2", type=float)
    parser.add_argument("--head", default="ridge")
    parser.add_argument("--class_weights", choices=("balanced",))
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--to", type=Path)
    options = parser.parse_args(arguments)
    checkpoint = checked_checkpoint(options.ckpt_path)
    to = options.to or Path(checkpoint).with_suffix(".solved.ckpt")
    expect_writable("--to", to)
    expect_writable("--statistics", options.statistics)
    module = load_module(checkpoint, options.config)
    if not isinstance(module, SupervisedModule):
        raise UserValueError(f"Expected the checkpoint of a `SupervisedModule`, but got a `{type(module).__name__}`.")
    statistics, file = PathStatistics(module.feature_map(), module.classes), Path(options.statistics)
    if file.exists():
        statistics.load(file)
    elif not options.add:
        raise UserMisconfigurationError(
            f"Expected `--add` to name samples where there are no statistics yet, but got none, and no file '{file}'."
        )

    def batches(data: str) -> Any:
        return labelled_batches(data, module, statistics.classes, options.label_column)

    def read(data: str) -> PathStatistics:
        given = PathStatistics(module.feature_map(), statistics.classes)
        return given.update(batches(data)) if is_samples(data) else given.load(data)

    for data in options.add:
        given = read(data)
        statistics = statistics + given
        print(f"Added {given.samples:,} samples of '{data}'.")
    for data in options.forget:
        before = statistics.samples
        statistics.forget(batches(data))
        print(f"Forgot {before - statistics.samples:,} samples of '{data}'.")
    validation = None
    for data in options.validation:
        validation = read(data) if validation is None else validation + read(data)
    solution = statistics.solve(options.l2, validation, options.head, options.class_weights)
    module.set_solution(solution, statistics.classes)
    _write(module, checkpoint, to)
    if options.add or options.forget:
        statistics.save(file)
    print(f"Solved over {statistics.samples:,} samples with l2 = {solution.report.l2:.3g}: {to}")
    return to


def _write(module: SupervisedModule, checkpoint: str, to: Path) -> None:
    """Write a checkpoint with the weights and the description of a module, and nothing of the fit that went before."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    saved |= {"state_dict": module.state_dict(), DESCRIPTION: module.description(), "callbacks": {}}
    saved |= {"optimizer_states": [], "lr_schedulers": []}
    if saved.get("hyper_parameters", {}).get("num_classes") is not None:
        saved["hyper_parameters"]["num_classes"] = module.num_classes
    torch.save(saved, to)
