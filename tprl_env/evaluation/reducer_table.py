"""Tables and pictures of a comparison of reducers, from ``reducers.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.env.render import drawn_picture
from tprl_env.env.token_layers import layers_of, token_map
from tprl_env.evaluation.plots import save_figure
from tprl_env.evaluation.trajectories import choose_examples
from tprl_env.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tprl_env.evaluation.reducers import Bench, Measured

Rows = Sequence[Mapping[str, Any]]
SHOWN = 14  # examples are drawn at this average, or at the nearest that a method can have
_KEPT = ", positions kept"
_WIDTH = 4  # methods side by side in the drawn examples
_COLORS = (
    *("#7f7f7f", "#bbbbbb", "#1f77b4", "#17becf", "#2ca02c", "#111111", "#98df8a", "#555555"),
    *("#ff7f0e", "#ffbb78", "#9467bd", "#c5b0d5", "#8c564b", "#c49c94", "#e377c2", "#f7b6d2"),
    *("#bcbd22", "#6b6ecf", "#637939", "#843c39", "#d6616b", "#e7ba52", "#393b79", "#00441b"),
    *("#5254a3", "#a55194", "#008080", "#b5651d", "#4daf4a", "#377eb8"),
)
_POLICY = "#c8102e"


def by_name(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each method, in the order of the file."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def marks(row: Mapping[str, Any]) -> str:
    """``*`` for a method made for a larger model, ``+`` for a substitute's row."""
    return ("*" if row["larger_model"] else "") + ("+" if row["substitute"] else "")


