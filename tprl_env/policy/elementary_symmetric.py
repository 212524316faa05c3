"""Elementary symmetric polynomials of odds: value, gradient and covariance by linear-space tables.

Used by :class:`tprl_env.policy.distributions.ConditionalBernoulli`. Shift every logit of a row by a
constant c so that the coins sigmoid(logit + c) keep ``count`` tokens on average. Then

    log e_k(exp(logits)) = log P(sum of coins = k) - k c + sum_i softplus(logit_i + c)

for any c, and at this c the probability is at least 1 / (N + 1): nothing under- or overflows, and
the recursion runs on plain products instead of logarithms.

Tables, one slice per token so that a step of the recursion touches contiguous memory:
    given[i, b, j]      P(tokens before i keep j)
    remaining[i, b, j]  P(tokens from i on keep count_b - j)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_TILT_TOLERANCE = 1e-2  # the identity holds for any shift; this is close enough to condition it
_TILT_ITERATIONS = 100


class TiltedCoins(NamedTuple):
    """Coins whose conditional on the count is the wanted distribution.

    Attributes:
        shift: (B, 1) float64, the constant added to the logits.
        keep: (B, N) keep-probability in the dtype of the logits; exactly 0 where dead.
        prune: (B, N) its complement, computed from the logit; exactly 1 where dead.
    """

    shift: Tensor
    keep: Tensor
    prune: Tensor


def log_partition(logits: Tensor, alive: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log e_k over alive tokens and its gradient, the inclusion probabilities.

    Both outputs are differentiable in ``logits`` (the second with the exact covariance).

    Args:
        logits: float (B, N); half precision is computed in float32.
        alive: bool (B, N).
        count: int64 (B,), already between 0 and the number of alive tokens.

    Returns:
        float (B,) and float (B, N).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    living = torch.where(alive, logits.to(dtype), 0.0)
    log_e, inclusion = _LogPartition.apply(living, alive, count)
    return log_e.to(logits.dtype), inclusion.to(logits.dtype)


@torch.no_grad()
def tilted(logits: Tensor, alive: Tensor, count: Tensor) -> TiltedCoins:
    """Find the shift at which the coins keep ``count`` tokens on average.

    Rows that keep nothing or everything get coins of exactly 0 or 1.

    Args:
        logits: float (B, N).
        alive: bool (B, N).
        count: int64 (B,) within [0, number of alive tokens].
    """
    number = alive.sum(1)
    inner = ((count > 0) & (count < number))[:, None]
    x = torch.where(alive & inner, logits.double(), 0.0)
    shift = _solve_shift(x, alive, count, number, inner)
    y = x + shift
    keep = torch.where(inner, torch.sigmoid(y), (count > 0).double()[:, None])
    prune = torch.where(inner, torch.sigmoid(-y), (count == 0).double()[:, None])
    return TiltedCoins(
        shift,
        torch.where(alive, keep, 0.0).to(logits.dtype),
        torch.where(alive, prune, 1.0).to(logits.dtype),
    )


def _solve_shift(x: Tensor, alive: Tensor, count: Tensor, number: Tensor, inner: Tensor) -> Tensor:
    """Newton's method for sum sigmoid(x + c) = count, kept inside a shrinking bracket; (B, 1)."""
    wanted, weight = count[:, None].double(), alive.double()
    # at c = -x_min + log(k / (n - k)) every coin is at least k / n, at -x_max + ... at most
    ratio = torch.log(wanted.clamp(min=1) / (number[:, None] - wanted).clamp(min=1))
    low = ratio - torch.where(alive, x, -torch.inf).amax(1, keepdim=True)
    high = ratio - torch.where(alive, x, torch.inf).amin(1, keepdim=True)
    low, high = torch.where(inner, low, 0.0), torch.where(inner, high, 0.0)
    shift = ratio.clamp(low, high)
    for iteration in range(_TILT_ITERATIONS):
        p = torch.sigmoid(x + shift) * weight
        error = torch.where(inner, p.sum(1, keepdim=True) - wanted, 0.0)
        if bool((error.abs() < _TILT_TOLERANCE).all()):
            break
        low, high = torch.where(error < 0, shift, low), torch.where(error > 0, shift, high)
        slope = (p * (1 - p)).sum(1, keepdim=True).clamp(min=1e-12)
        step, middle = shift - error / slope, (low + high) / 2
        inside = (step > low) & (step < high) & (iteration % 4 != 3)  # bisect now and then
        shift = torch.where(inside, step, middle)
    return shift


def given_table(keep: Tensor, prune: Tensor, width: int) -> Tensor:
    """P(tokens before i keep j), (N + 1, B, width)."""
    batch, tokens = keep.shape
    table = keep.new_zeros(tokens + 1, batch, width)
    table[0, :, 0] = 1
    rows, keeps, prunes = table.unbind(0), *_columns(keep, prune)
    for i in range(tokens):
        torch.mul(rows[i], prunes[i], out=rows[i + 1])
        rows[i + 1][:, 1:].addcmul_(rows[i][:, :-1], keeps[i])
    return table


