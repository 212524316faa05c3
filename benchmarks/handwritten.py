"""PPO, GRPO and MAPO as one would write them for this task alone, metered: see `rollout`.

No RLlib: one lockstep rollout, one scoring request, epochs of minibatches. Policy, distributions,
losses and MAPO's mixture are the package's own, so that what differs is the machinery around them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from torch import Tensor

from benchmarks.contenders import Cost, Watch, new_module, timed_scorer
from tprl_env.data.features import shared_source
from tprl_env.env import rewards
from tprl_env.env.episodes import choose_episode
from tprl_env.env.scorer import BoolArray
from tprl_env.rllib.algorithms.grpo import grpo_loss
from tprl_env.rllib.algorithms.mapo import mapo_loss, new_memory
from tprl_env.rllib.algorithms.mapo_mixture import mix
from tprl_env.rllib.algorithms.ppo import ppo_loss
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.rollout.connector import REFERENCE_LOGP
from tprl_env.rllib.rollout.episodes import EPISODE, GROUP, RETURN, EpisodeColumns
from tprl_env.scoring.cache import CachedScorer
from tprl_env.scoring.spec import ScorerSpec


class Handwritten:
    """A training loop without a framework; advantages and losses of the config's algorithm."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._rules = config, config.rules
        self._settings: Any = config.algorithm  # of one algorithm; each loss reads its own
        # draws of one sample share their first state; without draws there is nothing to share
        self._names = ("sample", "alive", "step", *(("state",) if config.rollout.draws > 1 else ()))
        self._source = shared_source(config.source)
        self._full = self._source.full_scores(config.rules.score_kind)
        self._module = new_module(config)
        trained = [part for part in self._module.parameters() if part.requires_grad]
        self._adam = torch.optim.Adam(trained, lr=self._settings.lr)
        spec = ScorerSpec(
            config.source,
            config.rules.score_kind,
            lvlm=config.lvlm,
            options={"name": "handwritten"},
        )
        self._timed = timed_scorer(spec)
        self._scorer = CachedScorer(
            self._timed, self._source, config.rules.score_kind, config.scoring.cache_size
        )
        self._random = np.random.default_rng(config.seed)
        self._module.generator.manual_seed(config.seed)
        self._estimate, self._loss = {
            "ppo": (self._generalised, self._ppo_loss),
            "grpo": (self._within_groups, self._grpo_loss),
            "mapo": (self._with_memory, self._mapo_loss),
        }[config.algorithm.name]
        self._memory = new_memory(config) if config.algorithm.name == "mapo" else None

    def iterate(self) -> Cost:
        """Roll out, score, epochs of minibatches."""
        scored, watch = self._timed.seconds, Watch()
        columns, gained, taken, values = self._collect()
        collect, collect_wall = watch.read()
        trained = self._learn(self._estimate(columns, gained, taken, values))
        cpu, wall = watch.read()
        scoring = self._timed.seconds - scored
        return Cost(int(taken.sum()), trained, collect, scoring, cpu - collect, wall, collect_wall)

    def _collect(self) -> tuple[dict[str, Any], Any, BoolArray, Any]:
        """All episodes in lockstep, then one request for all their masks.

        Returns:
            Rows of the steps, rewards (T, B), steps that were taken (T, B) and values (T, B).
        """
        config = self._config
        chosen = [
            choose_episode(self._random, self._source, self._rules)[0]
            for _ in range(config.rollout.samples)
        ]
        group = np.repeat(np.arange(config.rollout.samples), config.rollout.draws)
        samples = np.array(chosen, np.int64)[group]
        alive = self._source.exists(samples)
        live, counts, masks, lives, parts = np.ones(len(samples), bool), [alive.sum(1)], [], [], []
        values = np.zeros((self._rules.max_steps, len(samples)), np.float32)
        for step in range(self._rules.max_steps):
            rows = np.flatnonzero(live)
            states = group[rows] if step == 0 else step * len(samples) + rows
            obs = {
                "sample": torch.from_numpy(samples[rows]),
                "alive": torch.from_numpy(alive[rows]),
                "step": torch.full((len(rows), 1), float(step)),
                "state": torch.from_numpy(states),
            }
            obs = {name: obs[name] for name in self._names}
            acted = self._module.act(obs)
            numbers = torch.from_numpy(rows), torch.from_numpy(group[rows])
            parts.append((*obs.values(), acted.actions, acted.logp, *numbers))
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
        gained = rewards.episode_rewards(
            scores,
            self._full[samples],
            np.stack(counts),
            taken,
            config.rules.alpha,
            config.rules.beta,
            "all",
        )
        names = (*self._names, Columns.ACTIONS, Columns.ACTION_LOGP, EPISODE, GROUP)
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        return dict(zip(names, joined, strict=True)), gained, taken, values

    def _generalised(
        self, columns: dict[str, Any], gained: Any, taken: BoolArray, values: Any
    ) -> dict[str, Any]:
        """Generalised advantages of rewards that mini-batches share."""
        size, gamma = self._rules.reward_batch_size, self._settings.gamma
        if size > 1:
            shape = (len(taken), -1, size)
            shared = rewards.batch_mean_reward(gained.reshape(shape), taken.reshape(shape))
            gained = shared.reshape(taken.shape)
        found, following = np.zeros_like(gained), np.zeros(taken.shape[1], np.float32)
        later = np.concatenate([values[1:], np.zeros_like(values[:1])])
        for step in reversed(range(len(taken))):
            delta = gained[step] + gamma * later[step] - values[step]
            following = (delta + gamma * self._settings.gae_lambda * following) * taken[step]
            found[step] = following
        gain = torch.from_numpy(found[taken].astype(np.float32))
        return columns | {
            Postprocessing.VALUE_TARGETS: torch.from_numpy((found + values)[taken]),
            Postprocessing.ADVANTAGES: (gain - gain.mean()) / gain.std().clamp(min=1e-4),
        }

    def _returns(self, gained: Any) -> npt.NDArray[np.float64]:
        return (self._settings.gamma ** np.arange(len(gained)))[:, None] * gained

    def _within_groups(
        self, columns: dict[str, Any], gained: Any, taken: BoolArray, values: Any
    ) -> dict[str, Any]:
        """One advantage per episode, and the start policy's probabilities."""
        returns = self._returns(gained).sum(0).reshape(-1, self._config.rollout.draws)
        spread = returns.std(1, keepdims=True) + 1e-6
        gain = ((returns - returns.mean(1, keepdims=True)) / spread).reshape(-1)
        obs = {name: columns[name] for name in self._names}
        return columns | {
            Postprocessing.ADVANTAGES: torch.from_numpy(gain.astype(np.float32))[columns[EPISODE]],
            REFERENCE_LOGP: self._module.reference_logp(obs, columns[Columns.ACTIONS]),
        }

    def _with_memory(
        self, columns: dict[str, Any], gained: Any, taken: BoolArray, values: Any
    ) -> dict[str, Any]:
        """New episodes mixed with remembered ones."""
        returns = self._returns(gained).sum(0).astype(np.float32)
        table = {name: column.numpy() for name, column in columns.items()}
        store = {name: part for name, part in table.items() if name not in self._names}
        store |= {RETURN: returns[table[EPISODE]], Columns.OBS: {n: table[n] for n in self._names}}
        assert self._memory is not None
        [mixed], _ = mix(
            [EpisodeColumns(store, len(table[GROUP]))],
            self._memory,
            self._module.judge,
            self._settings.memory_weight,
            self._settings.normalize_advantages,
        )
        flat = {**mixed.columns, **mixed.columns[Columns.OBS]}
        del flat[Columns.OBS]
        return {name: torch.from_numpy(part) for name, part in flat.items()}

    def _ppo_loss(self, few: dict[str, Any], distribution: Any, out: dict[str, Any]) -> Tensor:
        settings, values = self._settings, out[Columns.EMBEDDINGS]
        return ppo_loss(few, distribution, values, settings, settings.entropy).total

    def _grpo_loss(self, few: dict[str, Any], distribution: Any, out: dict[str, Any]) -> Tensor:
        return grpo_loss(few, distribution, self._settings, self._settings.entropy).total

    def _mapo_loss(self, few: dict[str, Any], distribution: Any, out: dict[str, Any]) -> Tensor:
        return mapo_loss(few, distribution, self._settings, self._settings.entropy).total

    def _learn(self, batch: dict[str, Any]) -> int:
        """Epochs of shuffled minibatches; returns rows trained on."""
        rows, trained = len(batch[Columns.ACTION_LOGP]), 0
        for _ in range(self._settings.epochs):
            for part in torch.randperm(rows).split(self._settings.minibatch_size or rows):
                few = {name: column[part] for name, column in batch.items()}
                out = self._module.forward_train(
                    {Columns.OBS: {name: few[name] for name in self._names}}
                )
                distribution = self._module.action_dist_cls.from_logits(
                    out[Columns.ACTION_DIST_INPUTS]
                )
                loss = self._loss(few, distribution, out)
                self._adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._settings.grad_clip)
                self._adam.step()
                trained += len(part)
        return trained

    def close(self) -> None:
        """Nothing to stop."""
