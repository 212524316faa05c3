"""Fast path: an env runner that rolls out whole episodes without waiting for their scores.

The next state depends on the mask only, so B episodes go through all T steps without the scorer.
Scorer actors get the masks of a step as soon as it is taken, and work while the following steps and
the next round are rolled out with the same weights; a scorer in this process gets one request for
the whole round. Every episode ends, so advantages need no bootstrap and are computed here.

Shapes: B episodes of a round, G draws per sample, T steps, N visual tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.utils.seeding import np_random
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.metrics import (
    ENV_STEP_TIMER,
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    RLMODULE_INFERENCE_TIMER,
    SAMPLE_TIMER,
    WEIGHTS_SEQ_NO,
)

from tprl_env.data.features import shared_source
from tprl_env.env.episodes import Episodes, choose_episode
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.rollout.advantages import estimate
from tprl_env.rllib.rollout.episodes import (
    EpisodeColumns,
    NumberedSpaces,
    Rollout,
    learner_columns,
    numbered_observation,
)
from tprl_env.rllib.rollout.module import Acted, TokenPruningModule
from tprl_env.rllib.rollout.scorers import ScorerReport, open_scorer

__all__ = ["TokenPruningRunner"]


class TokenPruningRunner(SingleAgentEnvRunner):
    """RLlib's env runner interface around lockstep rollouts.

    ``config.env_config`` holds ``train`` (the `TrainConfig` as a dict) and ``pool`` (a
    `PoolAddress` as a dict, or None to score in this process).
    """

    module: TokenPruningModule
    rounds_done = 0

    def make_env(self) -> None:
        """Open source and scorer instead of an environment."""
        settings = self.config.env_config
        self.train_config = TrainConfig.from_dict(settings["train"])
        self.rules = self.train_config.rules
        self.source = shared_source(self.train_config.source)
        self.rules.check_source(self.source)
        self.scorer = open_scorer(self.train_config, settings.get("pool"))
        self._groups = self.train_config.rollout.samples // max(1, self.num_workers or 0)
        self._groups //= self.train_config.rollout.rounds
        self.num_envs = self._groups * self.train_config.rollout.draws
        self._episodes = Episodes(self.source, self.scorer, self.rules, self.num_envs)
        has_budget = self.rules.budget is not None
        self.env = NumberedSpaces(self.source.max_tokens, has_budget, self.num_envs)
        self._report = ScorerReport()
        self._needs_initial_reset = True
        self.np_random = np_random(self._seed)[0]

    def make_module(self) -> None:
        """Build the module and seed its exploration."""
        super().make_module()
        if self._seed is not None and self.module is not None:
            self.module.generator.manual_seed(self._seed)

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[EpisodeColumns]:
        """Roll out and score this runner's share of an iteration.

        Args:
            num_timesteps: At least this many steps instead.
            num_episodes: At least this many episodes instead.
            explore: Draw masks; False takes the likeliest.
            random_actions: Refused.
            force_reset: Without meaning, every call starts new episodes.

        Raises:
            ScoringError: If a mask cannot be scored; it never becomes a reward.
        """
        if random_actions:
            raise ValueError("TokenPruningRunner cannot take random actions; use runner='default'")
        explore = bool(self.config.explore if explore is None else explore)
        started = time.perf_counter()
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        batches: list[EpisodeColumns] = []
        reports: list[dict[str, float]] = []
        with self.metrics.log_time(SAMPLE_TIMER):
            waiting: tuple[Rollout, list[Any]] | None = None
            episodes = steps = rounds = 0
            while self._more(rounds, steps, episodes, num_timesteps, num_episodes):
                rollout, asked = self._roll_out(explore)
                if waiting is not None:  # scored while this round was rolled out
                    batches.append(self._finish(*waiting, reports))
                waiting = (rollout, asked)
                rounds += 1
                episodes += len(rollout.samples)
                steps += int(rollout.taken().sum())
            if waiting is not None:
                batches.append(self._finish(*waiting, reports))
        self._log(reports, steps, episodes, time.perf_counter() - started)
        make_callback(
            "on_sample_end",
            callbacks_objects=self._callbacks,
            callbacks_functions=self.config.callbacks_on_sample_end,
            kwargs={"env_runner": self, "metrics_logger": self.metrics, "samples": batches},
        )
        return batches

    def _more(
        self, rounds: int, steps: int, episodes: int, want_steps: int | None, want: int | None
    ) -> bool:
        if want_steps is not None:
            return steps < want_steps
        if want is not None:
            return episodes < want
        return rounds < self.train_config.rollout.rounds

    def _start(self) -> Rollout:
        """Draw samples and budgets as the vector environment does, one draw per group."""
        chosen = [
            choose_episode(self.np_random, self.source, self.rules) for _ in range(self._groups)
        ]
        drawn, budgets = np.array(chosen, np.int64).T
        if self.train_config.rollout.shared_budget:
            budgets = np.full_like(budgets, budgets[0])
        if self.train_config.rollout.fixed_budgets:
            budgets = np.array([self._budget_of(int(sample)) for sample in drawn], np.int64)
        group = np.repeat(np.arange(self._groups), self.train_config.rollout.draws)
        episodes = self._episodes
        episodes.start(np.arange(self.num_envs), drawn[group], budgets[group])
        rollout = Rollout(episodes.samples, group, episodes.budget, episodes.full)
        rollout.counts.append(episodes.kept)
        return rollout

    def _budget_of(self, sample: int) -> int:
        """The budget that this sample has in all of a run, on every runner."""
        generator = np.random.default_rng([self.train_config.seed, sample])
        return choose_episode(generator, self.source, self.rules, sample)[1]

    def _roll_out(self, explore: bool) -> tuple[Rollout, list[Any]]:
        """Take B episodes to their ends; also what was asked of the scorer, in order."""
        rollout, episodes = self._start(), self._episodes
        asked: list[Any] = []
        while episodes.live.any():
            rows = np.flatnonzero(episodes.live)
            obs = self._observe(rollout, rows)
            with self.metrics.log_time(RLMODULE_INFERENCE_TIMER):
                tensors = {name: torch.from_numpy(part) for name, part in obs.items()}
                device = self.module.device
                acted = self.module.act(
                    {k: v.to(device) for k, v in tensors.items()}, explore=explore
                )
            self.scorer.poll()
            with self.metrics.log_time(ENV_STEP_TIMER):
                self._step(rollout, rows, obs, acted)
            if self.scorer.concurrent and rollout.wanted[-1].any():
                asked.append(self._ask(rollout, len(rollout.live) - 1))
        if not self.scorer.concurrent:  # one request has fuller batches
            asked.append(self._ask(rollout, *range(len(rollout.live))))
        self.rounds_done += 1
        return rollout, asked

    def _step(
        self,
        rollout: Rollout,
        rows: npt.NDArray[np.int64],
        obs: dict[str, npt.NDArray[Any]],
        acted: Acted,
    ) -> None:
        """Step the live episodes, ``rows``, and note what learner and scorer need of the step."""
        actions = acted.actions.cpu().numpy()
        keep = np.zeros_like(self._episodes.alive)
        keep[rows] = actions
        taken = self._episodes.transition(keep)
        self._episodes.take(taken)
        values = np.zeros(len(keep), np.float32)
        values[rows] = acted.values.float().cpu().numpy()
        columns = {
            Columns.OBS: obs,
            Columns.ACTIONS: actions,
            Columns.ACTION_LOGP: acted.logp.float().cpu().numpy(),
        }
        if self.train_config.algorithm.ratio == "token":  # the old probability of each token
            columns[Columns.ACTION_DIST_INPUTS] = acted.inputs.cpu().numpy()
        rollout.live.append(taken.live)
        rollout.wanted.append(taken.wanted)
        rollout.masks.append(taken.alive)
        rollout.counts.append(taken.kept)
        rollout.values.append(values)
        rollout.steps.append(columns)

    def _ask(self, rollout: Rollout, *steps: int) -> Any:
        """Send the masks of these steps to the scorer."""
        rows = [np.flatnonzero(rollout.wanted[step]) for step in steps]
        samples = np.concatenate([rollout.samples[r] for r in rows])
        keep = np.concatenate([rollout.masks[t][r] for t, r in zip(steps, rows, strict=True)])
        return self.scorer.submit(samples, keep)

    def _observe(
        self, rollout: Rollout, rows: npt.NDArray[np.int64]
    ) -> dict[str, npt.NDArray[Any]]:
        """Sample numbers and masks; draws of one sample share their state before the first step."""
        alive, step = self._episodes.alive, len(rollout.live)
        states = rollout.group[rows] if step == 0 else step * len(alive) + rows
        budget = None if self.rules.budget is None else rollout.budget[rows]
        return numbered_observation(rollout.samples[rows], states, alive[rows], step, budget)

    def _finish(
        self,
        rollout: Rollout,
        asked: list[Any],
        reports: list[dict[str, float]],
    ) -> EpisodeColumns:
        """Wait for the scores of a round and turn it into columns."""
        wanted = np.stack(rollout.wanted)
        scores = np.full(wanted.shape, np.nan, np.float32)
        scores[wanted] = np.concatenate([pending.result() for pending in asked])
        result = estimate(self.train_config, rollout, scores, self.rules)
        live = rollout.taken()
        final = scores[live.sum(axis=0) - 1, np.arange(live.shape[1])]
        returns = result.rewards.sum(axis=0)
        kept = rollout.counts[-1]
        reports.append(
            {
                "return": float(returns.mean()),
                "return_min": float(returns.min()),
                "return_max": float(returns.max()),
                "length": float(live.sum(axis=0).mean()),
                "score": float(final.mean()),
                "full_score": float(rollout.full.mean()),
                "kept": float(kept.mean()),
                "keep_ratio": float((kept / rollout.counts[0]).mean()),
                **_critic_report(rollout, result.columns, live),
            }
        )
        return learner_columns(rollout, result.columns)

    def _log(
        self, reports: list[dict[str, float]], steps: int, episodes: int, seconds: float
    ) -> None:
        """Metrics of one call: means over its rounds, and what the scorer did meanwhile."""
        self._increase_sampled_metrics(steps, episodes)
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
        self.num_env_steps_sampled_lifetime += steps
        window = max(1, self.config.num_env_runners)
        mean = {name: float(np.mean([r[name] for r in reports])) for name in reports[0]}
        names = {
            EPISODE_RETURN_MEAN: "return",
            EPISODE_RETURN_MIN: "return_min",
            EPISODE_RETURN_MAX: "return_max",
            EPISODE_LEN_MEAN: "length",
        }
        for name, ours in names.items():
            self.metrics.log_value(name, mean[ours], window=window)
        for name in ("score", "full_score", "kept", "keep_ratio", "explained_variance"):
            if name in mean:
                self.metrics.log_value(name, mean[name], window=window)
        self._report.log(self.metrics, self.scorer.counters(), seconds, window)

    def get_metrics(self) -> dict[str, Any]:
        """Metrics since the last call."""
        return self.metrics.reduce()

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over weights; a runner that starts in mid-training draws other samples."""
        super().set_state(state)
        if self.rounds_done == 0 and self._weights_seq_no > 0 and self._seed is not None:
            mixed = np.random.SeedSequence([self._seed, self._weights_seq_no])
            self.np_random = np.random.default_rng(mixed)
            self.module.generator.manual_seed(int(mixed.generate_state(1)[0]))

    def assert_healthy(self) -> None:
        """Raise if construction has not finished.

        Raises:
            RuntimeError: If there is no module or no source.
        """
        if self.module is None or self.env is None:
            raise RuntimeError("TokenPruningRunner has no module or no source; look at its log")


def _critic_report(
    rollout: Rollout, columns: Mapping[str, npt.NDArray[Any]], live: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """How much of the value targets' variance the critic explained, if there is one."""
    if Postprocessing.VALUE_TARGETS not in columns:
        return {}
    targets = columns[Postprocessing.VALUE_TARGETS][live]
    spread = float(targets.var())
    error = targets - np.stack(rollout.values)[live]
    return {"explained_variance": 1.0 - float(error.var()) / spread if spread > 1e-8 else 0.0}
