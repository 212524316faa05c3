"""RLlib with two runners, each metered: see `rollout`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium

from tprl_env.data.features import shared_source
from tprl_env.data.features.store import FeatureStore
from tprl_env.env.scorer import BoolArray, FloatArray, IntArray
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.families.llava import LlavaLVLM
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import TrainConfig, scorer_spec
from tprl_env.rllib.rollout.module import TokenPruningModule
from tprl_env.scoring.lvlm_scorer import LVLMScorer
from tprl_env.scoring.pool import ScorerPool
from tprl_env.scoring.spec import ScorerSpec

MODULE = "default_policy"
SCORERS: dict[str, TimedScorer] = {}
"""The scorer of each contender, by its name; RLlib builds two of them out of sight."""


@lru_cache(maxsize=1)
def open_lvlm(spec: str) -> LlavaLVLM:
    """One LVLM for the whole process, on the CPU in float32."""
    lvlm = load_lvlm(spec, device="cpu", dtype="float32")
    if not isinstance(lvlm, LlavaLVLM):
        raise ValueError(f"this benchmark needs a LLaVA, got {type(lvlm).__name__} from {spec!r}")
    return lvlm


def timed_scorer(spec: ScorerSpec) -> TimedScorer:
    """The scorer of the contender ``spec.options["name"]``."""
    inner = LVLMScorer(open_lvlm(spec.lvlm), FeatureStore.open(spec.source), spec.score_kind)
    return SCORERS.setdefault(spec.options["name"], TimedScorer(inner))


class TimedScorer:
    """Counts the CPU seconds of an LVLM's scorer."""

    def __init__(self, inner: LVLMScorer) -> None:
        self.inner, self.stats, self.seconds = inner, inner.stats, 0.0

    def __call__(self, samples: IntArray, keep: BoolArray) -> FloatArray:
        """Score a request."""
        began = time.process_time()
        scores = self.inner(samples, keep)
        self.seconds += time.process_time() - began
        return scores


@dataclass
class Cost:
    """What one iteration took: CPU seconds by phase, wall-clock seconds."""

    steps: int = 0
    trained: int = 0
    collect: float = 0.0
    scoring: float = 0.0
    update: float = 0.0
    wall: float = 0.0
    collect_wall: float = 0.0

    @property
    def rollout(self) -> float:
        """Collecting without the LVLM's part."""
        return self.collect - self.scoring

    @property
    def cpu(self) -> float:
        """CPU seconds per useful step."""
        return (self.collect + self.update) / self.steps

    @property
    def collected(self) -> float:
        """CPU seconds of collecting per useful step."""
        return self.collect / self.steps

    @property
    def rate(self) -> float:
        """Useful steps collected per second of wall-clock time."""
        return self.steps / self.collect_wall


class Watch:
    """CPU and wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(CPU, wall) seconds."""
        return time.process_time() - self._cpu, time.perf_counter() - self._wall


class WithRLlib:
    """``Algorithm.train()`` with the fast or the default runner.

    Scores in this process, or with scorer actors, whose CPU seconds are not seen here.
    """

    def __init__(self, name: str, config: TrainConfig, actors: int = 0, dtype: str = "") -> None:
        self._config = config.replace(
            **{"rollout.runner": "default" if name == "default" else "fast"}
        )
        self._pool: ScorerPool | None = None
        if actors:
            self._config = self._config.replace(
                **{
                    "scoring.scorer": "lvlm",
                    "scoring.factory": "",
                    "scoring.dtype": dtype,
                    "resources.num_scorers": actors,
                }
            )
            self._pool = ScorerPool.start(scorer_spec(self._config), actors)
        else:
            self._config = self._config.replace(**{"scoring.options": {"name": name}})
        address = None if self._pool is None else self._pool.address
        self._algorithm = algorithm_config(self._config, pool=address).build_algo()
        self._scorer = SCORERS.get(name)
        runner = self._algorithm.env_runner
        self._cost = Cost()
        runner.sample = self._timed(runner.sample)

    def _timed(self, sample: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def timed_sample(**options: Any) -> list[Any]:
            watch = Watch()
            episodes = sample(**options)
            cpu, wall = watch.read()
            self._cost.collect += cpu
            self._cost.collect_wall += wall
            self._cost.steps += sum(len(episode) for episode in episodes)
            return episodes

        return timed_sample

    def iterate(self) -> Cost:
        """One training iteration."""
        cost = self._cost = Cost()
        scored, watch = self._scored(), Watch()
        found = self._algorithm.train()
        cpu, cost.wall = watch.read()
        cost.update = cpu - cost.collect
        cost.scoring = self._scored() - scored
        cost.trained = int(found["learners"][MODULE]["num_module_steps_trained"])
        return cost

    def _scored(self) -> float:
        return 0.0 if self._scorer is None else self._scorer.seconds

    def close(self) -> None:
        """Stop the algorithm and its actors."""
        self._algorithm.stop()
        if self._pool is not None:
            self._pool.close()


def new_module(config: TrainConfig) -> TokenPruningModule:
    """The policy as every contender starts with it."""
    spec = algorithm_config(config).rl_module_spec
    rows = shared_source(config.source).max_tokens
    space = config.rules.observation_space(shared_source(config.source))
    spec.observation_space, spec.action_space = space, gymnasium.spaces.MultiBinary(rows)
    return spec.build()
