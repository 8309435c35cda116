"""Solvers that set the path weights of a frozen head, which is linear in them, so that the usual losses are convex."""

from glai_lightning.solvers.head_solvers import LogisticSolver, RidgeSolver
from glai_lightning.solvers.logistic import solve_logistic
from glai_lightning.solvers.report import SolveReport
from glai_lightning.solvers.ridge import solve_ridge

__all__ = ["LogisticSolver", "RidgeSolver", "SolveReport", "solve_logistic", "solve_ridge"]
