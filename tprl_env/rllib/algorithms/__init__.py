"""Losses and learners of PPO, GRPO and MAPO, and the one builder of their RLlib configurations."""

from tprl_env.rllib.algorithms.build import ALGORITHMS, AlgorithmEntry, algorithm_config

__all__ = ["ALGORITHMS", "AlgorithmEntry", "algorithm_config"]
