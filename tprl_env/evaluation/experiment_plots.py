"""Plots of an experiment: accuracy against tokens kept, and against LVLM scores used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tprl_env.evaluation.plots import method_colors, new_figure, save_figure


def plot_budgets(table: pd.DataFrame, arms: Sequence[str], path: Path, task: str) -> Path:
    """Accuracy against tokens kept, mean over seeds with the range of the seeds.

    Args:
        table: Rows of `tprl_env.evaluation.experiment_tables.results`.
        arms: In the order of the legend.
        path: PNG file to write.
        task: For the title.
    """
    figure, axes = new_figure()
    for arm, color in method_colors(arms).items():
        for method, style in (("policy", "-"), ("imitation", ":")):
            own = table[(table["arm"] == arm) & (table["method"] == method)]
            if own.empty:
                continue
            found = own.groupby("budget")["relative"].agg(["mean", "min", "max"])
            label = arm if method == "policy" else None
            axes.plot(found.index, found["mean"], style, color=color, marker=".", label=label)
            if method == "policy":
                axes.fill_between(
                    found.index, found["min"], found["max"], color=color, alpha=0.15, linewidth=0
                )
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    ticks = sorted(table["budget"].unique())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept (log scale)")
    axes.set_ylabel("accuracy as a share of all tokens")
    axes.set_title(f"{task}: test split; bands: range of seeds; dotted: imitation only")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    return save_figure(figure, path)


def plot_scores(table: pd.DataFrame, arms: Sequence[str], path: Path, task: str) -> Path:
    """Accuracy on calibration questions against LVLM scores used, at the smallest budget.

    Args:
        table: Rows of `tprl_env.evaluation.experiment_tables.curves`.
        arms: In the order of the legend.
        path: PNG file to write.
        task: For the title.
    """
    figure, axes = new_figure()
    budget = table["budget"].min()
    for arm, color in method_colors(arms).items():
        own = table[(table["arm"] == arm) & (table["budget"] == budget)]
        # a resumed run measures the scores after its checkpoint again: the last one counts
        points = own.pivot_table(
            index="lvlm_scores", columns="seed", values="accuracy", aggfunc="last"
        )
        points.index /= 1000
        for seed in points:
            axes.plot(points[seed].dropna(), color=color, linewidth=0.8, alpha=0.25)
        axes.plot(points.dropna().mean(axis=1), marker=".", color=color, label=arm)
    axes.set_xlabel("LVLM scores used (thousands)")
    axes.set_ylabel(f"accuracy at {budget} tokens")
    axes.set_title(f"{task}: calibration questions, no redundancy rule; mean of seeds, thin: each")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    return save_figure(figure, path)
