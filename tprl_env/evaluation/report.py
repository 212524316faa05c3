"""The self-contained HTML page of a comparison.

Everything is told from the numbers in ``results.json`` and from the pictures drawn of them; the
page embeds its pictures, so that one file can be mailed.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_env.evaluation.findings import (
    FULL_PASS,
    at_budget,
    headline,
    headline_budget,
)
from tprl_env.evaluation.plots import by_method, method_colors
from tprl_env.files import write_text

if TYPE_CHECKING:
    from tprl_env.evaluation.trajectories import Examples

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:1.5em auto;padding:0 1em;color:#222}
h1{font-size:1.5em;line-height:1.25}h2{font-size:1.2em;margin-top:2em}
.headline{font-size:1.25em;font-weight:600;border-left:5px solid #c8102e;padding-left:.7em}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6em 0;font-size:.92em}
td,th{padding:.25em .6em;text-align:right;vertical-align:top;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left;min-width:9em;position:sticky;left:0;background:#fff}
tr.policy td,tr.policy td:first-child{font-weight:600;background:#fdf0f1}
.hint{display:none;color:#555}
.ci{color:#666;font-size:.85em;font-weight:400;white-space:nowrap}
img{max-width:100%}figure{margin:1.5em 0}figcaption{color:#555}
.strip img{max-width:none;width:1040px}.plot img{max-width:none;width:100%;min-width:680px}
@media(min-width:1100px){.strip img{width:100%;max-width:1080px}}
@media(min-width:1100px){.plot img{width:auto;max-width:100%}}
@media(max-width:760px){.hint{display:block}.accuracy td:nth-child(2){display:none}
.accuracy th:nth-child(2){display:none}td:first-child,th:first-child{min-width:7.5em}}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
code,pre{background:#f4f4f4;padding:0 .3em;overflow-wrap:anywhere;white-space:pre-wrap}
dt{font-weight:600}dd{margin:0 0 .5em 0}
"""
GLOSSARY = {
    "visual token": "One of the vectors that the vision tower makes of a picture. Pruning keeps "
    "some of them; the language model then answers from those alone.",
    "accuracy": "Share of the questions whose generated answer equals a reference answer.",
    "policy, imitation": "The policy is a network that sees picture and question and decides what "
    "is kept. It first imitates the model's own attention (imitation only), then learns from "
    "rewards.",
    "heuristic, oracle, random": "A heuristic is a published rule without training; the oracle "
    "knows which tokens the question is about, which no method can; random ignores everything.",
    "LVLM score": "One answer of the model, scored, with one choice of tokens: the unit of cost.",
}


def _named(results: Mapping[str, Any], name: str) -> str:
    """A method's name after a dot of the colour that it has in the plots."""
    color = method_colors(row["name"] for row in results["methods"])[name]
    return f'<span class=dot style="background:{color}"></span>{html.escape(name)}'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of cells that are HTML already; each row comes with its class."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for name, cells in rows:
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr class={html.escape(name)}>{body}</tr>")
    return "<div class=wide><table>" + "\n".join(lines) + "</table></div>"


def _accuracy_cell(row: Mapping[str, Any], full: float) -> str:
    """Accuracy, its share of the full accuracy, its interval, and tokens where they differ."""
    share = f" <span class=ci>{100 * row['accuracy'] / full:.0f} %</span>" if full else ""
    low, high = row["ci95"]
    cell = f"{row['accuracy']:.3f}{share}<br><span class=ci>[{low:.3f}, {high:.3f}]</span>"
    if abs(row["mean_tokens"] - row["budget"]) >= 0.005:
        cell += f"<br><span class=ci>mean {row['mean_tokens']:.2f} tokens</span>"
    return cell


def results_table(results: Mapping[str, Any]) -> str:
    """The comparison as an HTML table, methods down, budgets across."""
    budgets = sorted({row["budget"] for row in results["methods"]}, reverse=True)
    full = results["full"]["accuracy"]
    rows = []
    for name, group in by_method(results).items():
        cells = {row["budget"]: row for row in group}
        knowledge = html.escape(group[0]["knowledge"])
        columns = [_accuracy_cell(cells[b], full) if b in cells else "" for b in budgets]
        rows.append((knowledge, [_named(results, name), knowledge, *columns]))
    head = ["method", "knowledge", *(f"{budget} tokens" for budget in budgets)]
    return f"<div class=accuracy>{_table(head, rows)}</div>"


def differences_table(results: Mapping[str, Any]) -> str:
    """Differences of the policy to others; empty where there are none."""
    found = results.get("differences", [])
    if not found:
        return ""
    rows = []
    for row in found:
        low, high = row["ci95"]
        told = "" if low <= 0 <= high else "higher" if low > 0 else "lower"
        cell = f"{row['difference']:+.4f} <span class=ci>[{low:+.4f}, {high:+.4f}]</span>"
        name = f"{html.escape(row['method'])} - {html.escape(row['to'])}"
        rows.append(("pair", [name, str(row["budget"]), cell, told or "not told apart"]))
    return (
        "<h2>Differences, paired by question</h2><p>Between the policy and the heuristic that is "
        "best on these questions at each budget, and the imitation it started from. An interval "
        "(95 %) that does not hold 0 tells the two apart on these questions; it says nothing of "
        f"other training seeds.</p>{_table(['pair', 'tokens', 'difference', ''], rows)}"
    )


