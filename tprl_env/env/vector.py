"""Many token-pruning episodes in one environment, scored by one request per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from tprl_env.data.features.source import TokenSource
from tprl_env.env.episodes import Episodes, ScorerLike, choose_episode, open_environment
from tprl_env.env.reference_returns import reference_returns
from tprl_env.env.rewards import batch_mean_reward
from tprl_env.env.rules import (
    EpisodeRules,
    Query,
    ScoreKind,
    ScoreSteps,
    check_choice,
    check_integer,
    check_options,
    coerce_action,
)
from tprl_env.env.single import RENDER_MODES

__all__ = ["TokenPruningVectorEnv"]

Batch = dict[str, npt.NDArray[Any]]


class TokenPruningVectorEnv(VectorEnv[Batch, npt.NDArray[Any], npt.NDArray[Any]]):
    """`TokenPruningEnv` for ``num_envs`` episodes at once, with one scorer request per step.

    Spaces, rewards and arguments are those of `tprl_env.env.TokenPruningEnv`; per-step results
    equal those of single environments with the same samples and actions. An episode that has
    ended is reset in the next step (`AutoresetMode.NEXT_STEP`): that step ignores its action,
    rewards 0 and is never scored.

    Args:
        num_envs: Number of sub-environments B.
        source: As in the single environment.
        scorer: As in the single environment; it gets the live episodes of a step together.
        max_steps: T_max.
        alpha: Weight of the task term.
        beta: Weight of the pruning term.
        score_steps: "all" or "final".
        reward_batch_size: This many consecutive sub-environments share the mean of their rewards,
            taken over those that made the step (the mini-batch mean of TPRL eq. 4). Must divide
            ``num_envs``.
        min_tokens: An episode terminates once at most this many tokens are kept.
        budget: None, a count or a range (low, high).
        score_kind: "exact", "likelihood" or "graded".
        query: "mean" or "tokens".
        group_size: This many consecutive sub-environments get the same samples and budgets, episode
            by episode, as group-relative methods (GRPO) need. Must divide ``num_envs``. An early
            end does not break a group: the n-th episodes of its members always belong together.
        render_mode: "rgb_array" or "ansi".

    Raises:
        ValueError: If an argument is out of range or the arguments do not fit together.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own declaration
        "render_modes": list(RENDER_MODES),
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        source: str | Path | TokenSource = "toy",
        scorer: ScorerLike | None = None,
        *,
        max_steps: int = 3,
        alpha: float = 1.0,
        beta: float = 0.1,
        score_steps: ScoreSteps = "all",
        reward_batch_size: int = 1,
        min_tokens: int = 1,
        budget: int | float | tuple[int, int] | tuple[float, float] | None = None,
        score_kind: ScoreKind = "exact",
        query: Query = "mean",
        group_size: int = 1,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = check_integer("num_envs", num_envs, 1)
        self.rules = EpisodeRules(
            max_steps=max_steps,
            alpha=alpha,
            beta=beta,
            score_steps=score_steps,
            reward_batch_size=reward_batch_size,
            min_tokens=min_tokens,
            budget=budget,
            score_kind=score_kind,
            query=query,
        )
        self.group_size = check_integer("group_size", group_size, 1)
        for name, size in (("group_size", group_size), ("reward_batch_size", reward_batch_size)):
            if num_envs % size:
                raise ValueError(f"{name} must divide num_envs={num_envs}, got {size}")
        if render_mode is not None:
            check_choice("render_mode", render_mode, RENDER_MODES)
        self.render_mode = render_mode
        self.source, self.scorer = open_environment(source, scorer, self.rules)
        self.single_observation_space = self.rules.observation_space(self.source)
        self.single_action_space = gymnasium.spaces.MultiBinary(self.source.max_tokens)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes = Episodes(self.source, self.scorer, self.rules, num_envs)
        self._groups = np.arange(num_envs) // group_size
        self._numbers = np.full(num_envs, -1)  # episode number of each sub-environment
        self._plans: list[dict[int, tuple[int, int]]] = []
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Batch, dict[str, Any]]:
        """Begin an episode in every sub-environment.

        Args:
            seed: Seeds the one generator that draws all samples and budgets.
            options: "sample" and "budget", each an int for all or one int per sub-environment,
                equal inside a group.

        Returns:
            Batched observations and information.

        Raises:
            ValueError: For an unknown option, one out of range, or of a wrong length.
        """
        if seed is not None:
            check_integer("seed", seed, 0)
        super().reset(seed=seed)
        given = check_options(options, self.rules)
        wanted = [self._per_group(name, given.get(name)) for name in ("sample", "budget")]
        first = [
            choose_episode(self.np_random, self.source, self.rules, sample, budget)
            for sample, budget in zip(*wanted, strict=True)
        ]
        self._plans = [{0: choice} for choice in first]
        self._numbers[:] = -1
        self._start(np.arange(self.num_envs))
        self._started = True
        return self._episodes.observation(), self._infos()

    def step(
        self, actions: npt.ArrayLike
    ) -> tuple[Batch, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Step the live episodes with one scorer request and reset the ended ones.

        Args:
            actions: (B, N) of bool, int or float 0/1.

        Returns:
            Batched observations, rewards float32 (B,), terminated bool (B,), truncated bool (B,)
            (all False), information.

        Raises:
            ValueError: For actions of another shape, type or value.
            ScoringError: If the scorer fails; the state is then as before the call.
            gymnasium.error.ResetNeeded: Before the first `reset`.
        """
        self._check_started("step")
        keep = coerce_action(actions, (self.num_envs, self.source.max_tokens))
        live = self._episodes.live
        rewards, ended = self._episodes.advance(keep)
        size = self.rules.reward_batch_size
        if size > 1:
            shared = batch_mean_reward(rewards.reshape(-1, size), live.reshape(-1, size))
            rewards = shared.reshape(-1)
        if not live.all():
            self._start(np.flatnonzero(~live))
        truncated = np.zeros(self.num_envs, bool)
        return self._episodes.observation(), rewards, ended, truncated, self._infos()

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Allowed values per bit: bool (B, 2 N), [may be 0, may be 1] per token."""
        alive = self._episodes.alive
        return np.stack([np.ones_like(alive), alive], axis=-1).reshape(self.num_envs, -1)

    def reference_returns(self, episodes: int = 256, seed: int = 0) -> dict[str, float]:
        """Mean undiscounted returns of fixed rules: what a learned policy has to beat.

        The running episodes and their random numbers are not touched.

        Args:
            episodes: Episodes per rule; passes over the source in random order.
            seed: Seeds the episodes and the random rule.

        Returns:
            "keep_all", "random" (each token kept with probability 1/2 in each step) and, where the
            source knows which tokens are relevant, "best_rule" (these and no others are kept from
            the first step on).

        Raises:
            ValueError: If an argument is out of range.
            ScoringError: If the scorer fails.
        """
        return reference_returns(self.source, self.scorer, self.rules, episodes, seed)

    def render(self) -> tuple[Any, ...] | None:
        """Draw every sub-environment, as `TokenPruningEnv.render`.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() without a render_mode returns None; make the environment with "
                'render_mode="rgb_array" or "ansi"'
            )
            return None
        self._check_started("render")
        from tprl_env.env.render import episode_frame

        return tuple(
            episode_frame(self._episodes, slot, self.render_mode) for slot in range(self.num_envs)
        )

    def _check_started(self, method: str) -> None:
        if not self._started:
            raise gymnasium.error.ResetNeeded(
                f"no episode has begun, call reset() before {method}()"
            )

    def _start(self, slots: npt.NDArray[np.int64]) -> None:
        """Begin the next episode of these sub-environments; the first of a group draws for all."""
        self._numbers[slots] += 1
        chosen = []
        for slot in slots:
            plan, number = self._plans[self._groups[slot]], int(self._numbers[slot])
            if number not in plan:
                plan[number] = choose_episode(self.np_random, self.source, self.rules)
            chosen.append(plan[number])
        for group in np.unique(self._groups[slots]):
            oldest = int(self._numbers[self._groups == group].min())
            for number in [n for n in self._plans[group] if n < oldest]:
                del self._plans[group][number]
        samples, budgets = np.array(chosen, np.int64).T
        self._episodes.start(slots, samples, budgets)

    def _per_group(self, name: str, value: object) -> list[object]:
        """A reset option as one value per group."""
        groups = self.num_envs // self.group_size
        if value is None or np.ndim(value) == 0:  # type: ignore[arg-type]
            return [value] * groups
        array = np.asarray(value)
        if array.shape != (self.num_envs,):
            raise ValueError(
                f"the reset option {name!r} must be one integer or {self.num_envs} of them, "
                f"got shape {array.shape}"
            )
        rows = array.reshape(groups, self.group_size)
        if np.any(rows != rows[:, :1]):
            raise ValueError(
                f"the reset option {name!r} must be equal inside each group of {self.group_size} "
                f"consecutive sub-environments, got {array.tolist()}"
            )
        return list(rows[:, 0])

    def _infos(self) -> dict[str, Any]:
        """Batched information in Gymnasium's form: every key with a mask ``_key``."""
        infos: dict[str, Any] = {}
        for name, (values, known) in self._episodes.info().items():
            if known.any():
                infos[name], infos[f"_{name}"] = values, known.copy()
        return infos
