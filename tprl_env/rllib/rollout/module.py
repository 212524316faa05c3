"""The pruning policy as an RLModule: fed with sample numbers or with plain observations.

Shapes: R rows of a batch, U distinct states among them, N visual tokens.

On the fast path a batch carries only ``sample``, ``alive``, ``step``, ``budget`` and ``state``; the
module looks codes and question up in its own memory-mapped source, which is neither parameter nor
buffer. Rows with the same ``state`` (the draws of one sample before the first step) are forwarded
once, and dead tokens not at all. Plain observations go through the policy as they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.inference_only_api import InferenceOnlyAPI
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor

from tprl_env.data.features import shared_source
from tprl_env.env.observations import look_up
from tprl_env.env.rewards import step_budgets
from tprl_env.policy.alive_only import Forward, forward_alive_only
from tprl_env.policy.network import PolicyConfig, PolicyOutput, PruningPolicy
from tprl_env.policy.observations import to_tensors
from tprl_env.rllib.rollout.distributions import (
    BernoulliActions,
    ExactActions,
    pack_bernoulli,
    pack_exact,
)

__all__ = ["Acted", "TokenPruningModule", "critic_parameters", "load_policy"]


class Acted(NamedTuple):
    """Decisions of one step: masks int8 (R, N), log-probabilities and values (R,), inputs."""

    actions: Tensor
    logp: Tensor
    values: Tensor
    inputs: Tensor


class TokenPruningModule(TorchRLModule, InferenceOnlyAPI, ValueFunctionAPI):
    """`PruningPolicy` with its action distribution.

    ``model_config`` (small, JSON-able):
        policy: fields of `PolicyConfig`.
        distribution: ``"bernoulli"`` or ``"exact"``.
        discount: lambda_disc, for ``"bernoulli"``.
        max_steps: T, for the counts of ``"exact"`` with several steps.
        source: location of the source for batches of sample numbers.
        seed: of the initial weights.
        load: policy folder to start from, or None.
        critic: compute values; without it they are 0 and the critic's parameters are frozen.
        reference: keep a frozen copy of the start policy, in learners only. It is part of the
            learner's state, so that a resumed run keeps the start policy of its first start.

    Raises:
        ValueError: If ``load`` holds a policy of another shape.
    """

    def setup(self) -> None:
        """Build the policy; learner and runners get the same initial weights."""
        options = self.model_config
        config = PolicyConfig(**options["policy"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options["seed"])
            self.pruning_policy = PruningPolicy(config)
        if options.get("load"):
            loaded = load_policy(options["load"], config)
            self.pruning_policy.load_state_dict(loaded.state_dict())
        if not self._has_critic:
            for parameter in critic_parameters(self.pruning_policy).values():
                parameter.requires_grad_(False)
        if options.get("reference") and not self.inference_only:
            self.reference = copy.deepcopy(self.pruning_policy).requires_grad_(False)
        exact = options["distribution"] == "exact"
        self.action_dist_cls = ExactActions if exact else BernoulliActions
        # RLlib seeds torch with seed + worker index before it builds a runner's module.
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.pruning_policy.device

    def get_non_inference_attributes(self) -> list[str]:
        """What runners do not need."""
        return ["reference"]

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take weights, on a resume as from the learner; RLlib's own ignores what is missing.

        Raises:
            ValueError: Weights are missing, unknown or of another shape; a learner's start policy
                is left out where it is not needed.
        """
        own = self.state_dict()
        missing = sorted(own.keys() - state.keys())
        unknown = sorted(
            name for name in state.keys() - own.keys() if not name.startswith("reference.")
        )
        shapes = sorted(n for n in own.keys() & state.keys() if np.shape(state[n]) != own[n].shape)
        if missing or unknown or shapes:
            raise ValueError(
                f"these weights belong to another policy: {len(missing)} missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]}, {len(shapes)} of another shape "
                f"{shapes[:3]}; resume the run with the settings it was started with"
            )
        super().set_state(state)

    def act(self, obs: Mapping[str, Tensor], *, explore: bool = True) -> Acted:
        """Decide one step for all rows, without gradients.

        Args:
            obs: Batched observation, plain or of sample numbers.
            explore: Draw masks with the module's own generator; False takes the likeliest.
        """
        with torch.no_grad():
            inputs, values = self._inputs(obs)
            distribution = self.action_dist_cls.from_logits(inputs)
            if explore:
                if self.generator.device != inputs.device:
                    seed = self.generator.initial_seed()
                    self.generator = torch.Generator(inputs.device).manual_seed(seed)
                actions = distribution.sample(generator=self.generator)
            else:
                distribution = distribution.to_deterministic()
                actions = distribution.sample()
            return Acted(actions, distribution.logp(actions), values, inputs)

    @torch.no_grad()
    def judge(self, obs: Mapping[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution inputs (R, ...) and log-probabilities (R,) of masks drawn elsewhere."""
        inputs, _ = self._inputs({name: part.to(self.device) for name, part in obs.items()})
        return inputs, self.action_dist_cls.from_logits(inputs).logp(actions.to(self.device))

    @torch.no_grad()
    def reference_logp(
        self, obs: Mapping[str, Tensor], actions: Tensor, *, per_token: bool = False
    ) -> Tensor:
        """Log-probability of masks under the start policy, (R,), or per token, (R, N)."""
        inputs, _ = self._inputs(obs, functools.partial(_actor_alone, self.reference))
        distribution = self.action_dist_cls.from_logits(inputs)
        return distribution.token_logp(actions) if per_token else distribution.logp(actions)

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._acted(batch, explore=True)

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._acted(batch, explore=False)

    def _acted(self, batch: dict[str, Any], explore: bool) -> dict[str, Any]:
        acted = self.act(batch[Columns.OBS], explore=explore)
        return {
            Columns.ACTIONS: acted.actions,
            Columns.ACTION_LOGP: acted.logp,
            Columns.ACTION_DIST_INPUTS: acted.inputs,
        }

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        inputs, values = self._inputs(batch[Columns.OBS])
        result = {Columns.ACTION_DIST_INPUTS: inputs}
        return result | ({Columns.EMBEDDINGS: values} if self._has_critic else {})

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Values (R,); ``embeddings`` are those of a forward pass on the same batch.

        Raises:
            ValueError: In a module without a critic.
        """
        if not self._has_critic:
            raise ValueError("this module was built without a critic and has no values")
        return self._inputs(batch[Columns.OBS])[1] if embeddings is None else embeddings

    @property
    def _has_critic(self) -> bool:
        return bool(self.model_config.get("critic", True))

    def _inputs(
        self, obs: Mapping[str, Tensor], policy: Forward | None = None
    ) -> tuple[Tensor, Tensor]:
        """Distribution inputs (R, ...) and values (R,), each distinct state computed once."""
        if policy is None:
            policy = self.pruning_policy
            policy = policy if self._has_critic else functools.partial(_actor_alone, policy)
        inverse = None
        if "state" in obs:
            obs, inverse = _distinct(obs)
        if "tokens" in obs:
            full, output = obs, policy(obs)
        else:
            full = self._look_up(obs)
            output = forward_alive_only(policy, full)
        alive = full["alive"].bool()
        if self.action_dist_cls is ExactActions:
            count = self._counts(alive, full["budget"], full["step"])
            inputs = pack_exact(output.logits, alive, count)
        else:
            discount = float(self.model_config["discount"])
            inputs = pack_bernoulli(output.logits, alive, full["step"], discount)
        if inverse is None:
            return inputs, output.value
        return inputs[inverse], output.value[inverse]

    def _look_up(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Complete an observation of sample numbers from the source."""
        source = shared_source(self.model_config["source"])
        samples = obs["sample"].reshape(-1).cpu().numpy().astype(np.int64)
        config = self.pruning_policy.config
        parts = look_up(source, samples, config.query, areas=config.coordinates)
        return {**obs, **to_tensors(parts, self.device)}

    def _counts(self, alive: Tensor, budget: Tensor, step: Tensor) -> Tensor:
        """Tokens to keep in this step, int64: equal ratios from what is alive to the budget.

        A function of the observation alone, so that runner and learner agree: with n alive tokens
        and T - t steps left, the first entry of `rewards.step_budgets`.
        """
        total = alive.sum(1).cpu().numpy()
        wanted = np.rint(budget.reshape(-1).detach().cpu().numpy()).astype(np.int64)
        wanted = np.minimum(wanted, total)
        left = self.model_config["max_steps"] - step.reshape(-1).detach().cpu().numpy()
        counts = wanted.copy()
        for steps in np.unique(left[left > 1]):  # with one step left the count is the budget
            rows = (left == steps) & (wanted > 0)
            counts[rows] = step_budgets(total[rows], wanted[rows], int(steps))[:, 0]
        return torch.from_numpy(counts).to(alive.device)


def critic_parameters(policy: PruningPolicy) -> dict[str, Tensor]:
    """Parameters that only the value depends on, by name."""
    heads = ("critic.", "value_query.")
    return {name: part for name, part in policy.named_parameters() if name.startswith(heads)}


def _actor_alone(policy: PruningPolicy, obs: Mapping[str, Tensor]) -> PolicyOutput:
    """Logits without computing a value; values are 0."""
    logits = policy.logits(obs)
    return PolicyOutput(logits, logits.new_zeros(len(logits)))


def load_policy(folder: str, config: PolicyConfig) -> PruningPolicy:
    """A saved policy that must have this shape.

    Raises:
        ValueError: If it has another one, naming the fields that differ.
    """
    policy = PruningPolicy.from_pretrained(folder)
    ours, theirs = asdict(config), asdict(policy.config)
    ignored = {"initial_keep", "trained_steps"}  # no trained weight depends on them
    different = [name for name in ours if name not in ignored and ours[name] != theirs[name]]
    if different:
        table = ", ".join(
            f"{name} {theirs[name]!r} instead of {ours[name]!r}" for name in different
        )
        raise ValueError(
            f"the policy in {folder} has another shape than this run's: {table}; train with the "
            "settings it was made with, or start without it"
        )
    return policy


def _distinct(obs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """First row of each state, and the state of each row; None where all differ."""
    state = obs["state"].reshape(-1)
    rest = {name: part for name, part in obs.items() if name != "state"}
    values, inverse = torch.unique(state, return_inverse=True)
    if len(values) == len(state):
        return rest, None
    first = torch.full_like(values, len(state))
    places = torch.arange(len(state), device=state.device, dtype=values.dtype)
    first = first.scatter_reduce(0, inverse, places, "amin")
    return {name: part[first] for name, part in rest.items()}, inverse
