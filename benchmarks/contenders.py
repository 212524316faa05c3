"""Three ways to train the paper's MDP and one to collect only, each metered: see `rollout`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env import metrics, rewards
from tprl_env.episodes import choose_episode
from tprl_env.features import FeatureStore
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.llava import LlavaLVLM
from tprl_env.lvlm.scorer import LVLMScorer
from tprl_env.rllib.config import TrainConfig, rules
from tprl_env.rllib.module import TokenPruningModule, shared_source
from tprl_env.rllib.ppo import loss_settings, ppo_config, ppo_loss
from tprl_env.rllib.scorer_spec import ScorerSpec
from tprl_env.scoring import BoolArray, CachedScorer, FloatArray, IntArray

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
    inner = LVLMScorer(open_lvlm(spec.lvlm), FeatureStore.open(spec.source), spec.metric)
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


class Watch:
    """CPU and wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(CPU, wall) seconds."""
        return time.process_time() - self._cpu, time.perf_counter() - self._wall


class WithRLlib:
    """``Algorithm.train()`` with the fast or the default runner; scores in this process."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        self._config = config.replace(runner="default" if name == "default" else "fast")
        self._config = self._config.replace(scorer_options={"name": name})
        self._algorithm = ppo_config(self._config).build_algo()
        self._scorer = SCORERS[name]
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
        scored, watch = self._scorer.seconds, Watch()
        found = self._algorithm.train()
        cpu, cost.wall = watch.read()
        cost.update = cpu - cost.collect
        cost.scoring = self._scorer.seconds - scored
        cost.trained = int(found["learners"][MODULE]["num_module_steps_trained"])
        return cost

    def close(self) -> None:
        """Stop the algorithm."""
        self._algorithm.stop()


def new_module(config: TrainConfig) -> TokenPruningModule:
    """The policy as every contender starts with it."""
    spec = ppo_config(config).rl_module_spec
    rows = shared_source(config.source).max_tokens
    space = rules(config).observation_space(shared_source(config.source))
    spec.observation_space, spec.action_space = space, gymnasium.spaces.MultiBinary(rows)
    return spec.build()


class Handwritten:
    """PPO as one would write it for this task alone."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._rules = config, rules(config)
        self._source = shared_source(config.source)
        self._full = self._source.full_scores(config.metric)
        self._module = new_module(config)
        self._adam = torch.optim.Adam(self._module.parameters(), lr=config.lr)
        self._settings = loss_settings(config)
        spec = ScorerSpec(
            config.source, config.metric, lvlm=config.lvlm, options={"name": "handwritten"}
        )
        self._timed = timed_scorer(spec)
        self._scorer = CachedScorer(self._timed, self._source, config.metric, config.cache_size)
        self._random = np.random.default_rng(config.seed)
        self._module.generator.manual_seed(config.seed)

    def iterate(self) -> Cost:
        """Roll out, score, four epochs."""
        scored, watch = self._timed.seconds, Watch()
        batch = self._collect()
        collect, collect_wall = watch.read()
        trained = self._learn(batch)
        cpu, wall = watch.read()
        steps, scoring = len(batch[Columns.ACTION_LOGP]), self._timed.seconds - scored
        return Cost(steps, trained, collect, scoring, cpu - collect, wall, collect_wall)

    def _collect(self) -> dict[str, Any]:
        """All episodes in lockstep, then one request for all their masks."""
        chosen = [
            choose_episode(self._random, self._source, self._rules)[0]
            for _ in range(self._config.samples)
        ]
        samples = np.array(chosen, np.int64)
        alive = self._source.exists(samples)
        live, counts, masks, lives, parts = np.ones(len(samples), bool), [alive.sum(1)], [], [], []
        values = np.zeros((self._rules.max_steps, len(samples)), np.float32)
        for step in range(self._rules.max_steps):
            rows = np.flatnonzero(live)
            obs = {
                "sample": torch.from_numpy(samples[rows]),
                "alive": torch.from_numpy(alive[rows]),
                "step": torch.full((len(rows), 1), float(step)),
            }
            acted = self._module.act(obs)
            parts.append((*obs.values(), acted.actions, acted.logp))
            values[step, rows] = acted.values.numpy()
            alive = alive.copy()
            alive[rows] &= acted.actions.numpy().astype(bool)
            masks.append(alive)
            lives.append(live)
            counts.append(alive.sum(1))
            live = live & ~rewards.is_terminal(
                counts[-1], step + 1, self._rules.max_steps, self._rules.min_tokens
            )
        taken = np.stack(lives)
        scores = np.full(taken.shape, np.nan, np.float32)
        numbers = np.broadcast_to(samples, taken.shape)[taken]
        scores[taken] = self._scorer(numbers, np.stack(masks)[taken])
        advantages = self._advantages(scores, samples, np.stack(counts), taken, values)
        columns = [torch.cat(part) for part in zip(*parts, strict=True)]
        return {
            "sample": columns[0],
            "alive": columns[1],
            "step": columns[2],
            Columns.ACTIONS: columns[3],
            Columns.ACTION_LOGP: columns[4],
            Postprocessing.VALUE_TARGETS: torch.from_numpy((advantages + values)[taken]),
            Postprocessing.ADVANTAGES: torch.from_numpy(advantages[taken]),
        }

    def _advantages(
        self, scores: FloatArray, samples: IntArray, counts: IntArray, taken: BoolArray, values: Any
    ) -> NDArray[np.float32]:
        """Generalised advantages (T, B) of the paper's rewards, shared by mini-batches."""
        config, size = self._config, self._config.reward_batch_size
        gained = rewards.episode_rewards(
            scores, self._full[samples], counts, taken, config.alpha, config.beta, "all"
        )
        if size > 1:
            shape = (len(taken), -1, size)
            shared = rewards.batch_mean_reward(gained.reshape(shape), taken.reshape(shape))
            gained = shared.reshape(taken.shape)
        found, following = np.zeros_like(gained), np.zeros(len(samples), np.float32)
        later = np.concatenate([values[1:], np.zeros_like(values[:1])])
        for step in reversed(range(len(taken))):
            delta = gained[step] + config.gamma * later[step] - values[step]
            following = (delta + config.gamma * config.gae_lambda * following) * taken[step]
            found[step] = following
        return found.astype(np.float32)

    def _learn(self, batch: dict[str, Any]) -> int:
        """Epochs of shuffled minibatches; returns rows trained on."""
        gain = batch[Postprocessing.ADVANTAGES]
        batch[Postprocessing.ADVANTAGES] = (gain - gain.mean()) / gain.std().clamp(min=1e-4)
        rows, trained = len(gain), 0
        for _ in range(self._config.epochs):
            for part in torch.randperm(rows).split(self._config.minibatch_size or rows):
                few = {name: column[part] for name, column in batch.items()}
                obs = {name: few[name] for name in ("sample", "alive", "step")}
                out = self._module.forward_train({Columns.OBS: obs})
                distribution = self._module.action_dist_cls.from_logits(
                    out[Columns.ACTION_DIST_INPUTS]
                )
                loss = ppo_loss(
                    few,
                    distribution,
                    out[Columns.EMBEDDINGS],
                    self._settings,
                    self._config.entropy,
                ).total
                self._adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._config.grad_clip)
                self._adam.step()
                trained += len(part)
        return trained

    def close(self) -> None:
        """Nothing to stop."""