def types_table(results: Mapping[str, Any]) -> str:
    """Accuracy by question type at the budget of the headline; empty without types."""
    full = results["full"]["by_type"]
    budget = headline_budget(results)
    rows = [
        (row["knowledge"], [_named(results, name), *(_share(row["by_type"], one) for one in full)])
        for name, row in at_budget(results, budget).items()
        if row.get("by_type")
    ]
    if not rows or not full:
        return ""
    everything = ("none", ["all tokens", *(_share(full, one) for one in full)])
    return (
        f"<h2>By question type, at {budget} tokens</h2>"
        f"{_table(['method', *map(html.escape, full)], [everything, *rows])}"
    )


def _share(shares: Mapping[str, float], name: str) -> str:
    return f"{shares[name]:.3f}" if name in shares else ""


def cost_section(results: Mapping[str, Any]) -> str:
    """What it took: training, and every method on the test questions."""
    training, questions = results["training"], results["full"]["questions"]
    parts = ["<h2>Cost</h2>"]
    if training:
        parts.append(f"<p>{_training_sentence(training)}</p>")
    rows = []
    for name, group in by_method(results).items():
        seconds = sum(row.get("seconds", 0.0) for row in group)
        cells = [_named(results, name), f"{seconds:.1f}", f"{len(group) * questions:,}"]
        rows.append((group[0]["knowledge"], cells))
    text = "<p>Evaluation, all budgets together, pruning and scoring"
    if FULL_PASS in by_method(results):
        text += "; the attention of the full pass was computed when the store was encoded"
    parts.append(f"{text}:</p>")
    parts.append(_table(["method", "seconds", "LVLM scores"], rows))
    if results.get("stages"):
        stages = ", ".join(f"{name} {value:.0f} s" for name, value in results["stages"].items())
        parts.append(f"<p>All stages: {html.escape(stages)}.</p>")
    return "".join(parts)


def _training_sentence(training: Mapping[str, Any]) -> str:
    resumed = training.get("resumed")
    note = f" Resumed {resumed} times, so an undisturbed run may differ." if resumed else ""
    return (
        f"Policy: {html.escape(training['algorithm'])}, preset "
        f"<code>{html.escape(training['preset'])}</code>, seed {training['seed']}, "
        f"{training['lvlm_scores']:,} LVLM scores, {training['env_steps']:,} environment steps, "
        f"{training['seconds']:.0f} s of training with the imitation it began from."
        f"{note}"
    )


def origin_section(results: Mapping[str, Any]) -> str:
    """The command, the settings and the versions that made the numbers."""
    made_by = results.get("made_by", {})
    command = made_by.get("command") or "a call from Python"
    told = {"settings": results.get("settings"), "config": made_by.get("config")}
    told = {name: value for name, value in told.items() if value}
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    shown = html.escape(json.dumps(told, indent=1, default=str))
    return (
        f"<h2>Made by</h2><pre>{html.escape(command)}</pre>"
        f"<details><summary>settings</summary><pre>{shown}</pre></details>"
        f"<p>{html.escape(packages)}; run <code>{html.escape(str(results.get('run', '-')))}</code>."
        "</p>"
    )


def _embed(path: Path, caption: str, kind: str) -> str:
    """A picture that scrolls on a narrow screen rather than shrink its text."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
    picture = f'<div class="wide {kind}">{picture}</div>'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _introduction(results: Mapping[str, Any]) -> str:
    full = results["full"]
    text = (
        f"{full['questions']} test questions of {html.escape(results['task'])}, "
        f"{results['visual_tokens']} visual tokens per picture. The headline is told at the "
        "budget nearest to 5 % of the tokens."
    )
    row = at_budget(results, headline_budget(results)).get(FULL_PASS)
    if row is not None:
        text += (
            f" Not counted as a heuristic in it: {html.escape(FULL_PASS)}, "
            f"{100 * row['accuracy']:.1f} %, which first runs the whole language model over all "
            "tokens."
        )
    return f"<p>{text}</p>"


def write_report(
    results: Mapping[str, Any],
    figures: Sequence[tuple[Path, str]],
    examples: Examples | None,
    path: Path,
) -> Path:
    """Write the self-contained page.

    Args:
        results: Content of ``results.json``.
        figures: Plots and their captions.
        examples: Drawn trajectories, None for none.
        path: HTML file to write.
    """
    title = f"{html.escape(results['task'])}: which visual tokens can the model do without?"
    drawn = [] if examples is None else examples.pictures
    told = "" if examples is None else html.escape(examples.chosen)
    glossary = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in GLOSSARY.items())
    body = [
        f"<h1>{title}</h1>",
        f"<p class=headline>{html.escape(headline(results))}</p>",
        _introduction(results),
        "<p class=hint>Wide tables and pictures scroll sideways.</p>",
        "<h2>Accuracy</h2><p>Small: share of the accuracy with all tokens, and the 95 % interval "
        "in brackets. Rows with a threshold keep a number of tokens that varies by question: their "
        "mean is printed where it differs from the column's.</p>",
        results_table(results),
        *(_embed(file, caption, "plot") for file, caption in figures),
        differences_table(results),
        types_table(results),
        *([f"<h2>Trajectories</h2><p>{told}</p>"] if drawn else []),
        *(_embed(file, caption, "strip") for file, caption in drawn),
        cost_section(results),
        f"<h2>Glossary</h2><dl>{glossary}</dl>",
    ]
    text = "".join(body).replace(" %", "&nbsp;%") + origin_section(results)
    run = html.escape(str(results.get("run", "")))
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"{f'<meta name=run content={run}>' if run else ''}<title>tprl-env report</title>"
        f"<style>{STYLE}</style></head><body>{text}</body></html>\n"
    )
    return write_text(path, page)
