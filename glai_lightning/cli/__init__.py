"""The ``glai`` command."""

from glai_lightning.cli.main import main

__all__ = ["main"]
