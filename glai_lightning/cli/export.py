"""``glai export``: the model of a checkpoint, in a file for use without this package."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser

from glai_lightning.checks import UserValueError, expect_choice
from glai_lightning.cli.checkpoints import checked_checkpoint, described_module, saved_configuration
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.modules.export import FORMATS, export_model
from glai_lightning.modules.head_module import HeadModule


def run_export(arguments: Sequence[str]) -> Path:
    """Run ``glai export``, and say where the file is.

    Args:
        arguments: what follows ``glai export`` on the command line.

    Returns:
        The file.

    Raises:
        MisconfigurationException: if there is no checkpoint, or nothing says which module it is of.
        ValueError: if the checkpoint or the module is none that can be exported.
        SystemExit: for arguments that cannot be parsed (code 2).
    """
    parser = argparse.ArgumentParser("glai export", allow_abbrev=False)
    for name in ("--ckpt_path", "--to", "--output", "--config", "--shape"):
        parser.add_argument(name)
    options = parser.parse_args(arguments)
    if options.to not in FORMATS and Path(str(options.to)).suffix:
        raise UserValueError(
            f"Expected `--to` to be {', '.join(FORMATS)}, but got '{options.to}': `--output` names the file."
        )
    expect_choice("--to", options.to, tuple(FORMATS))
    if options.ckpt_path is None:
        raise UserMisconfigurationError("Expected `--ckpt_path` to name a checkpoint, 'best' or 'last', but got none.")
    checkpoint = checked_checkpoint(options.ckpt_path)
    example = None if options.shape is None else torch.zeros(2, *_sizes(options.shape))
    module = load_module(checkpoint, options.config)
    path = export_model(module, options.to, options.output or f"model{FORMATS[options.to]}", example)
    print(f"Exported {checkpoint} as {options.to}: {path}")
    return path


def _sizes(shape: str) -> list[int]:
    sizes = shape.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UserValueError(f"Expected `--shape` to hold the sizes of one input, as in 3,32,32, but got '{shape}'.")
    return list(map(int, sizes))


def load_module(checkpoint: str, configuration: str | None) -> HeadModule:
    """Make the module of a checkpoint: as it describes itself, or as the configuration of its fit says.

    Raises:
        MisconfigurationException: if there is neither.
        ValueError: if the configuration is none of a ``HeadModule``.
    """
    described = None if configuration is not None else described_module(checkpoint)
    if described is not None:
        return described
    path = saved_configuration(checkpoint) if configuration is None else Path(configuration)
    if path is None:
        raise UserMisconfigurationError(
            f"Expected `--config` to name the configuration of the fit, because '{checkpoint}' does not describe its "
            "module and none lies beside it, but got none."
        )
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    module = _configured(path)
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    return module


def _configured(path: Path) -> HeadModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(HeadModule, "model", required=True)
    try:
        configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = configuration["model"] if isinstance(configuration, dict) else None
        module: HeadModule = parser.instantiate_classes(parser.parse_object({"model": model}))["model"]
    except (ArgumentError, KeyError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserValueError(f"Expected '{path}' to configure a `HeadModule` as `model`, but: {error}") from error
    return module
