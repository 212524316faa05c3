"""``tprl evaluate``: choose the methods, measure them, write the result files.

Also used by the quickstart: builds the pruners that a store allows, evaluates
them at matched budgets and writes ``results.json``, ``per_question.parquet``, the plots, drawn
trajectories and ``report.html``. The numbers are written first: a picture that fails costs none.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.manifest import trusting
from tprl_env.env.budgets import Budget
from tprl_env.env.scorer import Scorer
from tprl_env.evaluation.contenders import (
    PrunerEntry,
    available_pruners,
    load_policy,
    open_calibration,
    penalties,
    policy_entries,
    tune_penalty,
)
from tprl_env.evaluation.findings import differences, policy_name
from tprl_env.evaluation.measure import (
    MethodResult,
    check_budgets,
    evaluate,
    wanted_count,
    write_per_question,
)
from tprl_env.evaluation.report_files import write_pictures
from tprl_env.evaluation.result_files import SCORES_NAME, made_from_numbers, write_results
from tprl_env.evaluation.results import TRAINING_NAME, check_results, check_training
from tprl_env.evaluation.trajectories import Examples, draw_examples
from tprl_env.files import versions
from tprl_env.policy.counts import FOLDER as COUNTS
from tprl_env.policy.counts import CountHead, CountPruner, load_head
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.scoring import local_scorer

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore


def print_row(result: MethodResult) -> None:
    """One line of live output per method and budget."""
    print(
        f"{result.name:<36} {result.knowledge:<10} {result.budget:>4} tokens "
        f"{'' if result.share is None else f'({100 * result.share:g} %) '}"
        f"(mean {result.mean_tokens:6.1f})  accuracy {result.accuracy:.3f} "
        f"[{result.ci95[0]:.3f}, {result.ci95[1]:.3f}]  {result.seconds:5.1f} s",
        flush=True,
    )


def build_results(
    task: str, rows: Sequence[MethodResult], training: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """``results.json`` from the evaluated rows, the unpruned model first."""
    full, *methods = rows
    return {
        "run": secrets.token_hex(8),
        "task": task,
        "visual_tokens": full.budget,
        "full": {
            "accuracy": round(full.accuracy, 5),
            "ci95": [round(bound, 5) for bound in full.ci95],
            "questions": len(full.scores),
            "by_type": {name: round(value, 5) for name, value in full.by_type.items()},
        },
        "methods": [row.as_dict() for row in methods],
        "differences": differences(methods),
        "training": dict(training),
        "versions": versions(),
        **extra,
    }


def write_data(
    out: Path,
    results: Mapping[str, Any],
    rows: Sequence[MethodResult],
    store: FeatureStore,
    samples: npt.NDArray[np.int64],
) -> None:
    """Write the numbers: ``per_question.parquet``, then ``results.json``, before any picture.

    Page and pictures of an older comparison are removed first: they tell of other numbers.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_results(results, sorted({row.budget for row in rows[1:]}))
    for old in made_from_numbers(out):
        old.unlink()
    ids = [store.id(int(sample)) for sample in samples]
    question_types = [store.question_type(int(sample)) for sample in samples]
    write_per_question(rows, ids, question_types, out / SCORES_NAME, str(results["run"]))
    write_results(out, results)


def compare(
    store: FeatureStore,
    scorer: Scorer,
    entries: Mapping[str, PrunerEntry],
    budgets: Sequence[Budget],
    samples: npt.NDArray[np.int64],
) -> list[MethodResult]:
    """Evaluate and print every row as it comes."""
    return evaluate(store, scorer, entries, budgets, samples=samples, on_result=print_row)


