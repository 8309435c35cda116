"""The path weights of a frozen head as a linear model, which the solvers read and set: all they know of a head."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.chain import title
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.patterns import changing_steps, holds_weight, layout_of
from glai_lightning.heads.record import record_of
from glai_lightning.solvers.feature_batches import Batches, Data, FeatureBatches, as_batches, as_tensors
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, SolveReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class HeadSolver(ABC):
    """Solves for the path weights of a frozen head, which it is linear in."""

    def solve(
        self,
        head: GLAIHead,
        inputs: Tensor | Batches,
        targets: Tensor | None = None,
        *,
        sample_weights: Tensor | None = None,
        validation: Data | None = None,
        group: "ProcessGroup | None" = None,
    ) -> SolveReport:
        """Set the path weights of a head in place.

        Args:
            head: a head with output or independent paths, from (N, D) to (N, C). Its mode is left as it is.
            inputs: (N, D), or a re-iterable of batches (inputs, targets) or (inputs, targets, weights): then path
                activations are computed anew in every pass, and never held all at once.
            targets: of N samples, see ``solve_features``; ``None`` where ``inputs`` yields them.
            sample_weights: (N,), how much each sample counts; ``None`` where all count the same.
            validation: (inputs, targets) or (inputs, targets, weights), or batches of them; with it the head is never
                worse on them than before.
            group: the processes of ``torch.distributed`` that share the data, each reading its own part; all end with
                the same weights. ``None`` for this process alone.

        Returns:
            What the solve did.

        Raises:
            TypeError: if ``head`` is not frozen, or dtypes are wrong.
            ValueError: if the head is not linear in its path weights, or the data is not what it has to be, see
                ``solve_features``. The head is then as it was.
            RuntimeError: if another process of the group raised an error.
        """
        path_weights = LinearPathWeights(head)
        with Processes(group, path_weights.device).failing_together():
            features = path_weights.features(inputs, targets, sample_weights)
            held_out = None if validation is None else path_weights.features(*as_tensors(validation))
        solution = self.solve_features(
            features, weight=path_weights.weight(), bias=path_weights.bias, validation=held_out, group=group
        )
        path_weights.set(solution.weight, solution.bias)
        return solution.report

    @abstractmethod
    def solve_features(
        self,
        features: Tensor | Batches | FeatureBatches,
        targets: Tensor | None = None,
        *,
        weight: Tensor,
        bias: Tensor | None = None,
        sample_weights: Tensor | None = None,
        validation: Data | FeatureBatches | None = None,
        group: "ProcessGroup | None" = None,
    ) -> LinearSolution:
        """Fit a linear model over fixed features (N, F), from a weight (C, F) and a bias (C,) on."""


#: Rows whose path activations are computed at a time, so that what is computed on the way takes little memory.
_ROWS_AT_A_TIME = 4096


class LinearPathWeights:
    """A head's path weights as one matrix (C, F) and a bias (C,), over its path activations (N, F).

    Args:
        head: a head with output or independent paths, and no module after its last Linear.

    Raises:
        TypeError: if ``head`` is not a ``GLAIHead``.
        ValueError: if its paths are 'tangent', or a module follows them that does something in eval mode.
    """

    def __init__(self, head: GLAIHead) -> None:
        if not isinstance(head, GLAIHead):
            raise UserTypeError(
                f"Expected the head to be a `GLAIHead`, but got `{type(head).__name__}`: freeze it first."
            )
        layout, kind = layout_of(head), record_of(head).paths
        acting = changing_steps(layout)
        if acting:
            names = ", ".join(map(title, acting))
            raise UserValueError(f"Expected no module after the head's last Linear to solve for it, but got {names}.")
        if not holds_weight(layout.output):
            raise UserValueError(
                f"Expected the head's last layer to be a Linear whose weight is a parameter, to solve for it, but got "
                f"`{type(layout.output).__name__}`."
            )
        self.head = head
        self._parameters: list[Tensor]
        self.bias: Tensor | None
        if kind == "output":
            self._parameters, self.bias = [layout.output.weight], layout.output.bias
        elif kind == "independent":
            paths: Any = layout.output
            path_biases = [bias for bias in paths.path_biases() if bias is not None]
            self._parameters, self.bias = [paths.path_weights, *path_biases], paths.bias
        else:
            raise UserValueError(
                f"Expected `paths` to be 'output' or 'independent' to solve for them, but got {kind!r}."
            )

    @property
    def device(self) -> torch.device:
        """Where the path weights are."""
        return self._parameters[0].device

    def weight(self) -> Tensor:
        """Return the path weights without the output bias, (C, F), in the order of the path activations."""
        return torch.cat([parameter.detach().flatten(1) for parameter in self._parameters], dim=1)

    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put weights (C, F) and a bias (C,) into the head, in place."""
        with torch.no_grad():
            sizes = [parameter[0].numel() for parameter in self._parameters]
            for parameter, part in zip(self._parameters, torch.split(weight, sizes, dim=1), strict=True):
                parameter.copy_(part.reshape(parameter.shape))
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def features(
        self, inputs: Tensor | Batches, targets: Tensor | None, sample_weights: Tensor | None
    ) -> FeatureBatches:
        """Return path activations and targets: computed once for a tensor of inputs, in every pass for batches."""
        read = FeatureBatches(inputs, targets, sample_weights, transform=self.activations)
        if isinstance(inputs, Tensor):
            outputs = len(self._parameters[0])
            batches = as_batches(self._held_activations(inputs), targets, sample_weights, outputs=outputs)
            return replace(batches, keys=inputs)
        return read

    def _held_activations(self, inputs: Tensor) -> Tensor:
        """Return the path activations of all inputs, made of a few rows at a time in memory that is reserved once."""
        first, *others = torch.split(inputs, _ROWS_AT_A_TIME)
        activations = self.activations(first)
        if not others:
            return activations
        held = activations.new_empty(len(inputs), activations.shape[1])
        for rows, part in zip(torch.split(held, _ROWS_AT_A_TIME), (first, *others), strict=True):
            rows.copy_(self.activations(part))
        return held

    def activations(self, inputs: Tensor) -> Tensor:
        """Return the path activations (n, F) of inputs (n, D)."""
        layout = layout_of(self.head)
        width = layout.widths[0]
        if layout.takes_rows and inputs.shape[1] != width:
            raise UserValueError(f"Expected inputs of shape (samples, {width}), but got {tuple(inputs.shape)}.")
        with torch.no_grad():
            return GLAIHead.path_activations(self.head, inputs.to(self._parameters[0]))