class OneByOne:
    """A sample at a time: one row through the policy, one answer generated and graded per step."""

    def __init__(self, config: TrainConfig, episodes: int) -> None:
        self._episodes, self._rules = episodes, rules(config)
        self._source: Any = shared_source(config.source)
        self._full = self._source.full_scores("exact")
        self._lvlm = open_lvlm(config.lvlm)
        self._module = new_module(config)
        self._module.generator.manual_seed(config.seed)
        self._random = np.random.default_rng(config.seed)
        self.asked: list[tuple[int, BoolArray, float]] = []

    def iterate(self) -> Cost:
        """Collect a few episodes."""
        cost, watch = Cost(), Watch()
        for _ in range(self._episodes):
            sample = choose_episode(self._random, self._source, self._rules)[0]
            cost.steps += self._episode(sample, cost)
        cost.collect, cost.wall = watch.read()
        cost.collect_wall = cost.wall
        return cost

    def _episode(self, sample: int, cost: Cost) -> int:
        """Steps of one episode."""
        number, rule = np.array([sample]), self._rules
        tokens = torch.from_numpy(self._source.codes(number))
        query = torch.from_numpy(self._source.query(number))
        alive, score = self._source.exists(number), float(self._full[sample])
        prompt = self._lvlm.prompt(self._source.question(sample))
        visual = self._source.tokens(sample)
        for step in range(rule.max_steps):
            stage, mask = torch.full((1, 1), float(step)), torch.from_numpy(alive)
            obs = {"tokens": tokens, "query": query, "alive": mask, "step": stage}
            before = int(alive.sum())
            alive = alive & self._module.act(obs).actions.numpy().astype(bool)
            kept, previous, watch = int(alive.sum()), score, Watch()
            keep = alive[0, : len(visual)]
            answer = self._lvlm.generate([prompt], [visual], [keep], max_new_tokens=20)[0]
            score = metrics.exact(answer, self._source.answers(sample))
            cost.scoring += watch.read()[0]
            rewards.step_reward(score, previous, kept, before, rule.alpha, rule.beta)
            self.asked.append((sample, alive[0], score))
            if rewards.is_terminal(kept, step + 1, rule.max_steps, rule.min_tokens):
                return step + 1
        return rule.max_steps

    def close(self) -> None:
        """Nothing to stop."""
