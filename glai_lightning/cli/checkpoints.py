"""Which checkpoint ``--ckpt_path`` names, and which one is the best of a fit that was resumed."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.modules.checkpoint_file import DESCRIPTION, check_checkpoint
from glai_lightning.modules.head_module import HeadModule, shipped_module


def check_given(path: str, *, weights_only: bool) -> None:
    """Check that ``--ckpt_path`` names a checkpoint.

    Args:
        path: a file or an address, or 'best', 'last' or 'hpc'.
        weights_only: whether the file is to hold tensors and primitives only.

    Raises:
        MisconfigurationException: if there is no such file.
        ValueError: if it is no checkpoint.
    """
    if path in ("best", "last", "hpc") or "://" in path:
        return
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise UserMisconfigurationError(
            f"Expected `--ckpt_path` to be a checkpoint, 'best', 'last' or 'hpc', but got '{path}', which {what}."
        )
    if weights_only:
        check_checkpoint(path)


def find_checkpoint(name: str, roots: Iterable[Path]) -> str | None:
    """Return the checkpoint that earlier fits left behind.

    Args:
        name: 'best', of the latest fit that monitored a score, or 'last', the file that was written last.
        roots: folders below which there may be checkpoints.

    Returns:
        The path; ``None`` where there is none.
    """
    files = [file for folder in _checkpoint_folders(roots) for file in folder.glob("*.ckpt")]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    if name == "last":
        return str(files[0]) if files else None
    # A later fit that monitored nothing has no best.
    for file in files:
        for path in _best_paths(file):
            # Beside it, should the folder have been moved since.
            for candidate in (path, file.with_name(path.name)):
                if candidate.is_file():
                    return str(candidate)
    return None


def checked_checkpoint(given: str) -> str:
    """Return the file that ``--ckpt_path`` names, 'best' and 'last' those of the latest fit in this folder.

    Raises:
        MisconfigurationException: if there is no such file.
        ValueError: if it is no checkpoint.
    """
    if given in ("best", "last"):
        given = find_named(given, _usual_roots())
    check_given(given, weights_only=True)
    return given


def described_module(checkpoint: str) -> HeadModule | None:
    """Make the module of a checkpoint as it describes itself; ``None`` if it does not, or is one of the user's own."""
    described = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(DESCRIPTION, {})
    kind = shipped_module(described.get("module"))
    parts = ("head", "backbone") if described.get("has_backbone") else ("head",)
    if kind is None or any(described.get(part) is None for part in parts):
        return None
    return kind.load_from_checkpoint(checkpoint, map_location="cpu")


def checkpoint_roots(trainer: Any) -> list[Path]:
    """Return the folders below which a Trainer leaves its checkpoints."""
    given = [Path(one.dirpath) for one in trainer.checkpoint_callbacks if getattr(one, "dirpath", None) is not None]
    logged = [
        Path(logger.save_dir, str(logger.name)) for logger in trainer.loggers if getattr(logger, "save_dir", None)
    ]
    return list(dict.fromkeys([*given, *logged, Path(trainer.default_root_dir)]))


def saved_configuration(checkpoint: str) -> Path | None:
    """Return the configuration that a fit has saved beside the folder of its checkpoints, ``None`` without one.

    Args:
        checkpoint: a file, or 'best' or 'last' for the latest fit in this folder.
    """
    latest = find_checkpoint("last", _usual_roots()) if checkpoint in ("best", "last") else checkpoint
    beside = None if latest is None else Path(latest).parent.parent / "config.yaml"
    return beside if beside is not None and beside.is_file() else None


def find_named(name: str, roots: Iterable[Path]) -> str:
    """Return the checkpoint that ``find_checkpoint`` finds.

    Raises:
        MisconfigurationException: if there is none.
    """
    roots = list(roots)
    found = find_checkpoint(name, roots)
    if found is None:
        raise UserMisconfigurationError(
            f"Expected the {name} checkpoint of an earlier fit in {' or '.join(f'{str(r)!r}' for r in roots[:3])}, but "
            "found none. Name its file with `--ckpt_path`."
        )
    return found


def _usual_roots() -> list[Path]:
    """Return the folders below which fits leave their checkpoints: those of the recipes, and Lightning's own."""
    runs = Path("runs")
    return [runs, Path("lightning_logs"), *runs.glob("*"), *runs.glob("*/lightning_logs")]


def _checkpoint_folders(roots: Iterable[Path]) -> Iterable[Path]:
    for root in roots:
        yield from (root, root / "checkpoints", *root.glob("version_*/checkpoints"))


def _best_paths(checkpoint: Path) -> list[Path]:
    check_checkpoint(checkpoint)
    states = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("callbacks", {}).values()
    monitoring = [state for state in states if isinstance(state, dict) and state.get("monitor") is not None]
    return [Path(state["best_model_path"]) for state in monitoring if state.get("best_model_path")]


class KeepsBest(Callback):
    """Lets the best checkpoint of a resumed fit count, although the fit writes into a new folder.

    Lightning's ``ModelCheckpoint`` forgets the best score in a new folder, and takes the first that follows for the
    best.
    """

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Tell every ``ModelCheckpoint`` that its folder is the one of the fit that is resumed."""
        if trainer.state.fn != "fit":
            return
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if getattr(callback, "monitor", None) is None or not isinstance(state, dict):
                continue
            best = str(state.get("best_model_path", ""))
            # A file that was written after this checkpoint holds other weights than those of the score.
            if os.path.isfile(best) and _epoch_of(best) <= checkpoint.get("epoch", -1):
                state["dirpath"] = callback.dirpath


def _epoch_of(path: str) -> int:
    check_checkpoint(path)
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"])
