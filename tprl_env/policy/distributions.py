"""Distributions over keep-masks: TPRL's independent coins and their exact-budget conditional.

Shapes: B rows, N tokens (padded), K = the largest count of a batch. Everything is batched, and a
dead token (``alive`` False: pruned earlier, or padding) has action False and contributes exactly
zero to log-probability, entropy, divergence and gradients, whatever its logit is. Half-precision
logits are computed in float32.

* :class:`MaskedBernoulli`: a_i ~ Bernoulli(discount**t * p_i) (TPRL eq. 14, 15).
* :class:`ConditionalBernoulli`: the same coins conditioned on their sum (conditional Poisson
  sampling; Chen, Dempster and Liu 1994), so that exactly ``count`` tokens are kept.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.policy.elementary_symmetric import log_partition, remaining_table, tilted
from tprl_env.reducers.selection import top_k_mask

_TRIES = 16  # tilted draws per row and round; acceptance is about 1 / sqrt(2 pi variance)
_ROUNDS = 6  # rounds of rejection before the sequential sampler takes over


def check_logits(logits: Tensor, alive: Tensor) -> None:
    """Refuse log-odds from which no mask can be drawn.

    NaN would prune everything and infinities turn into NaN two operations later.

    Args:
        logits: Float (B, N); dead entries are ignored.
        alive: Bool (B, N).

    Raises:
        ValueError: A living token's log-odds is NaN or infinite; the first such row is named.
    """
    wrong = ~logits.isfinite() & alive
    if bool(wrong.any()):
        row = int(wrong.any(1).to(torch.int8).argmax())
        values = logits[row][wrong[row]]
        raise ValueError(
            f"logits must be finite, got {float(values[0])} for {len(values)} of "
            f"{int(alive[row].sum())} tokens in row {row}; the policy's weights or its inputs are "
            f"not finite (lower the learning rate, or take an earlier checkpoint)"
        )


class MaskedBernoulli:
    """a_i ~ Bernoulli(discount**power * sigmoid(logit_i)) over alive tokens (TPRL eq. 14, 15).

    The same discounted probability gives sampling, log-probability and entropy. Probabilities
    are formed in log space and nothing is clamped, so gradients are those of the equations.

    Args:
        logits: float (B, N), log-odds of p before the discount.
        alive: bool (B, N); 0/1 numbers are accepted.
        discount_power: (B,) or a number, the exponent t = 0, 1, 2 of eq. 14.
        discount: lambda_disc in (0, 1].

    Raises:
        ValueError: On shapes that do not fit together, a discount outside (0, 1], a negative
            power, or logits that are not finite where alive.
    """

    def __init__(
        self,
        logits: Tensor,
        alive: Tensor,
        discount_power: Tensor | float = 0.0,
        discount: float = 1.0,
    ) -> None:
        if not 0.0 < discount <= 1.0:
            raise ValueError(f"discount must lie in (0, 1], got {discount!r}")
        self.alive = _checked_alive(logits, alive)
        self.logits = _living(logits, self.alive)
        power = torch.as_tensor(discount_power, dtype=self.logits.dtype, device=logits.device)
        if power.dim() > 1 or (power.dim() == 1 and power.shape[0] != logits.shape[0]):
            raise ValueError(
                f"discount_power must be a number or of shape ({logits.shape[0]},), "
                f"got {tuple(power.shape)}"
            )
        if bool((power < 0).any()):
            raise ValueError(f"discount_power must not be negative, got {power.min().item()}")
        log_discount = (power * math.log(discount)).reshape(-1, 1)
        self.log_keep = F.logsigmoid(self.logits) + log_discount
        self.log_prune = _log_one_minus(self.logits, self.log_keep, log_discount < 0)

    @property
    def probs(self) -> Tensor:
        """Discounted keep-probability, (B, N); 0 where dead."""
        return torch.where(self.alive, self.log_keep.exp(), 0.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw masks, bool (B, N)."""
        probs = self.probs.detach()
        draws = torch.rand(probs.shape, generator=generator, dtype=probs.dtype, device=probs.device)
        return draws < probs

    def token_log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of each token's own decision, (B, N); 0 where dead."""
        keep = _checked_action(action, self.alive)
        chosen = torch.where(keep, self.log_keep, self.log_prune)
        return torch.where(self.alive, chosen, 0.0)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of whole masks, (B,); entries of dead tokens are ignored."""
        return self.token_log_prob(action).sum(1)

    def entropy(self) -> Tensor:
        """Sum of the token entropies in nats, (B,)."""
        keep, prune = self.log_keep.exp(), self.log_prune.exp()
        per_token = -(keep * self.log_keep + prune * self.log_prune)
        return torch.where(self.alive, per_token, 0.0).sum(1)

    def kl(self, other: MaskedBernoulli) -> Tensor:
        """KL(self || other) in nats, (B,).

        Raises:
            ValueError: When the two have different alive masks.
        """
        _check_same_alive(self.alive, other.alive)
        keep, prune = self.log_keep.exp(), self.log_prune.exp()
        per_token = keep * (self.log_keep - other.log_keep)
        per_token = per_token + prune * (self.log_prune - other.log_prune)
        return torch.where(self.alive, per_token, 0.0).sum(1)

    def mode(self, threshold: float = 0.5) -> Tensor:
        """Alive tokens whose discounted probability exceeds ``threshold``, bool (B, N)."""
        return self.probs > threshold


class ConditionalBernoulli:
    """Independent coins with odds exp(logits), conditioned on keeping exactly ``count`` tokens.

    log P(a) = sum of kept logits - log e_k(exp(logits)), with e_k the elementary symmetric
    polynomial (docs/method.md, "Exact budgets"). Order-free and exact; adding a constant to a row's
    logits changes nothing. Entropy and KL are exact, with exact gradients.

    Args:
        logits: float (B, N).
        alive: bool (B, N); 0/1 numbers are accepted.
        count: int64 (B,), tokens to keep, 0 to the number of alive ones; may differ per row.
            Clamping is the caller's: an episode whose budget exceeds a small image keeps all of it.

    Raises:
        ValueError: On shapes that do not fit together, a count below 0 or above the number of
            alive tokens, or logits that are not finite where alive.
    """

    def __init__(self, logits: Tensor, alive: Tensor, count: Tensor) -> None:
        self.alive = _checked_alive(logits, alive)
        self.count = _checked_count(self.alive, count)
        living = _living(logits, self.alive)
        mean = living.detach().sum(1, keepdim=True) / self.alive.sum(1, keepdim=True).clamp(min=1)
        # centred: the distribution is blind to a shift, and differences keep their digits
        self.logits = torch.where(self.alive, living - mean, 0.0)

    @cached_property
    def _partition(self) -> tuple[Tensor, Tensor]:
        return log_partition(self.logits, self.alive, self.count)

    def sample(self, generator: torch.Generator | None = None, draws: int | None = None) -> Tensor:
        """Draw masks exactly: rejection from tilted coins, then a sequential fallback.

        Args:
            generator: Source of randomness on the device of the logits.
            draws: Independent masks per row; the costly parts are then shared.

        Returns:
            bool (B, N), or (draws, B, N) when ``draws`` is given.
        """
        if draws is not None and draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        repeats = 1 if draws is None else draws
        logits = self.logits.detach()
        keep_p = tilted(logits, self.alive, self.count).keep.to(logits.dtype).repeat(repeats, 1)
        count = self.count.repeat(repeats)
        out = torch.zeros_like(keep_p, dtype=torch.bool)
        todo = torch.arange(len(keep_p), device=logits.device)
        for _ in range(_ROUNDS):
            if not len(todo):
                break
            shape = (len(todo), _TRIES, logits.shape[1])
            noise = torch.rand(shape, generator=generator, dtype=keep_p.dtype, device=logits.device)
            masks = noise < keep_p[todo][:, None]
            fits = masks.sum(2) == count[todo][:, None]
            found, first = fits.any(1), fits.to(torch.int8).argmax(1)
            out[todo[found]] = masks[found, first[found]]
            todo = todo[~found]
        if len(todo):
            rows = todo % len(self.count)
            out[todo] = _sequential_sample(
                logits[rows], self.alive[rows], self.count[rows], generator
            )
        return out if draws is None else out.unflatten(0, (draws, len(self.count)))

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of masks, (B,); -inf where a mask keeps another number of tokens.

        Entries of dead tokens are ignored.
        """
        keep = _checked_action(action, self.alive) & self.alive
        value = torch.where(keep, self.logits, 0.0).sum(1) - self._partition[0]
        possible = keep.sum(1) == self.count
        return value if bool(possible.all()) else torch.where(possible, value, -math.inf)

    def inclusion_probabilities(self) -> Tensor:
        """P(token is kept), (B, N); each row sums to its count."""
        return self._partition[1]

    def entropy(self) -> Tensor:
        """Entropy over the masks of that size in nats, (B,): log e_k - sum of pi_i logit_i."""
        log_e, inclusion = self._partition
        return log_e - (inclusion * self.logits).sum(1)

    def kl(self, other: ConditionalBernoulli) -> Tensor:
        """KL(self || other) in nats, (B,).

        Raises:
            ValueError: When the two have different alive masks or counts.
        """
        _check_same_alive(self.alive, other.alive)
        if not torch.equal(self.count, other.count):
            raise ValueError("kl is infinite between different counts; condition both on one count")
        log_e, inclusion = self._partition
        linear = (inclusion * (self.logits - other.logits)).sum(1)
        return linear - log_e + other._partition[0]

    def mode(self) -> Tensor:
        """The most probable mask: the ``count`` largest alive logits, bool (B, N)."""
        return top_k_mask(self.logits.detach(), self.alive, self.count)


