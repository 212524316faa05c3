"""The pruning policy: network, action distributions, token codes, imitation, and its pruner."""

from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.network import PolicyConfig, PolicyOutput, PruningPolicy
from tprl_env.policy.pruner import PolicyPruner

__all__ = ["PolicyConfig", "PolicyOutput", "PolicyPruner", "PruningPolicy", "TokenAutoencoder"]
