"""What TensorBoard shows of a structure: churn by unit, units that never or always fire, and a map of the patterns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glai_lightning.heads.churn import Compared

#: Colours by whether a unit fires now (rows) and whether it fired at the last check (columns): flips stand out.
_COLOURS = np.array([[[243, 244, 246], [251, 191, 36]], [[194, 65, 12], [31, 95, 168]]], dtype=np.uint8)
_MOST_UNITS, _MOST_SAMPLES = 1024, 256


def picture_writers(trainer: Any) -> list[Any]:
    """Return what writes histograms and images for the loggers of a fit: TensorBoard, in the first process only."""
    if not trainer.is_global_zero:
        return []
    # By what it can do: loggers of either Lightning namespace.
    return [logger.experiment for logger in trainer.loggers if hasattr(logger.experiment, "add_histogram")]


def write_pictures(writers: Sequence[Any], compared: Sequence[Compared], *, suffix: str, step: int) -> None:
    """Write what one check saw of the structure of a head.

    Args:
        writers: what ``picture_writers`` returned.
        compared: the patterns that a ``ChurnProbe`` compared.
        suffix: what stands after each tag, to tell heads apart.
        step: optimizer steps by now.
    """
    before, after = ([_in_rows(layer) for layer in zip(*side, strict=True)] for side in zip(*compared, strict=True))
    rates = torch.cat([layer.float().mean(0) for layer in after])
    for writer in writers:
        for name, units in (("dead_units", rates == 0), ("always_on_units", rates == 1)):
            writer.add_scalar(f"structure/{name}{suffix}", units.float().mean(), step)
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            layer = f"{suffix}/layer_{number}"
            writer.add_histogram(f"structure/unit_churn{layer}", (old ^ new).float().mean(0), step, bins=50)
            writer.add_image(f"structure/patterns{layer}", pattern_map(old, new), step, dataformats="HWC")


def _in_rows(calls: Sequence[Tensor]) -> Tensor:
    """Return the patterns of all calls as (samples, units); where their widths differ, of those like the last."""
    width = calls[-1].shape[-1]
    return torch.cat([patterns.reshape(-1, width) for patterns in calls if patterns.shape[-1] == width])


def pattern_map(before: Tensor, after: Tensor) -> np.ndarray:
    """Draw the patterns of one layer: a row for each unit, a column for each sample, flips in colours of their own.

    Args:
        before: bool (samples, units), at the last check.
        after: the same now.

    Returns:
        Pixels, uint8 (units, samples, 3), of at most 1,024 units and 256 samples.

    Example:
        >>> import torch
        >>> pattern_map(torch.tensor([[True, False]]), torch.tensor([[True, True]])).tolist()
        [[[31, 95, 168]], [[194, 65, 12]]]
    """
    old, new = (layer[:_MOST_SAMPLES, :_MOST_UNITS].T.long().cpu().numpy() for layer in (before, after))
    pixels: np.ndarray = _COLOURS[new, old]
    return pixels