def _log_one_minus(logits: Tensor, log_keep: Tensor, discounted: Tensor) -> Tensor:
    """log(1 - discount**t * sigmoid(logit)), exact to rounding on both branches.

    Where nothing is discounted it is logsigmoid(-logit). Elsewhere log1mexp (Maechler 2012), whose
    unused branch is fed a harmless constant so that its gradient cannot turn into NaN.
    """
    log_p = torch.where(discounted, log_keep, -1.0)
    near_zero = log_p > -math.log(2.0)
    by_expm1 = torch.log(-torch.expm1(torch.where(near_zero, log_p, -0.5)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, log_p)))
    return torch.where(
        discounted, torch.where(near_zero, by_expm1, by_log1p), F.logsigmoid(-logits)
    )


def _sequential_sample(
    logits: Tensor, alive: Tensor, count: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw exact masks token by token from the table of what the remaining tokens can still give.

    P(keep i | j kept so far) = p_i R[i+1, j+1] / R[i, j], where R[i, j] is the probability that
    tokens i.. add up to count - j.
    """
    coins = tilted(logits.double(), alive, count)
    table = remaining_table(coins.keep, coins.prune, count)
    rows, kept = torch.arange(len(logits), device=logits.device), torch.zeros_like(count)
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device=logits.device)
    out = torch.zeros_like(alive)
    for i in range(logits.shape[1]):
        with_it = coins.keep[:, i] * table[i + 1, rows, kept + 1]
        without = coins.prune[:, i] * table[i + 1, rows, kept]
        take = noise[:, i] * (with_it + without) < with_it
        out[:, i] = take
        kept = kept + take
    return out


def _living(logits: Tensor, alive: Tensor) -> Tensor:
    """Logits in float32 at least, 0 and without gradient where dead."""
    check_logits(logits, alive)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.where(alive, logits.to(dtype), 0.0)


def _checked_alive(logits: Tensor, alive: Tensor) -> Tensor:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point of shape (B, N), got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if alive.shape != logits.shape:
        raise ValueError(
            f"alive must have the shape of logits {tuple(logits.shape)}, got {tuple(alive.shape)}"
        )
    return alive.bool()


def _checked_count(alive: Tensor, count: Tensor) -> Tensor:
    if count.shape != alive.shape[:1] or count.is_floating_point():
        raise ValueError(
            f"count must be integers of shape ({alive.shape[0]},), got {count.dtype} "
            f"{tuple(count.shape)}"
        )
    if bool((count < 0).any()):
        raise ValueError(f"count must not be negative, got {int(count.min())}")
    number = alive.sum(1)
    if bool((count > number).any()):
        row = int((count - number).argmax())
        raise ValueError(
            f"count must not exceed the alive tokens, got {int(count[row])} of "
            f"{int(number[row])} in row {row}"
        )
    return count.long()


def _checked_action(action: Tensor, alive: Tensor) -> Tensor:
    if action.shape != alive.shape:
        raise ValueError(
            f"action must have the shape of alive {tuple(alive.shape)}, got {tuple(action.shape)}"
        )
    return action.bool()


def _check_same_alive(first: Tensor, second: Tensor) -> None:
    if not torch.equal(first, second):
        raise ValueError("kl needs the same alive mask on both sides; build both from one state")
