"""What ``glai predict`` makes of the outputs of a module: a file with a line for each input."""

import csv
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from glai_lightning.checks import expect_writable
from glai_lightning.cli.checkpoints import checked_checkpoint, described_module
from glai_lightning.datamodules import UnlabelledDataModule
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError

_FORMATS = (".csv", ".npz")


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as CSV or as ``.npz``.

    A line of the CSV is the row or the file of an input, and for a classifier its label and the probability of each
    class, otherwise the outputs of the module. The ``.npz`` holds the same as arrays: ``row`` or ``file``, ``label``,
    ``probabilities`` and ``classes``, or ``outputs``.

    Args:
        to: the file.

    Attributes:
        num_inputs: how many inputs were predicted for.

    Raises:
        MisconfigurationException: if it is of another kind.
        ValueError: if it cannot be written.
    """

    def __init__(self, to: Path) -> None:
        super().__init__("epoch")
        if to.suffix not in _FORMATS:
            raise UserMisconfigurationError(f"Expected `--to` to end with {' or '.join(_FORMATS)}, but got '{to}'.")
        self.to = expect_writable("--to", to)
        self.num_inputs = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse several processes, each of which would see a part of the inputs."""
        if trainer.world_size > 1:
            raise UserMisconfigurationError(
                f"Expected predictions in one process, but got {trainer.world_size}: give `--trainer.devices=1`."
            )

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        """Write the file."""
        if not predictions or not all(isinstance(batch, Tensor) for batch in predictions):
            got = f"`{type(predictions[0]).__name__}`" if predictions else "nothing"
            raise UserMisconfigurationError(
                f"Expected `predict_step` to return a tensor of outputs for each batch, but got {got}."
            )
        outputs = torch.cat([batch.float().flatten(1) if batch.ndim > 1 else batch[:, None] for batch in predictions])
        columns = _columns(outputs.cpu(), _names(trainer, len(outputs)), _classes(trainer, pl_module, outputs))
        if self.to.suffix == ".npz":
            # `numpy.savez` takes no array by the name of `file`.
            with zipfile.ZipFile(self.to, "w") as archive:
                for name, array in columns.items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
        else:
            with self.to.open("w", encoding="utf-8", newline="") as file:
                _write_csv(csv.writer(file), columns)
        self.num_inputs = len(outputs)


def is_inputs(data: str) -> bool:
    """Tell whether ``--data`` names a file or folder, and not a data module."""
    return os.path.exists(data) or Path(data).suffix in (".npz", ".csv", ".parquet")


def predict_alone(checkpoint: str, data: str, to: str) -> bool:
    """Write predictions of a checkpoint that describes its module, for which no configuration is needed.

    Args:
        checkpoint: a checkpoint, or 'best' or 'last'.
        data: an ``.npz`` file, a CSV or parquet file, or a folder of images.
        to: the file to write.

    Returns:
        Whether ``data`` is such, and the checkpoint describes its module.
    """
    if not is_inputs(data):
        return False
    writer = PredictionWriter(Path(to))
    inputs = UnlabelledDataModule(data)
    module = described_module(checked_checkpoint(checkpoint))
    if module is None:
        return False
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
    Trainer(logger=False, callbacks=[writer], enable_checkpointing=False, devices=1).predict(module, inputs)
    print(f"Predictions of {writer.num_inputs:,} inputs: {writer.to}")
    return True


def _names(trainer: Any, number: int) -> list[Any]:
    names = getattr(trainer.datamodule, "names", None)
    return names if isinstance(names, list) and len(names) == number else list(range(number))


def _classes(trainer: Any, pl_module: Any, outputs: Tensor) -> list[str] | None:
    """Return the names of the classes that the outputs are logits of, ``None`` where they are none."""
    if getattr(pl_module, "task", None) != "classification":
        return None
    for holder in (pl_module, trainer.datamodule):
        names = getattr(holder, "classes", None)
        if isinstance(names, list) and len(names) == outputs.shape[1]:
            return [str(name) for name in names]
    return [str(number) for number in range(outputs.shape[1])]


def _columns(outputs: Tensor, names: list[Any], classes: list[str] | None) -> dict[str, np.ndarray]:
    columns = {"row" if isinstance(names[0], int) else "file": np.array(names)}
    if classes is None:
        return {**columns, "outputs": outputs.numpy()}
    labels = np.array(classes)[outputs.argmax(1).numpy()]
    return {**columns, "label": labels, "probabilities": outputs.softmax(1).numpy(), "classes": np.array(classes)}


def _write_csv(writer: Any, columns: dict[str, np.ndarray]) -> None:
    first, *_ = columns
    if "outputs" in columns:
        numbers, header = columns["outputs"], [f"output_{n}" for n in range(columns["outputs"].shape[1])]
        texts = [columns[first]]
    else:
        numbers, header = columns["probabilities"], ["label", *(f"probability_{name}" for name in columns["classes"])]
        texts = [columns[first], columns["label"]]
    writer.writerow([first, *header])
    for *named, row in zip(*texts, numbers, strict=True):
        writer.writerow([*named, *(f"{number:.6g}" for number in row)])
