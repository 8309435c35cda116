"""Solvers that set the path weights of a frozen head, which is linear in them, so that the usual losses are convex."""

from glai_lightning.solvers.logistic import LogisticSolver
from glai_lightning.solvers.report import SolveReport
from glai_lightning.solvers.ridge import RidgeSolver

__all__ = ["LogisticSolver", "RidgeSolver", "SolveReport"]
