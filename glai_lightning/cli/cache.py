"""``glai cache``: embeddings of a frozen backbone, computed ahead of the fits that read them."""

import argparse
import time
import warnings
from pathlib import Path

from torch import nn

from glai_lightning.cli.lightning_cli import GlaiCLI
from glai_lightning.datamodules.cached import CacheFolder, CachingDataModule, list_caches, prune_caches
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError


def run_cache(arguments: list[str]) -> None:
    """Fill the cache of a configuration, list the caches in a folder, or remove those that are not used.

    Args:
        arguments: what follows ``glai cache`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "glai cache",
        description="Compute the embeddings of a configuration's frozen backbone, with --config and the options of "
        "`glai fit`; or list the caches in a folder; or remove those that are not used.",
    )
    parser.add_argument("--list", type=Path, metavar="DIR", help="list the caches in a folder")
    parser.add_argument("--prune", type=Path, metavar="DIR", help="remove caches that were not used for --days")
    parser.add_argument("--days", type=float, default=30.0, help="days without use (default: 30)")
    options, configuration = parser.parse_known_args(arguments)
    if options.list is not None:
        _print(list_caches(options.list), "")
    elif options.prune is not None:
        _print(prune_caches(options.prune, options.days), "Removed ")
    else:
        with warnings.catch_warnings():
            _FillingCLI(["fit", *configuration])


class _FillingCLI(GlaiCLI):
    """Makes what ``glai fit`` makes, and fills its cache instead of fitting."""

    def _run_subcommand(self, subcommand: str) -> None:
        backbone = getattr(self.model, "backbone", None)
        if not isinstance(self.datamodule, CachingDataModule) or not isinstance(backbone, nn.Module):
            raise UserMisconfigurationError(
                "Expected a data module with a `cache` and a model with a backbone, but got "
                f"`{type(self.datamodule).__name__}` and `{type(self.model).__name__}`."
            )
        print(f"Cached in {self.datamodule.fill(backbone.to(self.trainer.strategy.root_device))}")


def _print(caches: list[CacheFolder], verb: str) -> None:
    for cache in caches:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.used))
        state = "" if cache.complete else ", not complete"
        print(f"{verb}{cache.path}: {cache.size / 1e6:,.1f} MB, used {used}{state}")
    if not caches:
        print("No caches." if not verb else "Nothing to remove.")
