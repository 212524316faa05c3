"""What a training run is: a `TrainConfig`, its parts, and the files that define them."""

from tprl_env.env.rules import EpisodeRules
from tprl_env.rllib.config.algorithm import (
    AlgorithmSettings,
    GrpoSettings,
    MapoSettings,
    PpoSettings,
)
from tprl_env.rllib.config.build import policy_config, policy_fields, scorer_spec
from tprl_env.rllib.config.load import load_config, load_definitions, presets_folder
from tprl_env.rllib.config.old_names import OLD_NAMES
from tprl_env.rllib.config.settings import (
    ImitationSettings,
    Limits,
    PolicySettings,
    ResourceSettings,
    RolloutSettings,
    ScoringSettings,
)
from tprl_env.rllib.config.train_config import TrainConfig

__all__ = [
    "OLD_NAMES",
    "AlgorithmSettings",
    "EpisodeRules",
    "GrpoSettings",
    "ImitationSettings",
    "Limits",
    "MapoSettings",
    "PolicySettings",
    "PpoSettings",
    "ResourceSettings",
    "RolloutSettings",
    "ScoringSettings",
    "TrainConfig",
    "load_config",
    "load_definitions",
    "policy_config",
    "policy_fields",
    "presets_folder",
    "scorer_spec",
]
