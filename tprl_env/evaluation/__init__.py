"""Evaluation at matched budgets: intervals, tables, plots, reports."""

from tprl_env.evaluation.compare_on_store import evaluate_store
from tprl_env.evaluation.measure import MethodResult, evaluate

__all__ = ["MethodResult", "evaluate", "evaluate_store"]
