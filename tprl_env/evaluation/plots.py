"""The plots of a comparison, drawn from ``results.json`` and ``learning_curve.jsonl``.

A method has the same colour in every plot, see `method_colors`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tprl_env.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
Drawn = TypeVar("Drawn")
COLORS = {
    "policy": "#c8102e",
    "policy, plain top-k": "#e8743b",
    "policy, calibrated threshold": "#8e44ad",
    "policy, chosen counts": "#c2185b",
    "imitation only": "#d4a017",
    "random": "#7f7f7f",
    "uniform grid": "#8c564b",
    "CLS attention (FasterVLM)": "#1f77b4",
    "VisPruner": "#17becf",
    "DivPrune": "#2ca02c",
    "LLM question attention (full pass)": "#5b6abf",
    "question oracle": "#222222",
}
SPARE = ("#bcbd22", "#e377c2", "#393b79", "#637939", "#843c39", "#7b4173", "#3182bd", "#e6550d")
STYLES = ("-", "--", "-.", ":")
RUN_TEXT = "tprl_run"
"""Text of a PNG that holds ``run`` of the results file it belongs to."""
PICTURE_FAILURES = (
    *(ImportError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(ArithmeticError, RuntimeError, MemoryError),
)
"""What drawing may raise, in matplotlib, Pillow or here: no picture is worth the numbers."""


def attempt(name: str, make: Callable[[], Drawn]) -> Drawn | None:
    """Draw a picture; one that fails is a warning that names it, and None."""
    try:
        return make()
    except PICTURE_FAILURES as error:
        logger.warning(
            "%s could not be drawn (%s: %s); the numbers were written before and are whole",
            name, type(error).__name__, error,
        )  # fmt: skip
        return None


def method_colors(names: Iterable[str]) -> dict[str, str]:
    """Name to colour: a method of ours keeps its own, others get spare ones in their order."""
    found: dict[str, str] = {}
    for name in names:
        if name not in found:
            spare = sum(other not in COLORS for other in found)
            found[name] = COLORS.get(name, SPARE[spare % len(SPARE)])
    return found


@contextmanager
def _own_backend() -> Iterator[None]:
    """Import matplotlib as if no backend were chosen: a notebook's MPLBACKEND may not exist here.

    Nothing is shown on a screen, so that the choice would have no use even where it works.
    """
    chosen = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen


def new_figure(width: float = 8.0, height: float = 5.0) -> tuple[Figure, Axes]:
    """An empty figure, in inches, that needs no display."""
    # The Agg canvas is bound to the figure: no display, no global pyplot state.
    with _own_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: Path, run: str = "") -> Path:
    """Write a figure as PNG, whole or not at all, with the run that it belongs to."""
    told = {RUN_TEXT: run} if run else None
    return write_atomically(
        path, lambda stream: figure.savefig(stream, format="png", metadata=told)
    )


def by_method(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each method, largest budget first, in the order of the file."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["methods"]:
        rows.setdefault(row["name"], []).append(row)
    return {name: sorted(group, key=lambda row: -row["budget"]) for name, group in rows.items()}


def plot_accuracy(results: Mapping[str, Any], path: Path) -> Path:
    """Accuracy against tokens kept, one line per method, with 95 % bands."""
    figure, axes = new_figure()
    full = results["full"]["accuracy"]
    axes.axhline(full, color="black", linewidth=1, linestyle="--")
    axes.annotate(
        f"all {results['visual_tokens']} tokens: {full:.3f}",
        (0.01, full),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
    )
    colors = method_colors(row["name"] for row in results["methods"])
    for name, rows in by_method(results).items():
        policy, color = rows[0]["knowledge"] == "policy", colors[name]
        tokens = [row["mean_tokens"] for row in rows]
        axes.plot(
            tokens,
            [row["accuracy"] for row in rows],
            label=name,
            color=color,
            marker="o" if policy else ".",
            linewidth=2.4 if policy else 1.3,
            linestyle=":" if rows[0]["knowledge"] == "oracle" else "-",
            zorder=3 if policy else 2,
        )
        low, high = zip(*(row["ci95"] for row in rows), strict=True)
        axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    ticks = sorted({row["budget"] for row in results["methods"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept (log scale)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.03)
    axes.set_title(f"{results['task']}: accuracy against visual tokens kept")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    return save_figure(figure, path, str(results.get("run", "")))


def plot_learning_curve(
    points: Sequence[Mapping[str, Any]], full: float | None, path: Path, run: str = ""
) -> Path:
    """Held-out accuracy against LVLM scores used, with 95 % bands where the points hold them.

    Args:
        points: ``{"lvlm_scores": int, "accuracy": {"48": float, ...}, "ci95": {"48": [low, high],
            ...}}`` in order of training; ``ci95`` may be absent.
        full: Accuracy with all tokens on the same questions; None draws no line for it.
        path: PNG file to write.
        run: Of the results file that the picture belongs to.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("a learning curve needs at least one point, got none")
    figure, axes = new_figure()
    budgets = sorted((int(budget) for budget in points[0]["accuracy"]), reverse=True)
    scores = [point["lvlm_scores"] / 1000 for point in points]
    color = COLORS["policy"]  # one method, so one colour: budgets differ by line and marker
    for number, budget in enumerate(budgets):
        accuracy = [point["accuracy"][str(budget)] for point in points]
        style, marker = STYLES[number % len(STYLES)], "os^D"[number % 4]
        axes.plot(scores, accuracy, style, marker=marker, color=color, label=f"{budget} tokens")
        bounds = [point.get("ci95", {}).get(str(budget)) for point in points]
        if all(bounds):
            low, high = zip(*bounds, strict=True)
            axes.fill_between(scores, low, high, color=color, alpha=0.12, linewidth=0)
    if full is not None:
        axes.axhline(full, color="black", linewidth=1, linestyle="--", label="all tokens")
    axes.set_xlabel("LVLM scores used (thousands)")
    axes.set_ylabel("accuracy on the calibration split")
    axes.set_title("learning curve of the policy")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return save_figure(figure, path, run)
