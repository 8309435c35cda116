"""Churn over all processes of a fit."""

from typing import Any

import torch
from torch import Tensor


def churn_over_processes(trainer: Any, flipped: Tensor, bits: int) -> float:
    """Return the fraction of pattern bits that flipped, counted over all processes; 0 if none was compared.

    Counts are added up before they are divided, so that every process sees the same churn and decides alike.

    Args:
        trainer: the Trainer of the fit; all of its processes must call this together.
        flipped: number of bits that differ in this process, a 0-d tensor on its device.
        bits: number of bits compared in this process.
    """
    counts = torch.stack([flipped.double(), flipped.new_tensor(bits, dtype=torch.float64)])
    flipped_everywhere, bits_everywhere = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return float(flipped_everywhere / bits_everywhere) if bits_everywhere else 0.0
