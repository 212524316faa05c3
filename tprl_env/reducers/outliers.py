"""Counts that follow from outliers, for PruMerge and TRIM."""

from __future__ import annotations

from torch import Tensor

__all__ = ["outlier_count"]


def outlier_count(values: Tensor) -> int:
    """How many of (n,) values lie above Q3 + 1.5 (Q3 - Q1); 0 where all are equal."""
    low, high = values.quantile(0.25), values.quantile(0.75)
    return int((values > high + 1.5 * (high - low)).sum())
