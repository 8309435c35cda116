"""Solvers that set the path weights of a frozen head, which is linear in them, so that the usual losses are convex."""

from glai_lightning.solvers.averaging import average_heads
from glai_lightning.solvers.head_weights import set_last_layer
from glai_lightning.solvers.logistic import LogisticSolver
from glai_lightning.solvers.report import SolveReport
from glai_lightning.solvers.ridge import RidgeSolver
from glai_lightning.solvers.statistics import PathStatistics

__all__ = ["LogisticSolver", "PathStatistics", "RidgeSolver", "SolveReport", "average_heads", "set_last_layer"]
