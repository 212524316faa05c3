"""The main job on the built-in LVLM: encode, learn what to keep, compare, report.

``tprl quickstart`` runs :func:`run_quickstart`. Every stage leaves files in ``out`` and is skipped
when a finished one of the same settings is there already, so an interrupted run goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tprl_env.comparison import (
    available_pruners,
    build_results,
    compare,
    penalties,
    policy_entries,
    tune_penalty,
    write_comparison,
)
from tprl_env.data.features.store import FeatureStore
from tprl_env.learning_curve import LearningCurve, curve_hook
from tprl_env.ray_session import ray_session
from tprl_env.rllib.placement import actor_cpus
from tprl_env.scoring import local_scorer
from tprl_env.trajectories import choose_examples, draw_examples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tprl_env.lvlm.base import LVLM
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.config import TrainConfig

BUDGETS = (48, 29, 14, 7, 4)
TRAJECTORY_BUDGETS = (72, 29, 14, 7)
TRAJECTORIES = 10
CURVE_QUESTIONS = 300  # calibration questions per point of the learning curve


@dataclass(frozen=True)
class QuickstartSettings:
    """Size and place of a quickstart run.

    Attributes:
        task: ``crowded`` or ``sparse``.
        out: Folder of everything the run writes.
        preset: Config of ``rllib_configs/``.
        seed: Seed of data order, demonstrations, policy and training.
        scale: Multiplies the sizes below; 1 takes about ten minutes on two cores.
        train_questions: Questions of the training store.
        calibration_questions: Questions of the calibration store.
        test_questions: Questions of the test store.
        code_width: Width of the codes.
    """

    task: str = "crowded"
    out: Path = field(default_factory=lambda: Path("runs/quickstart"))
    preset: str = "recommended"
    seed: int = 0
    scale: float = 1.0
    train_questions: int = 6000
    calibration_questions: int = 600
    test_questions: int = 1800
    code_width: int = 64

    def sized(self, count: int) -> int:
        """A count multiplied by ``scale``, at least one scene's questions."""
        return max(12, round(count * self.scale))


class Stopwatch:
    """Prints what is going on and how long it took."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Time one stage."""
        begin = time.perf_counter()
        print(f"[{begin - self.start:6.1f} s] {what}", flush=True)
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)


def encode_split(
    settings: QuickstartSettings, lvlm: LVLM, split: str, questions: int
) -> FeatureStore:
    """Encode one split of the built-in scenes, with the LVLM's question-token attention."""
    from tprl_env.data import load_dataset
    from tprl_env.encode import add_question_attention, encode_dataset

    name = f"scenes-{settings.task}"
    samples = load_dataset(name, split, limit=questions, seed=settings.seed)
    description = {"data": name, "split": split, "limit": questions, "seed": settings.seed}
    store = encode_dataset(lvlm, samples, settings.out / "stores" / split, description=description)
    if not store.has_channel("question_attention"):
        add_question_attention(store, lvlm)
    return store


def encode_all(
    settings: QuickstartSettings, lvlm: LVLM, watch: Stopwatch
) -> dict[str, FeatureStore]:
    """Training, calibration and test stores with codes."""
    from tprl_env.policy.autoencoder_training import (
        TokenAutoencoder,
        train_autoencoder,
        write_codes,
    )

    sizes = {
        "train": settings.sized(settings.train_questions),
        "calibration": settings.sized(settings.calibration_questions),
        "test": settings.sized(settings.test_questions),
    }
    stores = {}
    for split, questions in sizes.items():
        with watch.stage(f"encode {split}", f"encoding {questions} {split} questions"):
            stores[split] = encode_split(settings, lvlm, split, questions)
    folder = settings.out / "autoencoder"
    with watch.stage("autoencoder", f"token autoencoder, code width {settings.code_width}"):
        if folder.is_dir():
            autoencoder = TokenAutoencoder.from_pretrained(folder)
        else:
            steps = max(20, round(1500 * min(1.0, settings.scale)))
            autoencoder, report = train_autoencoder(
                stores["train"], code_width=settings.code_width, steps=steps, seed=settings.seed
            )
            autoencoder.save_pretrained(folder)
            print(
                f"           explained variance {report.explained_variance:.4f} on held-out images"
            )
        for store in stores.values():
            if not store.has_channel("codes"):
                write_codes(store, autoencoder)
    return {split: FeatureStore.open(store.path) for split, store in stores.items()}


