"""Learning from demonstrations: supervised pre-training of the policy (TPRL eq. 7, 8).

Binary cross-entropy between the policy's keep-probability and the demonstrator's decision, the
mean over alive tokens of all transitions in a batch. With fresh budgets of the LVLM's own question
attention (``saliency_demonstrator``) this removes the question-blind plateau on which RL from
reward alone stays for very long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tprl_env.checks import check_choice
from tprl_env.data.features.source import TokenSource
from tprl_env.policy.demonstrations import Demonstrations
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.observations import observe, with_progress
from tprl_env.reducers.selection import top_k_mask

PosWeight = Literal["sqrt", "balanced", "none"]
Progress = Callable[[int, float], None]
_FLOOR = 1e-5  # added to the decayed learning rate, so that the last step still moves
_CRITIC = ("critic.", "value_query.")  # parameters that imitation does not touch
_REPORTED = 50  # steps averaged into one point of the reported curve


class DemonstrationSource(Protocol):
    """What :func:`pretrain` draws from: recorded demonstrations or a demonstrator."""

    def draw(self, generator: np.random.Generator, count: int) -> Demonstrations:
        """``count`` transitions."""
        ...


@dataclass(frozen=True)
class ImitationReport:
    """What pre-training did.

    Attributes:
        steps: Gradient steps.
        transitions: Demonstrated transitions used, with repetition.
        losses: Mean loss of each stretch of 50 steps.
        final_loss: The last of them.
        agreement: :func:`imitation_agreement` on transitions drawn after training.
        seconds: Wall-clock time of the steps.
    """

    steps: int
    transitions: int
    losses: tuple[float, ...]
    final_loss: float
    agreement: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self) | {"losses": list(self.losses)}


def demonstration_loss(
    logits: Tensor, keep: Tensor, alive: Tensor, pos_weight: PosWeight = "none"
) -> Tensor:
    """Binary cross-entropy over alive tokens (TPRL eq. 8), a scalar.

    The paper sums over tokens and steps; this is the mean over the alive tokens of the batch, so
    that the learning rate does not depend on their number.

    Args:
        logits: float (B, N), log-odds of p; dead entries are ignored.
        keep: bool (B, N), labels.
        alive: bool (B, N).
        pos_weight: Weight of kept tokens, for a row with n alive and k kept: "sqrt" is
            sqrt((n - k) / k), "balanced" (n - k) / k, "none" 1 (the paper). Rows that keep
            nothing or everything have 1.

    Raises:
        ValueError: On an unknown rule, or when nothing is alive.
    """
    check_choice("pos_weight", pos_weight, get_args(PosWeight))
    if not bool(alive.any()):
        raise ValueError("no token is alive in this batch; drop empty transitions")
    number = alive.sum(1, keepdim=True).to(logits.dtype)
    kept = (keep & alive).sum(1, keepdim=True).to(logits.dtype)
    ratio = torch.where((kept > 0) & (kept < number), (number - kept) / kept.clamp(min=1), 1.0)
    weight = {"sqrt": ratio.sqrt(), "balanced": ratio, "none": torch.ones_like(ratio)}[pos_weight]
    loss = F.binary_cross_entropy_with_logits(
        torch.where(alive, logits, 0.0), keep.to(logits.dtype), pos_weight=weight, reduction="none"
    )
    return torch.where(alive, loss, 0.0).sum() / alive.sum()


def pretrain(
    policy: PruningPolicy,
    source: TokenSource,
    demonstrations: DemonstrationSource,
    *,
    steps: int = 900,
    batch_size: int = 48,
    lr: float = 3e-3,
    seed: int = 0,
    pos_weight: PosWeight = "sqrt",
    max_grad_norm: float = 1.0,
    progress: Progress | None = None,
) -> ImitationReport:
    """Imitate a demonstrator; the critic is left as it is.

    AdamW without weight decay, learning rate decaying linearly to 1e-5. The same seed and policy
    give the same weights.

    Args:
        policy: Trained in place, on its own device.
        source: Codes and questions of the samples.
        demonstrations: Recorded transitions, or a demonstrator that draws fresh ones.
        steps: Gradient steps.
        batch_size: Transitions per step.
        lr: Initial learning rate.
        seed: Of the draws.
        pos_weight: See :func:`demonstration_loss`.
        max_grad_norm: Gradient clipping.
        progress: Called with (step, loss) after every step.

    Raises:
        ValueError: On sizes below 1 or an ``lr`` that is not positive.
        FloatingPointError: When the loss is not finite.
    """
    if steps < 1 or batch_size < 1 or not lr > 0 or not max_grad_norm > 0:
        raise ValueError(
            "steps and batch_size must be at least 1, lr and max_grad_norm positive, got "
            f"{steps}, {batch_size}, {lr} and {max_grad_norm}"
        )
    generator = np.random.default_rng(seed)
    actor = [p for name, p in policy.named_parameters() if not name.startswith(_CRITIC)]
    optimizer = torch.optim.AdamW(actor, lr=lr, weight_decay=0.0)
    started, losses = time.perf_counter(), []
    policy.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps) + _FLOOR
        batch = demonstrations.draw(generator, batch_size)
        loss = _loss(policy, source, batch, pos_weight)
        value = loss.item()
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the imitation loss became {value} at step {step}; lower lr={lr} or set "
                "query_norm and token_norm in the PolicyConfig"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor, max_grad_norm)
        optimizer.step()
        losses.append(value)
        if progress is not None:
            progress(step + 1, value)
    seconds = time.perf_counter() - started
    policy.eval()
    points = [float(np.mean(losses[i : i + _REPORTED])) for i in range(0, steps, _REPORTED)]
    agreement = imitation_agreement(policy, source, demonstrations.draw(generator, 256))
    return ImitationReport(steps, steps * batch_size, tuple(points), points[-1], agreement, seconds)


@torch.no_grad()
def imitation_agreement(
    policy: PruningPolicy,
    source: TokenSource,
    demonstrations: Demonstrations,
    batch_size: int = 128,
) -> float:
    """Share of the demonstrated tokens that the policy keeps at the same count.

    For each transition the policy's top k alive tokens, k = the demonstrator's count, are compared
    with the demonstrator's: |both| / k, averaged over transitions that keep something.

    Raises:
        ValueError: When no transition keeps anything.
    """
    shares: list[Tensor] = []
    for start in range(0, len(demonstrations), batch_size):
        batch = demonstrations.rows(slice(start, start + batch_size))
        keep, alive = (torch.from_numpy(m).to(policy.device) for m in (batch.keep, batch.alive))
        count = keep.sum(1)
        own = top_k_mask(policy.logits(_observation(policy, source, batch)), alive, count)
        shares.append(((own & keep).sum(1) / count)[count > 0].cpu())
    joined = torch.cat(shares) if shares else torch.zeros(0)
    if not len(joined):
        raise ValueError("agreement needs demonstrations that keep at least one token, got none")
    return float(joined.mean())


def _observation(
    policy: PruningPolicy, source: TokenSource, batch: Demonstrations
) -> dict[str, Tensor]:
    obs = observe(source, batch.sample, policy.config, device=policy.device)
    return with_progress(
        obs,
        alive=torch.from_numpy(batch.alive).to(policy.device),
        step=torch.from_numpy(batch.step).to(policy.device),
        budget=torch.from_numpy(batch.budget).to(policy.device),
    )


def _loss(
    policy: PruningPolicy, source: TokenSource, batch: Demonstrations, pos_weight: PosWeight
) -> Tensor:
    obs = _observation(policy, source, batch)
    keep = torch.from_numpy(batch.keep).to(policy.device)
    return demonstration_loss(policy.logits(obs), keep, obs["alive"], pos_weight)
