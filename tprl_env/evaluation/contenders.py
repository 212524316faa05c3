"""The methods compared on a store: the untrained pruners it allows, and the trained policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.data.features.store import CODES, FeatureStore
from tprl_env.env.budgets import Budget
from tprl_env.env.scorer import Scorer
from tprl_env.evaluation.measure import (
    evaluate,
    evaluate_method,
    wanted_count,
)
from tprl_env.files import write_json
from tprl_env.lvlm import load_lvlm
from tprl_env.policy.counts import CountHead, CountPruner
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.pruner import PolicyPruner, choose_penalty
from tprl_env.reducers import make_pruner
from tprl_env.reducers.interfaces import PruneInputs, Pruner, cure_for, prune_inputs
from tprl_env.scoring import local_scorer

PrunerEntry = Pruner | Callable[[Any], Pruner]


# What a comparison measures unless told otherwise; every other pruner is measured when named.
COMPARED = (
    *("random", "uniform", "cls_attention", "vispruner", "divprune", "question_attention"),
    "oracle",
)
# What encoding can write down; everything else a pruner may need comes from an LVLM.
_STORED = {field.name for field in fields(PruneInputs)} - {"vision", "clip_image", "clip_text"}
# Methods that the report labels otherwise than by their key in PRUNERS.
LABELS = {
    "random": "random",
    "uniform": "uniform grid",
    "cls_attention": "CLS attention (FasterVLM)",
    "vispruner": "VisPruner",
    "divprune": "DivPrune",
    "question_attention": "LLM question attention (full pass)",
    "question_rows": "question rows (one layer's own queries and keys)",
    "oracle": "question oracle",
}


def available_pruners(
    store: FeatureStore, names: Sequence[str] | None = None
) -> dict[str, PrunerEntry]:
    """`usable_pruners` by the label that a report gives them."""
    return {LABELS.get(name, name): one for name, one in usable_pruners(store, names).items()}


def usable_pruners(store: FeatureStore, names: Sequence[str] | None = None) -> dict[str, Pruner]:
    """Untrained pruners that the store has the inputs for.

    Args:
        store: Store to prune.
        names: Keys of ``PRUNERS``; by default those of ``COMPARED`` whose inputs the store holds.

    Raises:
        ValueError: A name is unknown, or named explicitly although the store lacks its inputs.
    """
    chosen: dict[str, Pruner] = {}
    example = prune_inputs(store, 0)
    if names is not None and "policy" in names:
        raise ValueError(
            "the pruner 'policy' needs weights; leave it out of the names and give its folder "
            "as policy (--policy)"
        )
    for name in names if names is not None else COMPARED:
        pruner = make_pruner(name)
        missing = [need for need in pruner.required() if getattr(example, need) is None]
        if names is not None and not _STORED.issuperset(missing):
            pruner.check(example, 1)  # says what to do about fields that no store holds
        if missing and names is not None:
            raise ValueError(
                f"pruner {name!r} needs {', '.join(missing)}, which this store does not hold; "
                f"{cure_for(missing)}"
            )
        if not missing:
            chosen[name] = pruner
    return chosen


def policy_entries(
    policy: PruningPolicy,
    calibration: FeatureStore | None,
    *,
    threshold: float | None = None,
    tuned: Mapping[Budget, PolicyPruner] | None = None,
    label: str = "policy",
    head: CountHead | None = None,
) -> dict[str, PrunerEntry]:
    """The trained policy by exact budget, as trained, and, where asked, by threshold.

    A threshold decides in one pass, as in TPRL eq. 16.

    Args:
        policy: The policy.
        calibration: Store on which a threshold is calibrated for each budget.
        threshold: A fixed tau in (0, 1) (TPRL eq. 16); the number of tokens then varies.
        tuned: Pruners with the redundancy penalty of each budget (see `tune_penalty`); plain
            top-k is then measured beside them.
        label: Name in the table.
        head: The policy's count head; measured at the price that keeps each budget's mean on
            ``calibration``, or the nearest that it can.

    Raises:
        ValueError: ``threshold`` is out of range.
    """
    entries: dict[str, PrunerEntry] = {
        label: PolicyPruner.as_trained(policy) if tuned is None else tuned.__getitem__
    }
    if tuned is not None and any(pruner.redundancy_penalty for pruner in tuned.values()):
        entries[f"{label}, plain top-k"] = PolicyPruner.as_trained(policy)
    if calibration is not None:

        def calibrated(budget: Budget) -> Pruner:
            tokens = calibration.exists(np.arange(len(calibration))).sum(1)
            count = wanted_count(budget, tokens)
            return PolicyPruner(policy, mode="threshold").calibrate(calibration, count)

        entries[f"{label}, calibrated threshold"] = calibrated
    if calibration is not None and head is not None:

        def chosen(budget: Budget) -> Pruner:
            tokens = calibration.exists(np.arange(len(calibration))).sum(1)
            count = wanted_count(budget, tokens)
            return CountPruner(policy, head=head).calibrate(calibration, count, nearest=True)

        entries[f"{label}, chosen counts"] = chosen
    if threshold is not None:
        fixed = PolicyPruner(policy, mode="threshold", threshold=threshold)
        entries[f"{label}, threshold {threshold:g}"] = fixed
    return entries


def tune_penalty(
    policy: PruningPolicy,
    calibration: FeatureStore,
    scorer: Scorer,
    budgets: Sequence[Budget],
    questions: int = 300,
) -> dict[Budget, PolicyPruner]:
    """For every budget the redundancy penalty that scores best, with the policy acting as trained.

    Args:
        policy: The policy.
        calibration: Store of the calibration split, never the one that is reported on.
        scorer: Exact-match scorer of that store.
        budgets: Token counts.
        questions: Number of questions used, from the first.
    """
    samples = np.arange(min(questions, len(calibration)), dtype=np.int64)

    def best(budget: Budget) -> PolicyPruner:
        def accuracy(pruner: PolicyPruner) -> float:
            row = evaluate_method("candidate", pruner, calibration, scorer, budget, samples)
            return row.accuracy

        return choose_penalty(PolicyPruner.as_trained(policy), accuracy)

    return {budget: best(budget) for budget in budgets}


def penalties(tuned: Mapping[Budget, PolicyPruner]) -> dict[str, Any]:
    """Budget to redundancy penalty, JSON-able."""
    return {str(budget): pruner.redundancy_penalty for budget, pruner in tuned.items()}


def load_policy(folder: str | Path, store: FeatureStore) -> PruningPolicy:
    """A policy that fits a store.

    Raises:
        ValueError: The folder holds no policy, or one of other widths.
    """
    policy = PruningPolicy.from_pretrained(folder)
    config = policy.config
    wanted, found = (
        (config.token_width, config.query_width),
        (store.code_width, store.query_width),
    )
    if wanted != found:
        raise ValueError(
            f"the policy in {folder} reads codes of width {wanted[0]} and queries of width "
            f"{wanted[1]}, {store.path} has {found[0]} and {found[1]}; take the policy that was "
            "trained with this store's LVLM and autoencoder"
        )
    return policy


def open_calibration(path: str | Path, store: FeatureStore) -> FeatureStore:
    """The store that thresholds are calibrated on: same LVLM, same autoencoder.

    Raises:
        ValueError: It belongs to another LVLM or autoencoder.
    """
    opened = FeatureStore.open(path, lvlm_fingerprint=store.manifest.lvlm_fingerprint)
    ours, theirs = (s.channel_meta(CODES).get("fingerprint") for s in (store, opened))
    if ours != theirs:
        raise ValueError(
            f"the codes of {opened.path} come from another autoencoder than those of "
            f"{store.path}; write both with `tprl autoencoder {store.path} --load WEIGHTS --also "
            f"{opened.path}`"
        )
    return opened


def measure_references(
    lvlm: str, store: str | Path, budgets: Sequence[int], path: Path
) -> dict[str, Any]:
    """Accuracy of every untrained pruner that a store has the inputs for.

    Args:
        lvlm: What `tprl_env.lvlm.load_lvlm` opens.
        store: Test store.
        budgets: Token counts.
        path: JSON file with the result; read instead where it is there already.

    Returns:
        ``{"full_accuracy", "questions", "pruners": {name: {"knowledge", "budgets": [row, ...]}}}``
    """
    if path.is_file():
        return dict(json.loads(path.read_text("utf-8")))
    test = FeatureStore.open(store)
    scorer = local_scorer(load_lvlm(lvlm), test)
    found: dict[str, Any] = {}
    for row in evaluate(test, scorer, usable_pruners(test), budgets)[1:]:
        entry = found.setdefault(row.name, {"knowledge": row.knowledge, "budgets": []})
        entry["budgets"].append(row.as_dict())
    content = {
        "full_accuracy": float(np.asarray(test.full_scores("exact")).mean()),
        "questions": len(test),
        "pruners": found,
    }
    write_json(path, content)
    return content
