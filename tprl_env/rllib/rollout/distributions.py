"""RLlib distributions over keep-masks, thin wrappers of `tprl_env.policy.distributions`.

RLlib rebuilds a distribution from one tensor of inputs. What is costly, log e_k and the entropy of
the conditional Bernoulli, is computed once per distinct state by the module and packed into those
inputs, so that a log-probability here is a sum.

Layout per row, N tokens:
    bernoulli: logits N | alive N | -t log(lambda_disc)
    exact:     logits N | alive N | count | log e_k | entropy
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import torch
from ray.rllib.core.distribution.distribution import Distribution
from torch import Tensor

from tprl_env.policy.distributions import ConditionalBernoulli, MaskedBernoulli
from tprl_env.policy.elementary_symmetric import log_partition

__all__ = ["BernoulliActions", "ExactActions", "pack_bernoulli", "pack_exact"]


def pack_bernoulli(logits: Tensor, alive: Tensor, step: Tensor, discount: float) -> Tensor:
    """Inputs of `BernoulliActions`, (B, 2 N + 1)."""
    penalty = -math.log(discount) * step.reshape(-1, 1).to(logits.dtype)
    return torch.cat([_living(logits, alive), alive.to(logits.dtype), penalty], dim=1)


def pack_exact(logits: Tensor, alive: Tensor, count: Tensor) -> Tensor:
    """Inputs of `ExactActions`, (B, 2 N + 3); differentiable in the logits."""
    living = _living(logits, alive)
    log_e, inclusion = log_partition(living, alive, count)
    entropy = log_e - (inclusion * living).sum(1)
    scalars = torch.stack([count.to(logits.dtype), log_e, entropy], dim=1)
    return torch.cat([living, alive.to(logits.dtype), scalars], dim=1)


def _living(logits: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, logits, 0.0)


class _MaskActions(Distribution):
    """What both distributions share: unpacking, and RLlib's names."""

    scalars: int  # columns after logits and alive

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs
        tokens = (inputs.shape[-1] - self.scalars) // 2
        self.logits = inputs[:, :tokens]
        self.alive = inputs[:, tokens : 2 * tokens] > 0.5
        self.tail = inputs[:, 2 * tokens :]

    @classmethod
    def from_logits(cls, logits: Tensor, **kwargs: Any) -> Any:
        """Build from packed inputs."""
        return cls(logits)

    @classmethod
    def required_input_dim(cls, space: gymnasium.Space[Any], **kwargs: Any) -> int:
        """Columns of the inputs for MultiBinary(N)."""
        return 2 * int(space.shape[0]) + cls.scalars  # type: ignore[index]

    def rsample(self, *, sample_shape: Any = None, **kwargs: Any) -> Tensor:
        """Masks cannot be sampled differentiably.

        Raises:
            TypeError: Always.
        """
        raise TypeError("keep-masks are discrete; use sample() and log-probabilities")


class BernoulliActions(_MaskActions):
    """Independent coins with the discounted probability (TPRL eq. 14, 15)."""

    scalars = 1

    @property
    def masks(self) -> MaskedBernoulli:
        """The distribution itself; the packed penalty is t in units of log(1/e)."""
        return MaskedBernoulli(self.logits, self.alive, self.tail[:, 0], discount=math.exp(-1.0))

    @property
    def divisor(self) -> Tensor:
        """Tokens of a row that take part in its log-probability, (B,)."""
        return self.alive.sum(1).clamp(min=1).to(self.logits.dtype)

    def sample(
        self, *, sample_shape: Any = None, generator: torch.Generator | None = None, **kwargs: Any
    ) -> Tensor:
        """Draw masks, int8 (B, N)."""
        return self.masks.sample(generator).to(torch.int8)

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:
        """Log-probability of masks, (B,)."""
        return self.masks.log_prob(value.bool())

    def token_logp(self, value: Tensor) -> Tensor:
        """Log-probability per token, (B, N), 0 where dead."""
        return self.masks.token_log_prob(value.bool())

    def entropy(self, **kwargs: Any) -> Tensor:
        """Entropy in nats, (B,)."""
        return self.masks.entropy()

    def kl(self, other: BernoulliActions, **kwargs: Any) -> Tensor:
        """KL(self || other) in nats, (B,)."""
        return self.masks.kl(other.masks)

    def to_deterministic(self) -> BernoulliActions:
        """The same, but `sample` keeps what is likelier kept than not."""
        return _BernoulliMode(self.inputs)


class _BernoulliMode(BernoulliActions):
    def sample(self, **kwargs: Any) -> Tensor:
        return self.masks.mode().to(torch.int8)


class ExactActions(_MaskActions):
    """Exactly ``count`` tokens are kept (docs/method.md, "Exact budgets")."""

    scalars = 3

    @property
    def count(self) -> Tensor:
        """Tokens to keep, int64 (B,)."""
        return self.tail[:, 0].round().long()

    @property
    def masks(self) -> ConditionalBernoulli:
        """The distribution itself."""
        return ConditionalBernoulli(self.logits, self.alive, self.count)

    @property
    def divisor(self) -> Tensor:
        """Tokens of a row that take part in its log-probability: the count, (B,)."""
        return self.tail[:, 0].clamp(min=1.0)

    def sample(
        self, *, sample_shape: Any = None, generator: torch.Generator | None = None, **kwargs: Any
    ) -> Tensor:
        """Draw masks, int8 (B, N)."""
        return self.masks.sample(generator).to(torch.int8)

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:
        """Log-probability (B,): kept logits - log e_k; -inf for another number of tokens."""
        keep = value.bool() & self.alive
        total = torch.where(keep, self.logits, 0.0).sum(1) - self.tail[:, 1]
        return torch.where(keep.sum(1) == self.count, total, -math.inf)

    def entropy(self, **kwargs: Any) -> Tensor:
        """Entropy in nats, (B,), as packed."""
        return self.tail[:, 2]

    def kl(self, other: ExactActions, **kwargs: Any) -> Tensor:
        """KL(self || other) in nats, (B,)."""
        return self.masks.kl(other.masks)

    def to_deterministic(self) -> ExactActions:
        """The same, but `sample` keeps the ``count`` largest logits."""
        return _ExactMode(self.inputs)


class _ExactMode(ExactActions):
    def sample(self, **kwargs: Any) -> Tensor:
        return self.masks.mode().to(torch.int8)
