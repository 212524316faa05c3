"""What a comparison says in words and pairs: the headline, and differences between methods.

Everything is computed from the rows of the comparison; the budget of the headline follows from a
rule, so that it is not chosen by its outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tprl_env.evaluation.intervals import paired_difference

if TYPE_CHECKING:
    from tprl_env.evaluation.measure import MethodResult

IMITATION = "imitation only"
FULL_PASS = "LLM question attention (full pass)"
"""Heuristic that runs the whole LLM over all tokens before it prunes: it saves nothing."""
SHARE = 0.05  # of the visual tokens; the headline is told at the nearest budget


def policy_name(results: Mapping[str, Any]) -> str | None:
    """The policy's first row, None for a comparison of untrained pruners."""
    names = [row["name"] for row in results["methods"] if row["knowledge"] == "policy"]
    return next((name for name in names if name != IMITATION), None)


def headline_budget(results: Mapping[str, Any]) -> int:
    """The measured budget nearest to 5 % of the visual tokens, the smaller of two."""
    wanted = SHARE * results["visual_tokens"]
    budgets = {int(row["budget"]) for row in results["methods"]}
    return min(sorted(budgets), key=lambda budget: abs(budget - wanted))


def at_budget(results: Mapping[str, Any], budget: int) -> dict[str, Mapping[str, Any]]:
    """Rows of one budget by name."""
    return {row["name"]: row for row in results["methods"] if row["budget"] == budget}


def best_heuristic(rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The heuristic with the highest accuracy, without the one that needs a full pass."""
    found = [
        row for row in rows.values()
        if row["knowledge"] == "heuristic" and row["name"] != FULL_PASS
    ]  # fmt: skip
    return max(found, key=lambda row: float(row["accuracy"]), default=None)


def headline(results: Mapping[str, Any]) -> str:
    """The outcome in one sentence."""
    budget, tokens = headline_budget(results), results["visual_tokens"]
    rows, full = at_budget(results, budget), float(results["full"]["accuracy"])
    best, name = best_heuristic(rows), policy_name(results)
    kept = f"{budget} of {tokens} visual tokens ({100 * budget / tokens:.1f} %)"
    if name is None and best is None:
        return f"All {tokens} visual tokens answer {100 * full:.1f} % of the questions right."
    if name is None:
        assert best is not None
        return f"With {kept} the best heuristic, {best['name']}, answers {_told(best, full)}."
    told = f"With {kept} the policy answers {_told(rows[name], full)}"
    if best is not None:
        told += f"; {_against(results, name, best, budget)}the best heuristic, {best['name']}"
        told += f" ({_percent(best)})"
    if IMITATION in rows:
        told += f"; imitation alone {_percent(rows[IMITATION])}"
    return f"{told}."


def _told(row: Mapping[str, Any], full: float) -> str:
    """A method's accuracy and its share of the full one."""
    told = f"{_percent(row)} of the questions right"
    if not full:
        return told
    share = 100 * row["accuracy"] / full
    return f"{told}, {share:.1f} % of the accuracy with all tokens ({100 * full:.1f} %)"


def _against(results: Mapping[str, Any], name: str, best: Mapping[str, Any], budget: int) -> str:
    """The paired difference to a method in points of percent, with its interval."""
    pair = (name, best["name"], budget)
    for row in results.get("differences", []):
        if (row["method"], row["to"], row["budget"]) == pair:
            low, high = row["ci95"]
            return (
                f"{100 * row['difference']:+.1f} points (95 % interval {100 * low:+.1f} to "
                f"{100 * high:+.1f}) against "
            )
    return "compare "


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} %"


def differences(methods: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """The policy against the best heuristic and against imitation at every budget, by question.

    Args:
        methods: Rows of the comparison, without the unpruned model.

    Returns:
        ``{"method", "to", "budget", "difference", "ci95"}`` each; empty without a policy.
    """
    table = {"methods": [row.as_dict() for row in methods]}
    name = policy_name(table)
    if name is None:
        return []
    found = []
    for budget in sorted({row.budget for row in methods}, reverse=True):
        rows = {row.name: row for row in methods if row.budget == budget}
        best = best_heuristic(at_budget(table, budget))
        others = [*([best["name"]] if best else []), *([IMITATION] if IMITATION in rows else [])]
        for other in others:
            mean, low, high = paired_difference(rows[name].scores, rows[other].scores)
            bounds = [round(low, 5), round(high, 5)]
            difference = {"difference": round(mean, 5), "ci95": bounds}
            found.append({"method": name, "to": other, "budget": budget, **difference})
    return found