@trusting
def evaluate_store(
    store: str | Path,
    lvlm: str,
    out: str | Path,
    *,
    policy: str | Path | None = None,
    calibration: str | Path | None = None,
    threshold: float | None = None,
    pruners: Sequence[str] | None = None,
    budgets: Sequence[Budget] = (48, 29, 14, 7, 4),
    mean_tokens: bool = False,
    limit: int | None = None,
    trajectories: int = 10,
    command: str = "",
    trust: bool = False,
) -> dict[str, Any]:
    """Compare pruners on a store and write the files that people read (``tprl evaluate``).

    Args:
        store: Encoded split.
        lvlm: LVLM that encoded it, as for ``load_lvlm``.
        out: Folder for the results.
        policy: Exported policy; ``None`` compares the untrained pruners only.
        calibration: Store of another split on which thresholds and the redundancy penalty are
            calibrated.
        threshold: Evaluate the policy with this threshold too (TPRL eq. 16).
        pruners: Keys of ``PRUNERS``; by default all that the store allows.
        budgets: Token counts, or shares in (0, 1) of each picture's tokens.
        mean_tokens: The budgets are means that the policy's count head must be able to have.
        limit: Number of questions used, from the first; None uses all.
        trajectories: How many to draw with the policy.
        command: The command line, for the report; empty for a call from Python.
        trust: Compare sizes of the stores' files only, not their checksums (``--trust``).

    Returns:
        Content of ``results.json``.

    Raises:
        ValueError: Something is missing, does not fit, or is out of range.
    """
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.lvlm import load_lvlm

    if policy is None and (calibration is not None or threshold is not None):
        raise ValueError("calibration and threshold belong to a policy; give its folder as policy")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    options = {
        **{"store": str(store), "lvlm": lvlm, "policy": None if policy is None else str(policy)},
        "calibration": None if calibration is None else str(calibration),
        **{"threshold": threshold, "pruners": pruners and list(pruners)},
        **{"budgets": list(budgets), "limit": limit, "trajectories": trajectories},
    }
    model = load_lvlm(lvlm)
    opened = FeatureStore.open(store, lvlm_fingerprint=model.fingerprint)
    check_budgets(budgets, opened.max_tokens)
    samples = np.arange(len(opened), dtype=np.int64)[:limit]
    training = training_of(policy)
    trained = None if policy is None else load_policy(policy, opened)
    held_out = None if calibration is None else open_calibration(calibration, opened)
    tuned: dict[Budget, PolicyPruner] | None = None
    if trained is not None and held_out is not None:
        tuned = tune_penalty(trained, held_out, local_scorer(model, held_out), budgets)
    entries: dict[str, PrunerEntry] = {}
    if trained is not None:
        head = _head(policy or "", trained, held_out, budgets if mean_tokens else ())
        entries |= policy_entries(trained, held_out, threshold=threshold, tuned=tuned, head=head)
    entries |= available_pruners(opened, pruners)
    scorer = local_scorer(model, opened)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is refused now
    rows = compare(opened, scorer, entries, budgets, samples)
    extra: dict[str, Any] = {"made_by": {"command": command, "config": options}}
    fixed = [opened.fixed_count(opened.image_number(int(sample))) for sample in samples]
    if any(fixed):  # beside every budget: tokens that show no place of the picture
        extra["always_kept"] = round(float(np.mean(fixed)), 3)
    if tuned is not None:
        extra["settings"] = {"redundancy_penalty": penalties(tuned)}
    results = build_results(str(Path(store).name), rows, training, extra)
    write_data(out, results, rows, opened, samples)

    def draw() -> Examples:
        assert trained is not None
        steps = sorted({row.budget for row in rows[1:]}, reverse=True)
        best, name = PolicyPruner.as_trained(trained), policy_name(results)
        if tuned is not None:
            tokens = opened.exists(samples).sum(1)
            best = tuned[min(tuned, key=lambda budget: wanted_count(budget, tokens))]
        scores = next(r.scores for r in rows if (r.name, r.budget) == (name, steps[-1]))
        place = out / "trajectories"
        return draw_examples(
            opened, scorer, best, samples, scores, trajectories, steps, place, model,
            run=str(results["run"]),
        )  # fmt: skip

    drawn = draw if trained is not None and trajectories > 0 else None
    return write_pictures(out, results, draw=drawn)


def _head(
    folder: str | Path,
    policy: PruningPolicy,
    calibration: FeatureStore | None,
    means: Sequence[Budget],
) -> CountHead | None:
    """The policy's count head, if it has one or ``means`` want it.

    Raises:
        ValueError: There is none, there is no calibration split, or a mean cannot be had.
    """
    if not (means or (Path(folder) / COUNTS).is_dir()):
        return None
    head = load_head(folder, policy)
    if means and calibration is None:
        raise ValueError("mean tokens are found on a calibration split; pass calibration=STORE")
    for mean in means:
        CountPruner(policy, head=head).calibrate(calibration, mean)  # type: ignore[arg-type]
    return head


def training_of(policy: str | Path | None) -> dict[str, Any]:
    """How a policy was trained, from the ``training.json`` beside its weights; empty without.

    Raises:
        ValueError: The file is damaged or incomplete.
    """
    path = None if policy is None else Path(policy) / TRAINING_NAME
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the policy again") from error
    check_training(content, str(path))
    return dict(content)
