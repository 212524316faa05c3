"""Compare every kind of reducer on a store: ``tprl evaluate STORE --reducers ...``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tprl_env.env.budgets import Budget
from tprl_env.evaluation.measure import check_budgets, one_count
from tprl_env.evaluation.reducer_names import Contender, WantedPositions, contenders
from tprl_env.files import versions, write_json

if TYPE_CHECKING:
    from tprl_env.evaluation.reducers import Bench, Measured

BUDGETS = (60, 48, 40, 14, 7, 4)
RESULTS = "reducers.json"


def compare_reducers(
    store: str | Path,
    lvlm: str,
    out: str | Path,
    names: Sequence[str],
    *,
    policy: str | Path | None = None,
    calibration: str | Path | None = None,
    budgets: Sequence[Budget] = BUDGETS,
    positions: WantedPositions = "own",
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure reducers at matched averages; write ``reducers.json``, a table and plots.

    Args:
        store: Encoded split.
        lvlm: The LVLM that encoded it, as for ``load_lvlm``.
        out: Folder for the results.
        names: Reducers as ``name`` or ``name(field=value)``, or ``("all",)``.
        policy: Exported policy, measured first and compared with.
        calibration: Store on which the policy's redundancy penalty is chosen per budget.
        budgets: Averages of visual tokens over all decoder layers, or shares where all pictures
            have the same number.
        positions: See `tprl_env.evaluation.reducer_names.contenders`.
        limit: Number of questions used, from the first; None uses all.

    Returns:
        Content of ``reducers.json``.

    Raises:
        ValueError: Something is missing, does not fit or is out of range; or the only reducer
            cannot have a budget.
    """
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.evaluation.reducer_table import draw_all, table
    from tprl_env.evaluation.reducers import Bench
    from tprl_env.lvlm import load_lvlm

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if policy is None and calibration is not None:
        raise ValueError("calibration belongs to a policy; give its folder as policy")
    chosen = contenders(names, positions)
    model = load_lvlm(lvlm)
    opened = FeatureStore.open(store, lvlm_fingerprint=model.fingerprint)
    samples = np.arange(len(opened), dtype=np.int64)[:limit]
    counts = [one_count(budget, opened) for budget in budgets]
    trained, penalties = _policy(policy, calibration, opened, model, counts)
    bench = Bench(opened, model, samples)
    check_budgets(counts, bench.smallest_image)
    if len(chosen) == 1:
        _refuse(bench, chosen[0], counts)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is refused now
    content = {
        "store": Path(store).name,
        "dataset_fingerprint": opened.manifest.dataset_fingerprint,
        "lvlm": model.name,
        "lvlm_fingerprint": model.fingerprint,
        "questions": len(samples),
        "visual_tokens": opened.max_tokens,
        "num_layers": model.num_layers,
        "penalties": penalties,
        "full": bench.full_row(),
        "versions": versions(),
    }
    measured, rows = _measure(bench, trained + chosen, counts, content, folder)
    content["rows"] = rows
    draw_all(content, measured, bench, folder)
    print(table(content))
    return content


def _measure(
    bench: Bench,
    chosen: Sequence[Contender],
    budgets: Sequence[int],
    content: dict[str, Any],
    folder: Path,
) -> tuple[list[Measured], list[dict[str, Any]]]:
    """Contender by contender; the file is written after each, so that little is lost."""
    from tprl_env.evaluation.reducers import with_differences

    measured: list[Measured] = []
    rows: list[dict[str, Any]] = []
    for contender in chosen:
        measured += bench.measure(contender, budgets)
        policy = [one for one in measured if one.row["knowledge"] == "policy"]
        rows = with_differences(measured, policy)
        write_json(folder / RESULTS, {**content, "rows": rows})
        found = [row for row in rows if row["name"] == contender.label]
        values = [f"{r['accuracy']:.3f}" if r["feasible"] else "-" for r in found]
        print(f"{contender.label:40} {' '.join(values)}", flush=True)
    return measured, rows


def _refuse(bench: Bench, contender: Contender, budgets: Sequence[int]) -> None:
    """A reducer that is named alone must be able to have every budget."""
    for budget in budgets:
        reason = bench.refusal(contender, budget)
        if reason:
            raise ValueError(f"{contender.label} at {budget}: {reason}")


def _policy(
    folder: str | Path | None,
    calibration: str | Path | None,
    store: Any,
    model: Any,
    budgets: Sequence[int],
) -> tuple[list[Contender], dict[str, Any]]:
    """The trained policy, with the penalty of each budget where there is a calibration store."""
    if folder is None:
        return [], {}
    from tprl_env.evaluation.contenders import (
        load_policy,
        open_calibration,
        penalties,
        tune_penalty,
    )
    from tprl_env.policy.pruner import PolicyPruner
    from tprl_env.scoring import local_scorer

    trained = load_policy(folder, store)
    if calibration is None:
        pruner = PolicyPruner.as_trained(trained)
        return [Contender("policy", lambda budget: pruner, pruner.positions, {})], {}
    held_out = open_calibration(calibration, store)
    tuned = tune_penalty(trained, held_out, local_scorer(model, held_out), budgets)
    return [Contender("policy", tuned.__getitem__, "original", {})], penalties(tuned)
