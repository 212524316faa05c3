"""Everything that can be checked of a run before anything is written, imitated or started."""

from __future__ import annotations

import os
from pathlib import Path

from tprl_env.data.features import TokenSource, shared_source
from tprl_env.rllib.config import TrainConfig, policy_config, scorer_spec
from tprl_env.rllib.rollout.module import load_policy
from tprl_env.rllib.run.imitate import HEURISTICS, imitation_counts

__all__ = ["check_inputs"]


def check_inputs(config: TrainConfig, init_policy: str | Path | None) -> None:
    """Refuse what does not fit together: source, rules, policy, LVLM, demonstrator, resources.

    Raises:
        ValueError: Naming what does not fit.
        FileNotFoundError: For a missing LVLM.
    """
    scorer_spec(config)
    source = shared_source(config.source)
    _check_rules(config, source)
    wanted = policy_config(config, source)
    if init_policy is not None:
        load_policy(str(init_policy), wanted)
    if config.scoring.scorer == "lvlm":
        _check_lvlm(config, source)
    if init_policy is None and config.imitation.demonstrator != "none":
        _check_demonstrator(config, source)
    _check_resources(config)


def _check_rules(config: TrainConfig, source: TokenSource) -> None:
    """Refuse counts beyond the tokens of the source, with a budget that fits."""
    budget, most = config.rules.budget, source.max_tokens
    try:
        config.rules.check_source(source)
    except ValueError as error:
        if not str(error).startswith("budget"):
            raise
        fitting = f"{min(budget[0], most)},{most}" if isinstance(budget, tuple) else f"{most}"
        raise ValueError(f"rules.{error}; pass rules.budget={fitting}") from error


def _check_demonstrator(config: TrainConfig, source: TokenSource) -> None:
    """Refuse a demonstrator that lacks its channel, or a number of tokens to demonstrate."""
    name = config.imitation.demonstrator
    free = ("none", *HEURISTICS)
    if name not in free and not source.has_channel(name):
        raise ValueError(
            f"imitation.demonstrator {name!r} needs a channel that {config.source} does not "
            f"hold; encode it with --question-attention, or set it to {', '.join(free)}"
        )
    needs = HEURISTICS[name].needs if name in HEURISTICS else ()
    missing = [need for need in needs if getattr(source, need)(0) is None]
    if missing:
        raise ValueError(
            f"imitation.demonstrator {name!r} needs {' and '.join(missing)}, which "
            f"{config.source} does not hold; set it to {', '.join(free)}"
        )
    imitation_counts(config, source)


def _check_lvlm(config: TrainConfig, source: TokenSource) -> None:
    """Refuse an LVLM that cannot be loaded, or another one than the store was encoded with.

    Raises:
        StoreError: The store is another LVLM's.
        ValueError: The checkpoint is of no known family, or the source is no store.
        FileNotFoundError: There is no such checkpoint.
    """
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.lvlm import find_lvlm
    from tprl_env.lvlm.loading.checkpoint import folder_fingerprint, is_local

    place, _ = find_lvlm(config.lvlm)
    if isinstance(source, FeatureStore) and is_local(place):
        FeatureStore.open(source.path, lvlm_fingerprint=folder_fingerprint(Path(place)))


def _check_resources(config: TrainConfig) -> None:
    """Refuse what a Ray that this run starts itself will never have; a cluster may grow.

    Raises:
        ValueError: For GPUs or custom resources beyond this machine's.
    """
    import ray
    import torch

    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return
    if config.scoring.scorer == "lvlm":
        from tprl_env.lvlm.loading.supported import pick_device

        try:
            pick_device(config.scoring.device)
        except ValueError as error:
            raise ValueError(f"scoring.device: {error}") from error
    wanted = config.resources
    if wanted.num_scorers and wanted.scorer_gpus > 1 and config.scoring.scorer == "lvlm":
        from tprl_env.lvlm.loading.devices import check_splitting

        check_splitting()
    custom = wanted.scorer_resources if wanted.num_scorers else {}
    if any(custom.values()):
        raise ValueError(
            f"resources.scorer_resources {custom} exist on no machine without a cluster that "
            "declares them; set RAY_ADDRESS to it, or remove the setting"
        )
    gpus = wanted.num_scorers * wanted.scorer_gpus + wanted.num_learners * wanted.gpus_per_learner
    if gpus > torch.cuda.device_count():
        raise ValueError(
            f"resources.scorer_gpus and resources.gpus_per_learner ask for {gpus:g} GPUs, this "
            f"machine has {torch.cuda.device_count()}; lower them, or set RAY_ADDRESS to a cluster"
        )