def set_last_layer(head: GLAIHead, solution: LinearSolution) -> None:
    """Put solved weights into a frozen head, in place; where there are more outputs, its last Linear is replaced.

    Args:
        head: a head with output or independent paths. One with a single output, whose sign tells the class, takes a
            solution for two classes.
        solution: what ``PathStatistics.solve`` returned.

    Raises:
        TypeError: if ``head`` is not frozen.
        ValueError: if the features are not those of the head, one of the two has a bias and the other none, or there
            are more outputs than independent paths have. The head is then as it was.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> from glai_lightning.solvers import PathStatistics
        >>> head = freeze_structure(mlp_head(4, 8, 2))
        >>> statistics = PathStatistics(head).update(torch.randn(30, 4), torch.arange(30) % 3)
        >>> set_last_layer(head, statistics.solve())
        >>> head(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """
    path_weights = LinearPathWeights(head)
    (outputs, features), (weight, bias) = path_weights.weight().shape, solution[:2]
    if weight.shape[1] != features or (bias is None) != (path_weights.bias is None):
        raise UserValueError(
            f"Expected a solution on {features} features {'with' if path_weights.bias is not None else 'without'} a "
            f"bias, but got one on {weight.shape[1]} {'with' if bias is not None else 'without'}."
        )
    if outputs == 1 and len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], None if bias is None else bias[1:] - bias[:1]
    elif len(weight) != outputs:
        record, old = record_of(head), layout_of(head).output
        if record.paths != "output":
            raise UserValueError(
                f"Expected `paths` to be 'output' for a solution of {len(weight)} outputs where the head has "
                f"{outputs}, but got {record.paths!r}."
            )
        kept = {"dtype": old.weight.dtype, "device": old.weight.device}
        head.set_submodule(record.names.output, nn.Linear(features, len(weight), bias is not None, **kept))
    LinearPathWeights(head).set(weight, bias)
