"""Solvers that set the path weights of a frozen head, which is linear in them, so that the usual losses are convex."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.solvers.cross_entropy import Center
from glai_lightning.solvers.feature_batches import Batches, FeatureBatches, as_batches
from glai_lightning.solvers.logistic import Method, check_logistic_settings, solve_logistic
from glai_lightning.solvers.processes import Processes
from glai_lightning.solvers.report import LinearSolution, SolveReport
from glai_lightning.solvers.ridge import check_strengths, solve_ridge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Inputs and targets of a head: a pair of tensors, or a re-iterable of batches of such pairs.
HeadData = tuple[Tensor, Tensor] | Batches


@dataclass(frozen=True)
class LogisticSolver:
    """Sets a frozen head's path weights to those of the smallest cross-entropy plus a penalty.

    What is minimised, and how, says ``solve_logistic``; all arguments are its own.

    Args:
        l2: strength of the penalty, at least 0.
        center: what the penalty pulls to: ``"zero"``, the weights to zero; ``"current"``, the logits to those of the
            head as it is given.
        max_passes: most passes over the data, at least 2.
        method: ``"quasi_newton"``, or ``"minibatch"``, which costs less where there are many classes.
        learning_rate: of minibatch steps.
        batch_size: rows of a minibatch, in each process.
        class_weights: C numbers of at least 0; two for one logit.
        label_smoothing: in [0, 1).
        tolerance: quasi-Newton steps have converged when the norm of the gradient is this small beside that at the
            start.
        patience: with validation data, the solve stops after this many quasi-Newton steps, or passes of minibatch
            steps, without a better score.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> head = freeze_structure(mlp_head(4, 8, 3))
        >>> inputs, targets = torch.randn(60, 4), torch.arange(60) % 3
        >>> report = LogisticSolver(l2=1e-2).solve(head, inputs, targets)
        >>> report.loss < report.start_loss
        True
    """

    l2: float = 1e-3
    center: Center = "current"
    max_passes: int = 6
    class_weights: list[float] | None = None
    label_smoothing: float = 0.0
    tolerance: float = 1e-4
    patience: int = 2
    method: Method = "quasi_newton"
    learning_rate: float = 5e-3
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_logistic_settings(
            self.l2,
            self.center,
            self.label_smoothing,
            self.max_passes,
            self.tolerance,
            self.patience,
            self.method,
            self.learning_rate,
            self.batch_size,
        )

    def solve(
        self,
        head: GLAIHead,
        inputs: Tensor | Batches,
        targets: Tensor | None = None,
        *,
        validation: HeadData | None = None,
        group: "ProcessGroup | None" = None,
    ) -> SolveReport:
        """Set the path weights of a head in place.

        Args:
            head: a head with output or independent paths, from (N, D) to (N, C). Its mode is left as it is.
            inputs: (N, D), or a re-iterable of (inputs, targets) batches: then path activations are computed anew in
                every pass, and never held all at once.
            targets: class labels (N,), or ``None`` where ``inputs`` yields them.
            validation: (inputs, targets), or batches of them; with it the head is never worse on them than before.
            group: the processes of ``torch.distributed`` that share the data, each reading its own part; all end with
                the same weights. ``None`` for this process alone.

        Returns:
            What the solve did.

        Raises:
            TypeError: if ``head`` is not frozen, or dtypes are wrong.
            ValueError: if the head is not linear in its path weights, or the data is not what it has to be, see
                ``solve_logistic``. The head is then as it was.
            RuntimeError: if another process of the group raised an error.
        """
        path_weights = LinearPathWeights(head)
        with Processes(group, path_weights.device).failing_together():
            features = path_weights.features(inputs, targets)
            held_out = path_weights.validation_features(validation)
        solution = solve_logistic(
            features,
            weight=path_weights.weight(),
            bias=path_weights.bias,
            l2=self.l2,
            center=self.center,
            class_weights=self.class_weights,
            label_smoothing=self.label_smoothing,
            method=self.method,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            max_passes=self.max_passes,
            tolerance=self.tolerance,
            patience=self.patience,
            validation=held_out,
            group=group,
        )
        path_weights.set(solution)
        return solution.report


@dataclass(frozen=True)
class RidgeSolver:
    """Sets a frozen head's path weights to those of the smallest squared error plus a penalty, in closed form.

    What is minimised, and how the penalty is chosen, says ``solve_ridge``; all arguments are its own.

    Args:
        l2: strength of the penalty, at least 0, or several to choose from by validation data or, without, by leaving
            out one sample at a time. Default: 17 strengths around the variance of the path activations.

    Raises:
        ValueError: if a strength is out of range.

    Example:
        >>> from glai_lightning import freeze_structure, mlp_head
        >>> head = freeze_structure(mlp_head(4, 8, 1))
        >>> inputs = torch.randn(60, 4)
        >>> RidgeSolver(l2=1e-6).solve(head, inputs, head(inputs).detach() + 1.0).reason
        'closed_form'
    """

    l2: float | list[float] | None = None

    def __post_init__(self) -> None:
        if self.l2 is not None:
            check_strengths(self.l2)

    def solve(
        self,
        head: GLAIHead,
        inputs: Tensor | Batches,
        targets: Tensor | None = None,
        *,
        validation: HeadData | None = None,
        group: "ProcessGroup | None" = None,
    ) -> SolveReport:
        """Set the path weights of a head in place.

        Args:
            head: a head with output or independent paths, from (N, D) to (N, C). Its mode is left as it is.
            inputs: (N, D), or a re-iterable of (inputs, targets) batches.
            targets: numbers (N, C) of a floating dtype, or class labels (N,), integers; ``None`` where ``inputs``
                yields them.
            validation: (inputs, targets), or batches of them; with it the head is never worse on them than before.
            group: the processes of ``torch.distributed`` that share the data, each reading its own part; all end with
                the same weights. ``None`` for this process alone.

        Returns:
            What the solve did.

        Raises:
            TypeError: if ``head`` is not frozen, or dtypes are wrong.
            ValueError: if the head is not linear in its path weights, or the data is not what it has to be, see
                ``solve_ridge``. The head is then as it was.
            RuntimeError: if another process of the group raised an error.
        """
        path_weights = LinearPathWeights(head)
        with Processes(group, path_weights.device).failing_together():
            features = path_weights.features(inputs, targets)
            held_out = path_weights.validation_features(validation)
        solution = solve_ridge(
            features,
            weight=path_weights.weight(),
            bias=path_weights.bias,
            l2=self.l2,
            validation=held_out,
            group=group,
        )
        path_weights.set(solution)
        return solution.report


class LinearPathWeights:
    """A head's path weights as one matrix (C, F) and a bias (C,), over its path activations (N, F).

    Args:
        head: a head with output or independent paths, and no module behind them.

    Raises:
        TypeError: if ``head`` is not a ``GLAIHead``.
        ValueError: if its paths are 'tangent', or a module follows them.
    """

    def __init__(self, head: GLAIHead) -> None:
        if not isinstance(head, GLAIHead):
            raise UserTypeError(
                f"Expected the head to be a `GLAIHead`, but got `{type(head).__name__}`: freeze it first."
            )
        if head.layout.trailing:
            names = ", ".join(type(module).__name__ for module in head.layout.trailing)
            raise UserValueError(f"Expected no module behind the head's last Linear to solve for it, but got {names}.")
        self._head = head
        self._parameters: list[Tensor]
        self.bias: Tensor | None
        if head.paths == "output":
            self._parameters, self.bias = [head.layout.output.weight], head.layout.output.bias
        elif head.paths == "independent":
            paths: Any = head.layout.output
            path_biases = [bias for bias in paths.path_biases() if bias is not None]
            self._parameters, self.bias = [paths.path_weights, *path_biases], paths.bias
        else:
            raise UserValueError(
                f"Expected `paths` to be 'output' or 'independent' to solve for them, but got {head.paths!r}."
            )

    @property
    def device(self) -> torch.device:
        """Where the path weights are."""
        return self._parameters[0].device

    def weight(self) -> Tensor:
        """Return the path weights without the output bias, (C, F), in the order of the path activations."""
        return torch.cat([parameter.detach().flatten(1) for parameter in self._parameters], dim=1)

    def set(self, solution: LinearSolution) -> None:
        """Put solved weights into the head, in place."""
        with torch.no_grad():
            sizes = [parameter[0].numel() for parameter in self._parameters]
            for parameter, part in zip(self._parameters, torch.split(solution.weight, sizes, dim=1), strict=True):
                parameter.copy_(part.reshape(parameter.shape))
            if self.bias is not None and solution.bias is not None:
                self.bias.copy_(solution.bias)

    def features(self, inputs: Tensor | Batches, targets: Tensor | None) -> FeatureBatches:
        """Return path activations and targets: computed once for a tensor of inputs, in every pass for batches."""
        read = FeatureBatches(inputs, targets, transform=self._activations)
        if isinstance(inputs, Tensor):
            return as_batches(self._activations(inputs), targets, outputs=len(self._parameters[0]))
        return read

    def validation_features(self, validation: HeadData | None) -> FeatureBatches | None:
        """Return path activations and targets of validation data, if there is any."""
        if validation is None:
            return None
        if isinstance(validation, tuple) and len(validation) == 2 and isinstance(validation[0], Tensor):
            return self.features(validation[0], validation[1])
        return self.features(validation, None)

    def _activations(self, inputs: Tensor) -> Tensor:
        width = self._head.layout.widths[0]
        if not self._head.layout.leading and inputs.shape[1] != width:
            raise UserValueError(f"Expected inputs of shape (samples, {width}), but got {tuple(inputs.shape)}.")
        with torch.no_grad():
            return self._head.path_activations(inputs.to(self._parameters[0]))
