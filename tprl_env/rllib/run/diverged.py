"""Whether a run still computes numbers: its losses, its weights, what its policy says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID

from tprl_env.data.features import TokenSource
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.observations import observe

__all__ = ["DivergedError", "not_finite"]

_ROWS = 4  # of the source, whose logits are looked at
_TERMS = ("total_loss", "policy_loss", "vf_loss", "entropy", "mean_kl_loss", "reference_kl")


class DivergedError(ValueError):
    """The loss, the weights or the logits of a run stopped being finite."""


def not_finite(result: Mapping[str, Any], policy: PruningPolicy, source: TokenSource) -> str:
    """What is not a finite number after an iteration, in words; empty if all is well.

    Args:
        result: RLlib's, of the iteration; a term that it lacks is not looked at.
        policy: With the learner's weights.
        source: Its first samples are shown to the policy: finite weights can be so large that
            every logit is not.
    """
    learner = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    for name in _TERMS:
        if name in learner and not math.isfinite(float(learner[name])):
            return f"{name} is {float(learner[name])}"
    for name, part in policy.state_dict().items():
        if not bool(torch.isfinite(part).all()):
            return f"the weights {name} are not finite"
    logits, alive = _logits(policy, source)
    if not bool(torch.isfinite(logits[alive]).all()):
        return "the policy's logits are not finite"
    return ""


@torch.no_grad()
def _logits(policy: PruningPolicy, source: TokenSource) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first samples with all their tokens, (R, N), and which of them exist."""
    samples = np.arange(min(_ROWS, len(source)), dtype=np.int64)
    obs = observe(source, samples, policy.config, device=policy.device)
    obs["budget"] = torch.ones(len(samples), 1, device=policy.device)
    return policy(obs).logits, obs["alive"].bool()