def remaining_table(keep: Tensor, prune: Tensor, count: Tensor) -> Tensor:
    """P(tokens from i on keep count - j), (N + 1, B, max(count) + 2); the last column is 0."""
    batch, tokens = keep.shape
    table = keep.new_zeros(tokens + 1, batch, int(count.max()) + 2)
    table[tokens].scatter_(1, count[:, None], 1)
    rows, keeps, prunes = table.unbind(0), *_columns(keep, prune)
    for i in range(tokens - 1, -1, -1):
        torch.mul(rows[i + 1], prunes[i], out=rows[i])
        rows[i][:, :-1].addcmul_(rows[i + 1][:, 1:], keeps[i])
    return table


def _columns(*tables: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Each (B, N) table as N contiguous columns of shape (B, 1)."""
    return tuple(table.T.contiguous().unsqueeze(-1).unbind(0) for table in tables)


class _LogPartition(torch.autograd.Function):
    """(logits, alive, count) -> (log e_k, inclusion probabilities)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alive: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        coins = tilted(logits, alive, count)
        remaining = remaining_table(coins.keep, coins.prune, count)
        given = given_table(coins.keep, coins.prune, remaining.shape[2] - 1)
        chance = remaining[0, :, 0]
        log_e = (
            chance.double().log()
            - count * coins.shift.squeeze(1)
            - (F.logsigmoid(-logits.double() - coins.shift) * alive).sum(1)
        )
        everything = count == alive.sum(1)
        log_e = torch.where(everything, logits.double().sum(1), log_e)
        log_e = torch.where(count == 0, 0.0, log_e).to(logits.dtype)
        # P(i kept, the others keep count - 1) / P(count)
        joint = torch.einsum("nbj,nbj->bn", given[:-1], remaining[1:, :, 1:])
        inclusion = coins.keep * joint / chance[:, None]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, alive, count, inclusion)
        return log_e, inclusion

    @staticmethod
    def backward(
        ctx: Any, grad_log_e: Tensor | None, grad_inclusion: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        logits, alive, count, inclusion = ctx.saved_tensors
        grad = None
        if grad_log_e is not None:
            grad = grad_log_e[:, None] * inclusion
        if grad_inclusion is not None:
            product = _CovarianceProduct.apply(logits, alive, count, inclusion, grad_inclusion)
            grad = product if grad is None else grad + product
        return grad, None, None


class _CovarianceProduct(torch.autograd.Function):
    """Covariance of the mask times a vector v, (B, N): Cov(a_i, sum_j v_j a_j).

    The tables carry the first moment of sum v_j a_j next to the probability. Not differentiable
    again: third derivatives of log e_k are refused.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, alive: Tensor, count: Tensor, inclusion: Tensor, vector: Tensor
    ) -> Tensor:
        v = torch.where(alive, vector, 0.0)
        v = v - (inclusion * v).sum(1, keepdim=True) / count.clamp(min=1)[:, None]
        v = torch.where(alive, v, 0.0)  # a shift changes no covariance at a fixed count; it helps
        coins = tilted(logits, alive, count)
        remaining = remaining_table(coins.keep, coins.prune, count)
        given = given_table(coins.keep, coins.prune, remaining.shape[2] - 1)
        before, after = _moment_tables(coins, v, given, remaining)
        moment = torch.einsum("nbj,nbj->bn", before[:-1], remaining[1:, :, 1:])
        moment += torch.einsum("nbj,nbj->bn", given[:-1], after[1:, :, 1:])
        moment = coins.keep * moment / remaining[0, :, :1] + v * inclusion
        return moment - inclusion * (inclusion * v).sum(1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "log e_k is differentiable twice only; detach the entropy or inclusion gradient"
        )


def _moment_tables(
    coins: TiltedCoins, v: Tensor, given: Tensor, remaining: Tensor
) -> tuple[Tensor, Tensor]:
    """E[sum of v over kept; j kept] for the tokens before i, and for the tokens from i on."""
    before, after = torch.zeros_like(given), torch.zeros_like(remaining)
    keeps, prunes, weighted = _columns(coins.keep, coins.prune, coins.keep * v)
    tokens = v.shape[1]
    for i in range(tokens):
        torch.mul(before[i], prunes[i], out=before[i + 1])
        before[i + 1, :, 1:].addcmul_(before[i, :, :-1], keeps[i])
        before[i + 1, :, 1:].addcmul_(given[i, :, :-1], weighted[i])
        j = tokens - 1 - i
        torch.mul(after[j + 1], prunes[j], out=after[j])
        after[j, :, :-1].addcmul_(after[j + 1, :, 1:], keeps[j])
        after[j, :, :-1].addcmul_(remaining[j + 1, :, 1:], weighted[j])
    return before, after
