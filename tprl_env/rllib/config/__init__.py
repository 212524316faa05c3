"""TrainConfig: every setting of a training run in one flat, frozen dataclass.

The files of ``rllib_configs/`` are literals of it. Overrides come from the command line as strings
and are checked by name and type before anything starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tprl_env.checks import did_you_mean
from tprl_env.rllib.config.checks import check_combinations, check_ranges
from tprl_env.rllib.config.parts import policy_config, policy_fields, rules, scorer_spec
from tprl_env.rllib.config.values import coerce

__all__ = ["TrainConfig", "load_config", "policy_config", "rules", "scorer_spec"]

Budget = int | tuple[int, int] | None


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; the defaults are those of the ``ppo`` preset.

    Attributes:
        source: store folder or ``"toy:..."``.
        lvlm: what `tprl_env.lvlm.load_lvlm` opens, for ``scorer="lvlm"``.
        scorer: ``"lvlm"``, ``"toy"`` or ``"import"`` (then ``scorer_factory``).
        scorer_factory: ``"module:function"`` that builds a scorer from a `ScorerSpec`.
        score_kind: ``"exact"`` (0 or 1) or ``"likelihood"`` of the reference answer.
        seed: of policy, draws and demonstrations.

        max_steps: T, steps per episode.
        alpha: weight of the task term of the reward.
        beta: weight of the pruning term of the reward.
        score_steps: ``"all"`` scores every step, ``"final"`` the last mask only (1/T of the work,
            the same undiscounted return).
        reward_batch_size: this many consecutive episodes share the mean of their rewards.
        min_tokens: an episode ends with at most so many tokens.
        budget: wanted count, or (low, high) to draw it log-uniformly per sample; None without.
        shared_budget: draw one count per round instead of one per sample.

        distribution: ``"bernoulli"`` (TPRL eq. 14, 15) or ``"exact"`` (conditional Bernoulli).
        discount: lambda_disc of eq. 14, for ``"bernoulli"``.
        query: ``"mean"`` vector or question ``"tokens"``.
        width: policy width, None for the codes' own.
        layers: attention blocks.
        heads: attention heads.
        hidden: width inside the residual MLPs, None for four times the width.
        architecture: ``"attention"`` or ``"mlp"``.
        question_heads: bilinear heads with ``query="tokens"``.
        fusion: ``"concat"`` or ``"gated"``.
        budget_input: show the wanted count to actor and critic.
        step_input: show the step to actor and critic.
        token_norm: LayerNorm on the codes.
        query_norm: ``"none"``, ``"rms"`` or ``"layer"`` on the query.
        query_scale: factor on the query.
        positions: give the policy a learned embedding per token index.
        value_query: let the critic see the query.
        value_input_detach: stop the critic's gradient before the shared features.
        initial_keep: keep-probability of an untrained policy.

        samples: distinct samples per iteration.
        draws: episodes per sample (a group).
        rounds: parts an iteration's rollout is cut into; one part is scored while the next is
            rolled out.
        group_baseline: subtract the group's mean advantage per step.
        count_regression_baseline: subtract from the advantage what log K explains inside groups
            (for Bernoulli actions, where one more token always helps).
        fixed_budgets: a sample has one budget in the whole run, drawn from its number. MAPO's
            memory holds masks of one count, so it only helps where a count comes again.
        runner: ``"fast"`` rolls out whole episodes without gymnasium, ``"default"`` is RLlib's
            runner on the vector environment.

        algorithm: ``"ppo"`` (with a critic), ``"grpo"`` (group-relative, KL to the start policy)
            or ``"mapo"`` (a memory of the best episodes), see `tprl_env.rllib.algorithms`.
        lr: Adam learning rate.
        epochs: passes over a batch.
        minibatch_size: rows per gradient step, 0 for the whole batch.
        clip: PPO's epsilon.
        ratio: ``"joint"`` ratio of whole masks (the paper) or one per ``"token"``.
        per_token: divide policy loss and entropy bonus by the tokens kept (``"exact"``), or alive
            (``"bernoulli"``), of the row.
        entropy: coefficient of the exact entropy.
        logit_l2: coefficient of the mean square of alive logits.
        count_loss: coefficient of mean(log(sum p / target))^2 for Bernoulli actions.
        count_target: the target, tokens expected to be kept after the last step.
        gamma: discount of rewards.
        gae_lambda: lambda of generalised advantage estimation (PPO).
        value_coefficient: weight of the critic's squared error (PPO).
        value_clip: largest squared error per row (PPO).
        kl_coefficient: of the k3 estimate of KL(policy || start policy) (GRPO).
        memory_weight: w_min, least weight of a sample's remembered episodes (MAPO).
        memory_size: episodes remembered per sample and budget (MAPO).
        memory_limit: episodes remembered in total (MAPO).
        grad_clip: largest norm of the gradient.
        normalize_advantages: to deviation 1 per iteration, with PPO also to mean 0. GRPO's are
            normalised in their groups, whatever this says.

        demonstrator: imitate before reinforcement: ``"none"``; a heuristic, ``"vispruner"`` or
            ``"divprune"``, at budgets as drawn, or nested at keep-rates .75 and .5 where there is
            no budget (TPRL eq. 7, 8); or the name of a per-sample channel such as
            ``"question_attention"``.
        imitation_steps: gradient steps of imitation.
        imitation_batch_size: transitions per step.
        imitation_lr: learning rate of imitation.
        imitation_class_weights: weight of kept tokens, see `demonstration_loss`.

        num_env_runners: remote runners; 0 runs in the driver.
        num_learners: remote learners; 0 learns in the driver.
        gpus_per_learner: GPUs of each learner.
        num_scorers: scorer actors; 0 scores in each runner's own process.
        scorer_cpus: CPUs, and torch threads, of each.
        scorer_gpus: GPUs of each.
        scorer_resources: custom resources of each.
        scorer_batch_size: rows of one forward pass.
        scorer_device: torch device of the LVLM.
        scorer_dtype: torch dtype of the LVLM.
        scorer_options: JSON values for ``scorer_factory``.
        max_outstanding: requests under way per client and actor.
        max_crashes_per_row: scorer processes that one row may kill.
        cache_size: masks remembered per client.
        start_timeout: seconds for the scorers to load.
        sample_timeout: seconds for one iteration's rollouts on remote runners.
        torch_threads: threads of the driver.

        iterations: stop after so many, None for no limit.
        max_scores: stop after so many scores asked for.
        max_seconds: stop after so many seconds of training.
        checkpoint_every: iterations between checkpoints.
        checkpoint_seconds: least seconds between checkpoints.
        report_every: iterations between lines on the screen.
    """

    source: str = ""
    lvlm: str = ""
    scorer: str = "lvlm"
    scorer_factory: str = ""
    score_kind: str = "likelihood"
    seed: int = 0

    max_steps: int = 1
    alpha: float = 1.0
    beta: float = 0.0
    score_steps: str = "final"
    reward_batch_size: int = 1
    min_tokens: int = 0
    budget: Budget = (3, 48)
    shared_budget: bool = False

    distribution: str = "exact"
    discount: float = 1.0
    query: str = "tokens"
    width: int | None = 64
    layers: int = 1
    heads: int = 4
    hidden: int | None = None
    architecture: str = "attention"
    question_heads: int = 8
    fusion: str = "concat"
    budget_input: bool = True
    step_input: bool = False
    token_norm: bool = True
    query_norm: str = "rms"
    query_scale: float = 1.0
    positions: bool = False
    value_query: bool = True
    value_input_detach: bool = False
    initial_keep: float = 0.5

    samples: int = 32
    draws: int = 8
    rounds: int = 1
    group_baseline: bool = False
    count_regression_baseline: bool = False
    fixed_budgets: bool = False
    runner: str = "fast"

    algorithm: str = "ppo"
    lr: float = 1e-3
    epochs: int = 2
    minibatch_size: int = 0
    clip: float = 0.2
    ratio: str = "joint"
    per_token: bool = True
    entropy: float = 0.003
    logit_l2: float = 1e-4
    count_loss: float = 0.0
    count_target: float | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.5
    value_clip: float = 1e6
    kl_coefficient: float = 0.04
    memory_weight: float = 0.1
    memory_size: int = 4
    memory_limit: int = 100_000
    grad_clip: float = 1.0
    normalize_advantages: bool = True

    demonstrator: str = "none"
    imitation_steps: int = 900
    imitation_batch_size: int = 48
    imitation_lr: float = 3e-3
    imitation_class_weights: str = "sqrt"

    num_env_runners: int = 0
    num_learners: int = 0
    gpus_per_learner: float = 0.0
    num_scorers: int = 2
    scorer_cpus: float = 1.0
    scorer_gpus: float = 0.0
    scorer_resources: dict[str, float] = dataclasses.field(default_factory=dict)
    scorer_batch_size: int = 128
    scorer_device: str | None = None
    scorer_dtype: str | None = None
    scorer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_outstanding: int = 4
    max_crashes_per_row: int = 3
    cache_size: int = 200_000
    start_timeout: float = 600.0
    sample_timeout: float = 1800.0
    torch_threads: int = 1

    iterations: int | None = None
    max_scores: int | None = None
    max_seconds: float | None = None
    checkpoint_every: int = 20
    checkpoint_seconds: float = 30.0
    report_every: int = 5

    def __post_init__(self) -> None:
        """Check types, ranges and combinations."""
        hints = typing.get_type_hints(TrainConfig)
        for field in fields(self):
            object.__setattr__(
                self, field.name, coerce(field.name, getattr(self, field.name), hints[field.name])
            )
        check_ranges(self)
        rules(self)
        policy_fields(self)
        check_combinations(self)

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values; strings are read as the fields' types.

        Raises:
            ValueError: for an unknown field, naming the nearest, or a value that does not fit.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"TrainConfig has no field {name!r}{did_you_mean(name, known)}")
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `as_dict`, also after a trip through JSON."""
        return cls().replace(**table)


def load_config(name: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config of a file, with fields replaced.

    Args:
        name: a preset of ``rllib_configs/`` (``"recommended"``), or a path to a Python file with
            ``CONFIG = TrainConfig(...)``. The file is executed: use files you trust.
        overrides: fields; strings are read as the fields' types.

    Raises:
        ValueError: for an unknown preset or field, or a file without CONFIG.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"there is no config file {str(name)!r}")
    else:
        folder = presets_folder()
        path = folder / f"{str(name).replace('-', '_')}.py"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
            raise ValueError(
                f"unknown preset {str(name)!r}; known: {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    spec = importlib.util.spec_from_file_location(f"_tprl_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{str(path)!r} must define CONFIG = TrainConfig(...)")
    return config.replace(**dict(overrides or {}))


def presets_folder() -> Path:
    """The folder of the package ``rllib_configs``."""
    spec = importlib.util.find_spec("rllib_configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    beside = Path(__file__).resolve().parents[3] / "rllib_configs"  # a checkout, not installed
    if not beside.is_dir():
        raise ValueError("the package rllib_configs is not installed; pass a path to a config file")
    return beside
