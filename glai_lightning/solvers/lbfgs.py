"""Preconditioned L-BFGS: minimises a smooth convex function, one evaluation of loss and gradient a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Returns the loss and the gradient, shaped like the weights.
Objective = Callable[[Tensor], tuple[float, Tensor]]
#: An approximation of the inverse Hessian: linear, symmetric, positive definite.
Preconditioner = Callable[[Tensor], Tensor]

_SUFFICIENT_DECREASE = 1e-4
_SMALLEST_STEP = 1e-6


@dataclass(frozen=True)
class Point:
    """Weights with the loss and the gradient there."""

    weights: Tensor
    loss: float
    gradient: Tensor


class LBFGS:
    """Limited-memory BFGS in its compact form, which costs three matrix-vector products and two triangular solves.

    The product of the inverse Hessian with a vector is written as in Byrd, Nocedal and Schnabel, "Representations of
    quasi-Newton matrices and their use in limited memory methods", Mathematical Programming 63 (1994), equation 3.1,
    around a preconditioner in the place of the identity.

    Args:
        objective: loss and gradient.
        start: where to start, with the loss and the gradient there.
        preconditioner: the inverse Hessian before any step.
        memory: steps remembered; two vectors as large as the weights are held for each.
    """

    def __init__(self, objective: Objective, start: Point, preconditioner: Preconditioner, *, memory: int = 30) -> None:
        self.point = start
        self.evaluations = 0
        self._objective = objective
        self._preconditioner = preconditioner
        size = start.gradient.numel()
        self._memory = memory
        self._length = 0
        self._steps = start.gradient.new_empty(memory, size)
        self._changes = start.gradient.new_empty(memory, size)

    def change_objective(
        self, objective: Objective, point: Point, preconditioner: Preconditioner, difference: Callable[[Tensor], Tensor]
    ) -> None:
        """Minimise another objective from here on, whose difference to the one so far is quadratic.

        What was learned from the steps so far stays, and is exact: a step s that changed the gradient by y would have
        changed the gradient of the new objective by y + D s, with D the Hessian of the difference.

        Args:
            objective: the new objective.
            point: where to go on, with the loss and the gradient of the new objective.
            preconditioner: its inverse Hessian before any step.
            difference: multiplies D by a step shaped like the weights.
        """
        self._objective, self.point, self._preconditioner = objective, point, preconditioner
        for index in range(self._length):
            self._changes[index] += difference(self._steps[index].view_as(point.weights)).flatten()

    def gradient_norm(self) -> float:
        """Return the norm of the gradient in the metric of the preconditioner, whatever the scale of each weight."""
        return math.sqrt(max(_dot(self.point.gradient, self._preconditioner(self.point.gradient)), 0.0))

    def step(self, max_evaluations: int) -> bool:
        """Go one step along the quasi-Newton direction, as far as the loss falls.

        Args:
            max_evaluations: most evaluations of the objective, at least 1.

        Returns:
            Whether the loss fell. If not, ``point`` is where it was, and no later step will do better.
        """
        direction = -self._inverse_hessian_times_gradient()
        slope = _dot(direction, self.point.gradient)
        if not slope < 0.0:
            return False
        found = self._search(direction.view_as(self.point.weights), slope, max_evaluations)
        if found is None:
            return False
        self._remember(found)
        return True

    def _search(self, direction: Tensor, slope: float, max_evaluations: int) -> Point | None:
        length = 1.0
        for _ in range(max_evaluations):
            weights = self.point.weights + length * direction
            loss, gradient = self._objective(weights)
            self.evaluations += 1
            rounding = torch.finfo(weights.dtype).eps * abs(self.point.loss)
            change = loss - self.point.loss
            if change <= _SUFFICIENT_DECREASE * length * slope:
                return Point(weights, loss, gradient)
            if abs(change) <= rounding and gradient.norm() < self.point.gradient.norm():
                return Point(weights, loss, gradient)
            # The minimum of the parabola through the loss at both ends and the slope at the near one.
            parabola = -slope * length**2 / (2.0 * (change - slope * length))
            length = min(max(parabola, 0.1 * length), 0.5 * length) if parabola == parabola else 0.1 * length
            if length < _SMALLEST_STEP:
                return None
        return None

    def _remember(self, found: Point) -> None:
        step = (found.weights - self.point.weights).flatten()
        change = (found.gradient - self.point.gradient).flatten()
        # Beside the slope before, which does not depend on how weights are scaled.
        learned = _dot(step, change) > 1e-10 * abs(_dot(step, self.point.gradient))
        self.point = found
        if not learned:
            return
        if self._length == self._memory:
            for kept in (self._steps, self._changes):
                kept[:-1] = kept[1:].clone()
            self._length -= 1
        self._steps[self._length], self._changes[self._length] = step, change
        self._length += 1

    def _inverse_hessian_times_gradient(self) -> Tensor:
        gradient = self.point.gradient.flatten()
        if self._length == 0:
            return self._precondition(gradient)
        steps, changes = self._steps[: self._length], self._changes[: self._length]
        upper = (steps @ changes.t()).double().triu()
        scale = float(upper[-1, -1]) / (_dot(changes[-1], self._precondition(changes[-1])) or 1.0)
        before = _solve(upper, steps @ gradient, upper=True)
        product = scale * self._precondition(gradient - before.to(gradient.dtype) @ changes)
        rest = upper.diagonal() * before - (changes @ product).double()
        after = _solve(upper.t(), rest, upper=False)
        return product + after.to(product.dtype) @ steps

    def _precondition(self, vector: Tensor) -> Tensor:
        return self._preconditioner(vector.view_as(self.point.gradient)).flatten()


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def _solve(triangle: Tensor, vector: Tensor, *, upper: bool) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(triangle, vector.double().unsqueeze(1), upper=upper)
    return solved.squeeze(1)
