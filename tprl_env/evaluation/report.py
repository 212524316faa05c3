"""Pictures and the self-contained HTML page of a comparison.

Everything is drawn from the numbers in ``results.json`` and ``learning_curve.jsonl``; the page
embeds its pictures, so that one file can be mailed.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_env.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per family; heuristics share a quiet palette so that policies stand out.
POLICY_COLORS = ("#c8102e", "#e8743b", "#8e44ad", "#d4a017")
OTHER_COLORS = ("#1f77b4", "#2ca02c", "#17becf", "#7f7f7f", "#9467bd", "#8c564b", "#bcbd22")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
tr.policy td{font-weight:600;background:#fdf0f1}.ci{color:#777;font-size:.85em;font-weight:400}
img{max-width:100%}figure{margin:1.5em 0}figcaption{color:#555}
code{background:#f4f4f4;padding:0 .3em}
"""


def new_figure(width: float = 8.0, height: float = 5.0) -> tuple[Figure, Axes]:
    """An empty figure, in inches, that needs no display."""
    # The Agg canvas is bound to the figure: no display, no global pyplot state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    return write_atomically(path, lambda stream: figure.savefig(stream, format="png"))


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
    counts = {"policy": 0, "other": 0}
    for name, rows in by_method(results).items():
        policy = rows[0]["knowledge"] == "policy"
        group, palette = ("policy", POLICY_COLORS) if policy else ("other", OTHER_COLORS)
        color = palette[counts[group] % len(palette)]
        counts[group] += 1
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
    return save_figure(figure, path)


def plot_learning_curve(points: Sequence[Mapping[str, Any]], full: float, path: Path) -> Path:
    """Held-out accuracy against LVLM scores used.

    Args:
        points: ``{"lvlm_scores": int, "accuracy": {"48": float, ...}}`` in order of training.
        full: Accuracy with all tokens on the same questions.
        path: PNG file to write.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("a learning curve needs at least one point, got none")
    figure, axes = new_figure()
    budgets = sorted((int(budget) for budget in points[0]["accuracy"]), reverse=True)
    scores = [point["lvlm_scores"] / 1000 for point in points]
    for color, budget in zip((*POLICY_COLORS, *OTHER_COLORS), budgets, strict=False):
        accuracy = [point["accuracy"][str(budget)] for point in points]
        axes.plot(scores, accuracy, marker="o", color=color, label=f"{budget} tokens")
    axes.axhline(full, color="black", linewidth=1, linestyle="--", label="all tokens")
    axes.set_xlabel("LVLM scores used (thousands)")
    axes.set_ylabel("accuracy on the calibration split")
    axes.set_title("learning curve")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return save_figure(figure, path)


def results_table(results: Mapping[str, Any]) -> str:
    """The comparison as an HTML table, methods down, budgets across."""
    budgets = sorted({row["budget"] for row in results["methods"]}, reverse=True)
    head = "".join(f"<th>{budget} tokens</th>" for budget in budgets)
    lines = [f"<tr><th>method</th><th>knowledge</th>{head}</tr>"]
    for name, rows in by_method(results).items():
        cells = {row["budget"]: row for row in rows}
        columns = ""
        for budget in budgets:
            row = cells.get(budget)
            columns += (
                "<td></td>"
                if row is None
                else f"<td>{row['accuracy']:.3f}<br><span class=ci>"
                f"[{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]</span></td>"
            )
        knowledge = html.escape(rows[0]["knowledge"])
        lines.append(
            f"<tr class={knowledge}><td>{html.escape(name)}</td><td>{knowledge}</td>{columns}</tr>"
        )
    return "<table>" + "\n".join(lines) + "</table>"


def _embed(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _training_sentence(training: Mapping[str, Any]) -> str:
    """How the policy came about; nothing where nothing was trained."""
    if not training:
        return ""
    return (
        f"Policy: {html.escape(training['algorithm'])}, preset "
        f"<code>{html.escape(training['preset'])}</code>, seed {training['seed']}, "
        f"{training['lvlm_scores']:,} LVLM scores, {training['env_steps']:,} environment steps, "
        f"{training['seconds']:.0f} s. "
    )


def write_report(
    results: Mapping[str, Any],
    figures: Sequence[tuple[Path, str]],
    trajectories: Sequence[tuple[Path, str]],
    path: Path,
) -> Path:
    """Write the self-contained page.

    Args:
        results: Content of ``results.json``.
        figures: Plots and their captions.
        trajectories: Drawn trajectories and their captions.
        path: HTML file to write.
    """
    full = results["full"]
    types = ", ".join(f"{name} {value:.3f}" for name, value in full["by_type"].items())
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    body = [
        f"<h1>{html.escape(results['task'])}: which visual tokens can the model do without?</h1>",
        f"<p>{full['questions']} test questions; with all {results['visual_tokens']} visual tokens "
        f"the model answers {full['accuracy']:.1%} ({html.escape(types)}).</p>",
        f"<p>{_training_sentence(results['training'])}Brackets: 95 % intervals.</p>",
        results_table(results),
        *(_embed(file, caption) for file, caption in figures),
        *(["<h2>Trajectories</h2>"] if trajectories else []),
        *(_embed(file, caption) for file, caption in trajectories),
        f"<p>{html.escape(packages)}</p>",
    ]
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>tprl-env report</title>"
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    return write_text(path, page)
