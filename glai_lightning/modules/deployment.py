"""A trained module as it is used: from inputs as they come, which nothing has standardised, to outputs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer
from glai_lightning.modules.standardise import Standardise


class RawRows(nn.Module):
    """Rows as they come, of any real dtype, to what a head is given: flattened, standardised, in the head's dtype.

    Args:
        standardise: the statistics of the training rows; ``None`` leaves rows as they are.
        dtype: dtype of the head.
    """

    def __init__(self, standardise: Standardise | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.standardise = standardise
        self.dtype = dtype

    def forward(self, rows: Tensor) -> Tensor:
        """Prepare rows (batch, ...) -> (batch, D)."""
        rows = rows.flatten(1)
        if not rows.is_floating_point():
            rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        return (rows if self.standardise is None else self.standardise(rows)).to(self.dtype)


class Deployed(nn.Module):
    """What a module does with inputs as they come.

    Args:
        first: the backbone, or what prepares rows.
        standardise: what standardises the embeddings of a backbone.
        head: the head.
    """

    def __init__(self, first: nn.Module, standardise: nn.Module | None, head: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.standardise = standardise
        self.head = head

    def forward(self, *inputs: Any) -> Tensor:
        """Compute the outputs: a batch of inputs -> (batch, C)."""
        embeddings = self.first(*inputs)
        outputs: Tensor = self.head(embeddings if self.standardise is None else self.standardise(embeddings))
        return outputs


def deployed(module: Any) -> Deployed:
    """Return a ``HeadModule`` as it is used once it is trained, see ``HeadModule.deployed``."""
    known = module.backbone is None and module.standardise is not None and module.standardise.is_set
    if module.inputs_standardised and not known:
        raise UserValueError(
            "Expected inputs to be used as they come, but the data module of the fit standardised them, and this "
            "module does not keep how: call the module itself, on inputs that were standardised likewise."
        )
    if module.backbone is None:
        dtype = next((p.dtype for p in module.head.parameters()), torch.float32)
        return Deployed(RawRows(module.standardise, dtype), None, module.head)
    standardises = module.freeze_backbone and module.standardise_embeddings
    return Deployed(module.backbone, module.standardise if standardises else None, module.head)


def predicted_outputs(module: Any, inputs: Any, batch_size: int) -> Tensor:
    """Return the outputs (N, C) of a ``HeadModule`` for inputs as they come, float32 on the CPU.

    Args:
        module: the module, which stays as it is.
        inputs: rows, images or texts.
        batch_size: inputs that are computed at once.

    Raises:
        TypeError: if ``inputs`` is not a sequence or a tensor, or ``batch_size`` not an integer.
        ValueError: if there are no inputs, rows have another width or hold no finite numbers.
    """
    expect_integer("batch_size", batch_size, least=1)
    inputs = _as_inputs(module, inputs)
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        model = deployed(module)
        with torch.inference_mode():
            batches = (inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size))
            outputs = [
                model(batch.to(module.device) if isinstance(batch, Tensor) else batch).float().cpu()
                for batch in batches
            ]
    finally:
        for child, training in modes:
            child.training = training
    return torch.cat(outputs)


def _as_inputs(module: Any, inputs: Any) -> Any:
    if isinstance(inputs, str | bytes | dict) or not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__"):
        raise UserTypeError(f"Expected `inputs` to be a tensor or a sequence, but got `{type(inputs).__name__}`.")
    if len(inputs) == 0:
        raise UserValueError("Expected `inputs` to hold at least one input, but got none.")
    if module.table is not None and hasattr(inputs, "columns"):
        inputs = module.table.encode(inputs, "`inputs`")
    if module.backbone is not None:
        return torch.from_numpy(inputs) if isinstance(inputs, np.ndarray) else inputs
    try:
        rows = inputs if isinstance(inputs, Tensor) else torch.as_tensor(np.asarray(inputs))
    except (TypeError, ValueError) as error:
        raise UserValueError(f"Expected `inputs` to hold rows of numbers, but they cannot be read: {error}") from error
    width = None if module.standardise is None else module.standardise.scale.numel()
    if rows.ndim < 2 or width not in (None, rows[0].numel()):
        raise UserValueError(
            f"Expected `inputs` to be rows of {'numbers' if width is None else f'{width} numbers'}, "
            f"but got the shape {tuple(rows.shape)}."
        )
    finite = rows.flatten(1).isfinite().all(1)
    if not finite.all():
        raise UserValueError(
            f"Expected finite numbers in `inputs`, but row {int(finite.logical_not().nonzero()[0])} (counted from 0) "
            "holds others."
        )
    return rows
