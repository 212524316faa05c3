"""The table as papers print it, as Markdown, LaTeX and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tprl_env.data.benchmarks import BENCHMARKS
from tprl_env.evaluation.benchmark.answering import ALL
from tprl_env.evaluation.plots import save_figure

Content = Mapping[str, Any]
Line = tuple[str, list[str]]


def lines_of(content: Content) -> tuple[list[str], list[tuple[str, list[Line]]]]:
    """Titles of the columns, and per budget its lines: the reducer and its cells.

    A cell is the value with the larger half of its interval, and the share of the unpruned model.
    """
    names = list(content["asked"])
    titles = ["method", *(BENCHMARKS[name].title for name in names), "tokens", "average"]
    cells = {(row["reducer"], row["budget"], row["benchmark"]): row for row in content["rows"]}
    means = {(row["reducer"], row["budget"]): row["relative"] for row in content["averages"]}
    blocks: dict[str, list[Line]] = {}
    for reducer, budget in dict.fromkeys(
        (row["reducer"], row["budget"]) for row in content["rows"]
    ):
        own = [cells.get((reducer, budget, name)) for name in names]
        tokens = [row["tokens"] for row in own if row is not None]
        mean = means.get((reducer, budget))
        line = (
            reducer,
            [*(_cell(row) for row in own), f"{sum(tokens) / len(tokens):.1f}",
             "-" if mean is None else f"{mean:.1f} %"],
        )  # fmt: skip
        label = "all tokens" if reducer == ALL else budget_text(budget)
        blocks.setdefault(label, []).append(line)
    return titles, list(blocks.items())


def budget_text(budget: float) -> str:
    """A budget as a heading."""
    if isinstance(budget, float) and budget <= 1:
        return f"{100 * budget:g} % of the tokens"
    return f"{budget:g} tokens"


def _cell(row: Content | None) -> str:
    if row is None:
        return "-"
    half = max(row["ci95"][1] - row["value"], row["value"] - row["ci95"][0])
    share = (
        "" if row["reducer"] == ALL or row["relative"] is None else f" ({row['relative']:.1f} %)"
    )
    return f"{row['value']:.1f} ±{half:.1f}{share}"


def markdown(content: Content) -> str:
    """The whole page."""
    titles, blocks = lines_of(content)
    lines = [
        f"# {content['lvlm']['name']}",
        "",
        "Value ± larger half of its 95 % interval over questions (share of the unpruned model). "
        "The average is the mean share over all benchmarks; tokens are visual tokens per decoder "
        "layer.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{' --- |' * len(titles)}",
    ]
    for label, block in blocks:
        if label != "all tokens":
            lines.append(f"| *{label}* |{' |' * (len(titles) - 1)}")
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in block]
    lines += ["", "How it was asked:", ""]
    for name, asked in content["asked"].items():
        known = BENCHMARKS[name]
        note = f"; {known.note}" if known.note else ""
        lines.append(
            f"- {known.title}: {known.hub}, split {asked['split']}, graded by `{asked['grader']}` "
            f"from generated text of at most {asked['max_new_tokens']} tokens{note}"
        )
    if content["differences"]:
        lines += ["", "Differences by question:", ""]
        lines += ["| benchmark | budget | reducer | against | difference |", "|" + " --- |" * 5]
    for row in content["differences"]:
        low, high = row["ci95"]
        lines.append(
            f"| {BENCHMARKS[row['benchmark']].title} | {budget_text(row['budget'])} | "
            f"{row['reducer']} | {row['to']} | {row['difference']:+.1f} [{low:+.1f}, {high:+.1f}] |"
        )
    lines += ["", f"Made by `{content['command']}`."] if content["command"] else []
    return "\n".join(lines) + "\n"


def latex(content: Content) -> str:
    """A booktabs table of the same cells."""
    titles, blocks = lines_of(content)
    lines = [rf"\begin{{tabular}}{{l{'c' * (len(titles) - 1)}}}", r"\toprule",
             _latex_line(titles), r"\midrule"]  # fmt: skip
    for number, (label, block) in enumerate(blocks):
        if number:
            lines += [r"\midrule", rf"\multicolumn{{{len(titles)}}}{{c}}{{{_escaped(label)}}} \\"]
        lines += [_latex_line([name, *cells]) for name, cells in block]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    for sign in "%_&#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("±", r"$\pm$")


def draw(content: Content, path: Path) -> Path:
    """Share of the unpruned model against tokens, a panel per benchmark."""
    from matplotlib.figure import Figure

    names = list(content["asked"])
    figure = Figure(figsize=(max(3.4 * len(names), 4.4), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    reducers = [r for r in dict.fromkeys(row["reducer"] for row in content["rows"]) if r != ALL]
    for axes, name in zip(panels, names, strict=True):
        axes.axhline(100, color="0.6", linewidth=0.8)
        for number, reducer in enumerate(reducers):
            rows = sorted(
                (r for r in content["rows"] if (r["reducer"], r["benchmark"]) == (reducer, name)),
                key=lambda row: row["tokens"],
            )
            axes.plot(
                [row["tokens"] for row in rows],
                [row["relative"] for row in rows],
                marker="osD^v"[number % 5],
                color=f"C{number % 10}",
                label=reducer,
            )
        axes.set_title(BENCHMARKS[name].title, fontsize=10)
        axes.set_xlabel("visual tokens per layer")
    panels[0].set_ylabel("share of the unpruned model, %")
    if reducers:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(len(reducers), 2 * len(names)), fontsize=8)  # fmt: skip
    return save_figure(figure, path)