def table(content: Mapping[str, Any]) -> str:
    """Markdown: one line per method and feasible budget, then what was not feasible."""
    full, rows = content["full"], content["rows"]
    names = list(by_name(rows))
    feasible = [row for row in rows if row["feasible"]]
    order = sorted(feasible, key=lambda row: (-row["budget"], names.index(row["name"])))
    lines = [
        f"{content['questions']} questions, {content['visual_tokens']} visual tokens, "
        f"{content['num_layers']} decoder layers; with all tokens {full['accuracy']:.3f} "
        f"({full['ci95'][0]:.3f}, {full['ci95'][1]:.3f}), {full['ms_llm']:.2f} ms and "
        f"{_mega(full['flops_llm'])} MFLOPs per question; the vision tower's "
        f"{full['flops_tower'] / 1e6:.1f} are in no row but those of ToMe and FlowCut, which run "
        "it in another form.",
        "",
        "| average | method | positions | achieved | enter | accuracy | less the policy | "
        "reducer ms | LLM ms | MFLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(row) for row in order]
    refused = refusals(rows)
    if refused:
        lines += ["", "Not feasible:", "", *refused]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    paired = row.get("minus_policy")
    difference = "" if paired is None else f"{paired[0]:+.3f} ({paired[1]:+.3f}, {paired[2]:+.3f})"
    name = row["name"].removesuffix(_KEPT)
    return (
        f"| {row['budget']} | {name}{marks(row)} | {row['positions']} | "
        f"{row['average_tokens']:.2f} | {row['entering_tokens']:.1f} | {row['accuracy']:.3f} "
        f"({low:.3f}, {high:.3f}) | {difference} | {row['ms_reducer']:.2f} | {row['ms_llm']:.2f} "
        f"| {_mega(total_flops(row))} |"
    )


def total_flops(row: Mapping[str, Any]) -> float | None:
    """Of LLM and reducer; ``None`` where the LLM's are not known."""
    known = row["flops_llm"] is not None
    return float(row["flops_llm"] + row["flops_reducer"]) if known else None


def _mega(flops: float | None) -> str:
    return "-" if flops is None else f"{flops / 1e6:.1f}"


def refusals(rows: Rows) -> list[str]:
    """One line per method and reason, with the budgets that it concerns."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if not row["feasible"]:
            reason = row["reason"].replace(f", got {row['budget']}", "")
            found.setdefault((row["name"], reason), []).append(row["budget"])
    return [
        f"- {name} at {', '.join(map(str, budgets))}: {reason}"
        for (name, reason), budgets in found.items()
    ]


def draw_all(
    content: Mapping[str, Any], measured: Sequence[Measured], bench: Bench, folder: Path
) -> list[Path]:
    """``reducers.md`` and the three pictures."""
    return [
        write_text(folder / "reducers.md", table(content)),
        plot_against(content, "tokens", folder / "accuracy_tokens.png"),
        plot_against(content, "flops", folder / "accuracy_flops.png"),
        draw_examples(measured, bench, folder / "examples.png"),
    ]


def colors(rows: Rows) -> dict[str, str]:
    """One per method, whatever its positions."""
    names = dict.fromkeys(name.removesuffix(_KEPT) for name in by_name(rows))
    others = [name for name in names if name != "policy"]
    return {"policy": _POLICY} | {n: _COLORS[i % len(_COLORS)] for i, n in enumerate(others)}


def _figure(width: float, height: float) -> Figure:
    # The Agg canvas is bound to the figure: no display, no global pyplot state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_against(content: Mapping[str, Any], what: str, path: Path) -> Path:
    """Accuracy against tokens or FLOPs: before the LLM by positions, and inside it."""
    figure = _figure(16, 8.5)
    panels = figure.subplots(1, 3, sharey=True)
    titles = (
        "before the LLM, positions as the authors' code has them",
        "before the LLM, positions kept",
        "inside the LLM (dashed: positions kept)",
    )
    for number, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set_xscale("log")
        axes.minorticks_off()
        _lines(axes, content, what, number)
        axes.axhline(content["full"]["accuracy"], color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(
            "visual tokens per decoder layer, mean"
            if what == "tokens"
            else "MFLOPs per question: LLM prefill and reducer"
        )
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, fontsize=8.5,
                        frameon=False)  # fmt: skip
    panels[0].set_ylabel("accuracy, 95 % interval (dotted: all tokens)")
    panels[0].set_ylim(0, 1.02)
    return save_figure(figure, path)


def panel_of(row: Mapping[str, Any]) -> set[int]:
    """In which of the three panels a row is drawn; the policy is in all."""
    if row["knowledge"] == "policy":
        return {0, 1, 2}
    if row["kind"] == "layer pruner" and row["entering_tokens"] > row["average_tokens"] + 1:
        return {2}
    if row["name"].endswith(_KEPT):
        return {1}
    return {0} if row["positions"] == "contiguous" else {0, 1}


def _lines(axes: Axes, content: Mapping[str, Any], what: str, panel: int) -> None:
    ink = colors(content["rows"])
    ticks: set[float] = set()
    for name, group in by_name(content["rows"]).items():
        rows = [row for row in group if row["feasible"] and _x(row, what) > 0]
        if not rows or panel not in panel_of(rows[0]):
            continue
        x = [_x(row, what) for row in rows]
        y = [row["accuracy"] for row in rows]
        low = [max(row["accuracy"] - row["ci95"][0], 0) for row in rows]
        high = [max(row["ci95"][1] - row["accuracy"], 0) for row in rows]
        axes.errorbar(
            x,
            y,
            yerr=[low, high],
            color=ink[name.removesuffix(_KEPT)],
            linestyle="--" if name.endswith(_KEPT) and panel == 2 else "-",
            marker={"pruner": "o", "merger": "s"}.get(group[0]["kind"], "^"),
            linewidth=2.5 if name == "policy" else 1.2,
            elinewidth=0.6,
            markersize=4,
            label=(name if panel == 2 else name.removesuffix(_KEPT)) + marks(group[0]),
        )
        ticks |= {row["budget"] for row in rows} if what == "tokens" else set(x)
    if what == "tokens":
        axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    elif ticks:
        shown = np.geomspace(min(ticks), max(ticks), 5)
        axes.set_xticks(shown, [f"{tick:.3g}" for tick in shown])


def _x(row: Mapping[str, Any], what: str) -> float:
    if what == "tokens":
        return float(row["average_tokens"])
    return (total_flops(row) or 0.0) / 1e6


def draw_examples(measured: Sequence[Measured], bench: Bench, path: Path) -> Path:
    """What each method keeps of the same three questions; fainter = left at an earlier layer."""
    chosen = choose_examples(bench.store, bench.samples, 3)
    shown = [one for one in nearest(measured) if one.lives is not None]
    lines = -(-len(shown) // _WIDTH)
    figure = _figure(3.6 * _WIDTH, 1.5 * lines + 0.8)
    questions = " | ".join(bench.store.question(int(sample)) for sample in chosen)
    figure.suptitle(f"{questions}\naverage of tokens per layer behind each name", fontsize=9)
    blocks = np.atleast_1d(figure.subfigures(lines, _WIDTH, squeeze=False)).ravel()
    for block, one in zip(blocks, shown, strict=False):
        row = one.row
        block.suptitle(f"{row['name']}  {row['average_tokens']:.1f}", fontsize=7)
        for axes, sample in zip(block.subplots(1, len(chosen), squeeze=False)[0], chosen,
                                strict=True):  # fmt: skip
            at = int(np.flatnonzero(bench.samples == sample)[0])
            if one.lives is not None:
                _draw_one(axes, bench, int(sample), one.lives[at])
    return save_figure(figure, path)


def nearest(measured: Sequence[Measured]) -> list[Measured]:
    """Per method with positions of its own the row whose budget is nearest to `SHOWN`."""
    found: dict[str, Measured] = {}
    for one in measured:
        name = one.row["name"]
        if not one.row["feasible"] or name.endswith(_KEPT):
            continue
        best = found.get(name)
        if best is None or abs(one.row["budget"] - SHOWN) < abs(best.row["budget"] - SHOWN):
            found[name] = one
    return list(found.values())


def _draw_one(axes: Axes, bench: Bench, sample: int, lives: npt.NDArray[np.uint8]) -> None:
    picture, places = drawn_picture(bench.store, sample)
    layers, (rows, columns) = layers_of(bench.store, sample, places), bench.store.grid(sample)
    height, width = picture.shape[:2]
    box = bench.store.picture_box(sample) or (0.0, 0.0, float(height), float(width))
    share = lives[: rows * columns] / bench.lvlm.num_layers
    if layers is None:
        share = share.reshape(rows, columns)
    else:  # the tiles, or the only view
        under = token_map(layers[0], (height, width))
        share, box = np.append(share, 0.0)[under], (0.0, 0.0, float(height), float(width))
    veil = np.ones((*share.shape, 4))
    veil[..., 3] = 0.88 * (1 - share)
    axes.imshow(picture, extent=(0, width, height, 0))
    axes.imshow(veil, extent=(box[1], box[3], box[2], box[0]), interpolation="nearest")
    axes.set_axis_off()
