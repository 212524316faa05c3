"""The one learner connector of the fast path: column stores in, a batch of tensors out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env.rllib.rollout.episodes import EpisodeColumns, join_columns

__all__ = ["REFERENCE_LOGP", "ColumnsToBatch"]

REFERENCE_LOGP = "reference_logp"
"""Column (R,) or (R, N), log-probability of the actions under the start policy."""


class ColumnsToBatch(ConnectorV2):
    """Joins the rollouts of all runners; use it without RLlib's default learner connectors.

    Args:
        input_observation_space: Unused, RLlib's signature.
        input_action_space: Unused, RLlib's signature.
        normalize: Bring advantages to mean 0 and deviation 1.
        reference: Add the log-probabilities of the start policy, once for all epochs.
        per_token: Of each token instead of the whole mask.
        shuffle: Permute the rows. RLlib never shuffles the first epoch, so minibatches need it.
        seed: Of the permutation.
    """

    def __init__(
        self,
        input_observation_space: Any = None,
        input_action_space: Any = None,
        *,
        normalize: bool = True,
        reference: bool = False,
        per_token: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_observation_space, input_action_space, **kwargs)
        self._normalize, self._shuffle = normalize, shuffle
        self._reference, self._per_token = reference, per_token
        self.generator = np.random.default_rng(seed)

    def __call__(
        self,
        *,
        rl_module: Any,
        batch: dict[str, Any],
        episodes: list[EpisodeColumns],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Build the module's batch on the module's device."""
        columns = join_columns([_renumbered(part, place) for place, part in enumerate(episodes)])
        if self._normalize:
            values = columns[Postprocessing.ADVANTAGES]
            scale = max(float(values.std()), 1e-4)
            columns = columns | {Postprocessing.ADVANTAGES: (values - values.mean()) / scale}
        order = None
        if self._shuffle:
            order = self.generator.permutation(len(columns[Columns.ACTION_LOGP]))
        device = next(iter(rl_module[DEFAULT_MODULE_ID].parameters())).device

        def to_tensors(table: dict[str, Any]) -> dict[str, Any]:
            return {
                name: to_tensors(part)
                if isinstance(part, dict)
                else torch.from_numpy(np.array(part if order is None else part[order])).to(device)
                for name, part in table.items()
            }

        batch = to_tensors(columns)
        if self._reference:
            module = rl_module[DEFAULT_MODULE_ID].unwrapped()
            batch[REFERENCE_LOGP] = module.reference_logp(
                batch[Columns.OBS], batch[Columns.ACTIONS], per_token=self._per_token
            )
        return {DEFAULT_MODULE_ID: batch}


def _renumbered(part: EpisodeColumns, place: int) -> dict[str, Any]:
    """Columns whose state numbers differ from those of every other rollout of the batch."""
    obs = part.columns[Columns.OBS]
    if "state" not in obs:
        return part.columns
    obs = obs | {"state": obs["state"] + (place << 40)}
    return part.columns | {Columns.OBS: obs}
