"""``tprl quickstart``: encode, train, compare and report on the built-in LVLM.

``tprl quickstart`` runs :func:`run_quickstart`. Every stage leaves files in ``out`` and is skipped
if a finished one with the same settings exists, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tprl_env.checks import check_choice, check_positive
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.scenes import TASKS
from tprl_env.env.scorer import Scorer
from tprl_env.evaluation.builtin_stores import (
    QuickstartSettings,
    Stopwatch,
    all_threads,
    encode_all,
)
from tprl_env.evaluation.compare_on_store import (
    build_results,
    compare,
    write_data,
)
from tprl_env.evaluation.contenders import (
    available_pruners,
    penalties,
    policy_entries,
    tune_penalty,
)
from tprl_env.evaluation.learning_curve import LearningCurve, curve_hook
from tprl_env.evaluation.report_files import write_pictures
from tprl_env.evaluation.trajectories import Examples, draw_examples
from tprl_env.ray_session import ray_session
from tprl_env.rllib.run.placement import actor_cpus
from tprl_env.scoring import local_scorer

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import LVLM
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.config import TrainConfig

BUDGETS = (48, 29, 14, 7, 4)
TRAJECTORY_BUDGETS = (72, 29, 14, 7)
TRAJECTORIES = 10
CURVE_QUESTIONS = 300  # calibration questions per point of the learning curve


def imitated(config: TrainConfig, store: FeatureStore, folder: Path) -> PruningPolicy | None:
    """The policy after learning from demonstrations, before any reward; kept in ``folder``.

    ``None`` for a preset without demonstrations.
    """
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.run.imitate import imitate

    if config.imitation.demonstrator == "none":
        return None
    if not (folder / "config.json").is_file():
        report = imitate(config, store, folder)
        print(f"           agreement with the demonstrator {report.agreement:.3f}", flush=True)
    return PruningPolicy.from_pretrained(folder)


def run_quickstart(
    settings: QuickstartSettings,
    overrides: Mapping[str, str] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Chain encode, autoencoder, imitation, PPO, comparison and report.

    Args:
        settings: Size and place.
        overrides: Fields of the training preset.
        command: The command line, for the report; empty for a call from Python.

    Returns:
        Content of ``results.json``.

    Raises:
        ValueError: A setting is out of range, or ``out`` holds a run of other settings.
    """
    from tprl_env.lvlm import load_lvlm
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.config import load_config
    from tprl_env.rllib.run.train import train

    watch = Stopwatch()
    check_choice("task", settings.task, TASKS)
    check_positive("scale", settings.scale)
    name = f"builtin:{settings.task}"
    fields = {
        "source": str((settings.out / "stores" / "train").resolve()),
        "lvlm": name,
        "seed": str(settings.seed),
        **dict(overrides or {}),
    }
    config = load_config(settings.preset, fields)
    if settings.scale < 1:
        shrunk = {"imitation.steps": max(10, round(config.imitation.steps * settings.scale))}
        if config.limits.max_scores:
            shrunk["limits.max_scores"] = max(256, round(config.limits.max_scores * settings.scale))
        config = config.replace(**shrunk)
    lvlm = load_lvlm(name)  # refuses an unknown task before anything is written
    settings.out.mkdir(parents=True, exist_ok=True)
    with all_threads():
        stores = encode_all(settings, lvlm, watch)
        with watch.stage("imitation", "learning from demonstrations"):
            imitation = imitated(config, stores["train"], settings.out / "imitation")
    held_out = local_scorer(lvlm, stores["calibration"])
    curve = LearningCurve(
        settings.out / "learning_curve.jsonl",
        stores["calibration"],
        held_out,
        settings.sized(CURVE_QUESTIONS),
        config.rules.max_steps,
    )
    with watch.stage(
        "training", f"{config.algorithm.name.upper()} on RLlib, preset {settings.preset}"
    ):
        result = train(
            config,
            settings.out / "train",
            resume=(settings.out / "train" / "config.json").is_file(),
            init_policy=None if imitation is None else settings.out / "imitation",
            preset=Path(settings.preset).stem,
            on_iteration=curve_hook(curve, imitation, config.limits.max_scores or 50_000),
        )
    policies = {"policy": PruningPolicy.from_pretrained(result.policy_path)}
    if imitation is not None:
        policies["imitation only"] = imitation
    return _finish(settings, config, lvlm, stores, policies, result.record, curve, watch, command)


@contextmanager
def _scorer(config: TrainConfig, lvlm: LVLM, store: FeatureStore) -> Iterator[Scorer]:
    """Exact-match scorer of a store: in as many actors as the run's, in this process without."""
    from tprl_env.rllib.config import scorer_spec
    from tprl_env.scoring.pool import ScorerPool

    if not config.resources.num_scorers:
        yield local_scorer(lvlm, store)
        return
    spec = scorer_spec(
        config.replace(**{"source": str(store.path.resolve()), "rules.score_kind": "exact"})
    )
    with (
        ray_session(actor_cpus(config)),
        closing(ScorerPool.start(spec, config.resources.num_scorers)) as pool,
    ):
        yield pool


def _finish(
    settings: QuickstartSettings,
    config: TrainConfig,
    lvlm: LVLM,
    stores: Mapping[str, FeatureStore],
    policies: Mapping[str, PruningPolicy],
    training: Mapping[str, Any],
    curve: LearningCurve,
    watch: Stopwatch,
    command: str,
) -> dict[str, Any]:
    """Evaluate on the test split and write everything that people read."""
    test = stores["test"]
    samples = np.arange(len(test), dtype=np.int64)
    with watch.stage("calibration", "choosing the redundancy penalty on calibration questions"):
        tuned = {
            name: tune_penalty(policy, stores["calibration"], curve.scorer, BUDGETS)
            for name, policy in policies.items()
        }
    best = tuned.pop("policy")
    entries = {
        **policy_entries(best[BUDGETS[0]].policy, stores["calibration"], tuned=best),
        **{name: pruners.__getitem__ for name, pruners in tuned.items()},
        **available_pruners(test),
    }
    with watch.stage("evaluation", f"comparison on {len(test)} test questions"):
        with _scorer(config, lvlm, test) as scorer:
            rows = compare(test, scorer, entries, BUDGETS, samples)
    chosen = {
        "scale": settings.scale,
        "code_width": settings.code_width,
        "redundancy_penalty": penalties(best),
    }
    made_by = {"command": command, "config": config.flat()}
    extra = {"settings": chosen, "stages": watch.seconds, "made_by": made_by}
    extra["curve_full_accuracy"] = round(curve.full(), 5)
    results = build_results(settings.task, rows, training, extra)
    write_data(settings.out, results, rows, test, samples)
    last = TRAJECTORY_BUDGETS[-1]
    scores = next(row.scores for row in rows if (row.name, row.budget) == ("policy", last))

    def draw() -> Examples:
        own, place = local_scorer(lvlm, test), settings.out / "trajectories"
        return draw_examples(
            test, own, best[last], samples, scores, TRAJECTORIES, TRAJECTORY_BUDGETS, place, lvlm,
            run=str(results["run"]),
        )  # fmt: skip

    results = write_pictures(settings.out, results, draw=draw)
    total = time.perf_counter() - watch.start
    print(f"[{total:6.1f} s] done: {settings.out / 'report.html'}", flush=True)
    return results
