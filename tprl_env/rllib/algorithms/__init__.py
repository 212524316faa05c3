"""The algorithms a run can use, by the name in ``TrainConfig.algorithm``."""

from __future__ import annotations

from typing import Protocol

from ray.rllib.algorithms.ppo import PPOConfig

from tprl_env.rllib.algorithms.grpo import grpo_config
from tprl_env.rllib.algorithms.mapo import mapo_config
from tprl_env.rllib.algorithms.ppo import ppo_config
from tprl_env.rllib.config import TrainConfig
from tprl_env.scoring.spec import PoolAddress

__all__ = ["ALGORITHMS", "algorithm_config"]


class _Builder(Protocol):
    def __call__(
        self, config: TrainConfig, *, pool: PoolAddress | None, init_policy: str | None
    ) -> PPOConfig: ...


ALGORITHMS: dict[str, _Builder] = {
    "ppo": ppo_config,
    "grpo": grpo_config,
    "mapo": mapo_config,
}


def algorithm_config(
    config: TrainConfig, *, pool: PoolAddress | None = None, init_policy: str | None = None
) -> PPOConfig:
    """RLlib configuration of a run; all algorithms build on PPO's.

    Args:
        config: the run.
        pool: running scorer actors; None lets each runner score in its own process.
        init_policy: folder of a saved policy that learner and runners start from.

    Raises:
        ValueError: if the config does not fit its source.
    """
    return ALGORITHMS[config.algorithm](config, pool=pool, init_policy=init_policy)