def imitated(config: TrainConfig, store: FeatureStore, folder: Path) -> PruningPolicy | None:
    """The policy after learning from demonstrations, before any reward; kept in ``folder``.

    ``None`` for a preset without demonstrations.
    """
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.warmup import imitate

    if config.demonstrator == "none":
        return None
    if not (folder / "config.json").is_file():
        report = imitate(config, store, folder)
        print(f"           agreement with the demonstrator {report.agreement:.3f}", flush=True)
    return PruningPolicy.from_pretrained(folder)


@contextmanager
def all_threads() -> Iterator[None]:
    """Let torch use every core, for the stages that run alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # a container may have fewer than the host
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_quickstart(
    settings: QuickstartSettings, overrides: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Chain encode, autoencoder, imitation, PPO, comparison and report.

    Args:
        settings: Size and place.
        overrides: Fields of the training preset.

    Returns:
        Content of ``results.json``.

    Raises:
        ValueError: A setting is out of range, or ``out`` holds a run of other settings.
    """
    from tprl_env.lvlm import load_lvlm
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.config import load_config
    from tprl_env.rllib.train import train

    watch = Stopwatch()
    name = f"builtin:{settings.task}"
    fields = {
        "source": str((settings.out / "stores" / "train").resolve()),
        "lvlm": name,
        "seed": str(settings.seed),
        **dict(overrides or {}),
    }
    config = load_config(settings.preset, fields)
    if settings.scale < 1:
        shrunk = {"lfd_steps": max(10, round(config.lfd_steps * settings.scale))}
        if config.max_scores:
            shrunk["max_scores"] = max(256, round(config.max_scores * settings.scale))
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
    )
    with watch.stage("training", f"{config.algorithm.upper()} on RLlib, preset {settings.preset}"):
        result = train(
            config,
            settings.out / "train",
            resume=(settings.out / "train" / "config.json").is_file(),
            init_policy=None if imitation is None else settings.out / "imitation",
            on_iteration=curve_hook(curve, imitation, config.max_scores or 50_000),
        )
    training = {
        "algorithm": config.algorithm.upper(),
        "preset": settings.preset,
        "seconds": round(result.progress.seconds, 2),
        "lvlm_scores": result.progress.scores,
        "env_steps": result.progress.env_steps,
        "seed": settings.seed,
    }
    policies = {"policy": PruningPolicy.from_pretrained(result.policy_path)}
    if imitation is not None:
        policies["imitation only"] = imitation
    return _finish(settings, config, lvlm, stores, policies, training, curve, watch)


def _finish(
    settings: QuickstartSettings,
    config: TrainConfig,
    lvlm: LVLM,
    stores: Mapping[str, FeatureStore],
    policies: Mapping[str, PruningPolicy],
    training: Mapping[str, Any],
    curve: LearningCurve,
    watch: Stopwatch,
) -> dict[str, Any]:
    """Evaluate on the test split and write everything that people read."""
    from tprl_env.rllib.config import scorer_spec
    from tprl_env.scoring.pool import ScorerPool

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
    spec = scorer_spec(config.replace(source=str(test.path.resolve()), metric="exact"))
    with watch.stage("evaluation", f"comparison on {len(test)} test questions"):
        with (
            ray_session(actor_cpus(config)),
            closing(ScorerPool.start(spec, config.num_scorers)) as scorer,
        ):
            rows = compare(test, scorer, entries, BUDGETS, samples)
            drawn = draw_examples(
                test,
                scorer,
                best[TRAJECTORY_BUDGETS[-1]],
                choose_examples(test, samples, TRAJECTORIES),
                TRAJECTORY_BUDGETS,
                settings.out / "trajectories",
                lvlm,
            )
    chosen = {
        "scale": settings.scale,
        "code_width": settings.code_width,
        "redundancy_penalty": penalties(best),
    }
    extra = {"settings": chosen}
    results = build_results(settings.task, rows, training, {**extra, "stages": watch.seconds})
    write_comparison(
        settings.out,
        results,
        rows,
        test,
        samples,
        curve=curve.points(),
        curve_full=curve.full(),
        trajectories=drawn,
    )
    total = time.perf_counter() - watch.start
    print(f"[{total:6.1f} s] done: {settings.out / 'report.html'}", flush=True)
    return results
