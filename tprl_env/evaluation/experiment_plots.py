"""Plots of an experiment: accuracy against tokens kept, and against LVLM scores used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.evaluation.report import OTHER_COLORS, POLICY_COLORS, new_figure, save_figure

COLORS = (*POLICY_COLORS, *OTHER_COLORS)


def plot_budgets(
    table: Sequence[Mapping[str, Any]], arms: Sequence[str], path: Path, task: str
) -> Path:
    """Accuracy against tokens kept, mean over seeds with the range of the seeds.

    Args:
        table: Rows of `tprl_env.evaluation.experiment_tables.rows`.
        arms: In the order of the legend.
        path: PNG file to write.
        task: For the title.
    """
    figure, axes = new_figure()
    for color, arm in zip(COLORS, arms, strict=False):
        for method, style in (("policy", "-"), ("imitation", ":")):
            own = [r for r in table if r["arm"] == arm and r["method"] == method]
            budgets = sorted({row["budget"] for row in own})
            if not budgets:
                continue
            groups = [[r["relative"] for r in own if r["budget"] == b] for b in budgets]
            label = arm if method == "policy" else None
            axes.plot(
                budgets, [np.mean(g) for g in groups], style, color=color, marker=".", label=label
            )
            if method == "policy":
                low, high = [min(g) for g in groups], [max(g) for g in groups]
                axes.fill_between(budgets, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    ticks = sorted({row["budget"] for row in table})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept (log scale)")
    axes.set_ylabel("accuracy as a share of all tokens")
    axes.set_title(f"{task}: test split; bands: range of seeds; dotted: imitation only")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    return save_figure(figure, path)


def plot_scores(
    table: Sequence[Mapping[str, Any]], arms: Sequence[str], path: Path, task: str
) -> Path:
    """Accuracy on calibration questions against LVLM scores used, at the smallest budget.

    Args:
        table: Rows of `tprl_env.evaluation.experiment_tables.curve_rows`.
        arms: In the order of the legend.
        path: PNG file to write.
        task: For the title.
    """
    figure, axes = new_figure()
    budget = min(row["budget"] for row in table)
    for color, arm in zip(COLORS, arms, strict=False):
        own = [row for row in table if row["arm"] == arm and row["budget"] == budget]
        seeds: dict[int, dict[int, float]] = {}
        for row in own:
            seeds.setdefault(row["seed"], {})[row["lvlm_scores"]] = row["accuracy"]
        for points in seeds.values():
            used = sorted(points)
            axes.plot(
                [x / 1000 for x in used],
                [points[x] for x in used],
                color=color,
                linewidth=0.8,
                alpha=0.25,
            )
        shared = sorted(set.intersection(*(set(points) for points in seeds.values())))
        mean = [float(np.mean([points[x] for points in seeds.values()])) for x in shared]
        axes.plot([x / 1000 for x in shared], mean, marker=".", color=color, label=arm)
    axes.set_xlabel("LVLM scores used (thousands)")
    axes.set_ylabel(f"accuracy at {budget} tokens")
    axes.set_title(f"{task}: calibration questions, no redundancy rule; mean of seeds, thin: each")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    return save_figure(figure, path)
