"""Comparing a head whose structure is frozen with one that never is, on a task of your own."""

from glai_lightning.comparison.protocol import compare
from glai_lightning.comparison.report import markdown_report, text_report
from glai_lightning.comparison.runs import Run
from glai_lightning.comparison.verdict import Comparison

__all__ = ["Comparison", "Run", "compare", "markdown_report", "text_report"]
