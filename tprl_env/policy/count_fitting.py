"""Fitting a count head to a frozen policy's own scores at every count of a grid.

Shapes: S questions, K counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.data.features.source import TokenSource
from tprl_env.env.scorer import Scorer
from tprl_env.policy.counts import CountConfig, CountHead, count_features
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.observations import observe
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.policy.weights import weights_digest

GRID = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 48)
_CHUNK = 128


@dataclass(frozen=True)
class CountFit:
    """How a head is fitted.

    Attributes:
        counts: Its grid; counts above a store's tokens are left out.
        questions: Questions whose curves are scored, from the first.
        steps: Gradient steps.
        batch_size: Questions per step.
        lr: Largest learning rate of AdamW, falling to zero.
        noise: Of the features, in training.
        held_out: Share of the questions that chooses the best step.
        seed: Of all draws.
    """

    counts: tuple[int, ...] = GRID
    questions: int = 1500
    steps: int = 1500
    batch_size: int = 256
    lr: float = 2e-3
    noise: float = 0.05
    held_out: float = 0.15
    seed: int = 0


def curves(
    policy: PruningPolicy, source: TokenSource, scorer: Scorer, samples: npt.NDArray[np.int64],
    counts: Sequence[int],
) -> npt.NDArray[np.float32]:  # fmt: skip
    """(S, K) scores of the policy's own top-k at every count."""
    found = np.zeros((len(samples), len(counts)), np.float32)
    pruner = PolicyPruner(policy)
    for start in range(0, len(samples), _CHUNK):
        part = samples[start : start + _CHUNK]
        obs = observe(source, part, policy.config, device=policy.device)
        for column, count in enumerate(counts):
            number = obs["alive"].sum(1).clamp(max=count).long()
            with torch.no_grad():
                keep = pruner._rollout(obs, number[:, None], number)[-1].cpu().numpy()
            found[start : start + len(part), column] = scorer(part, keep)
    return found


def fit_counts(
    policy: PruningPolicy,
    source: TokenSource,
    scorer: Scorer,
    settings: CountFit = CountFit(),
    told: int = 12,
    on_scored: Callable[[int], None] | None = None,
) -> tuple[CountHead, dict[str, Any]]:
    """Fit a head to a frozen policy's likelihood at every count.

    Args:
        policy: The policy.
        source: Store of the training split.
        scorer: Of likelihood, in [0, 1].
        settings: How.
        told: Budget that the policy is told for its features.
        on_scored: Told the number of scores, once they are there.

    Returns:
        The head, and what it took: scores, held-out loss, the mean curve.

    Raises:
        ValueError: There are too few questions, or no count fits the store.
    """
    grid = tuple(count for count in settings.counts if count <= source.max_tokens)
    samples = np.arange(min(settings.questions, len(source)), dtype=np.int64)
    if len(samples) < 20 or not grid:
        raise ValueError(
            f"fitting needs at least 20 questions and a count of at most {source.max_tokens}, got "
            f"{len(samples)} questions and counts {settings.counts}"
        )
    target = torch.from_numpy(curves(policy, source, scorer, samples, grid)).clamp(0, 1)
    if on_scored is not None:
        on_scored(target.numel())
    with torch.no_grad():
        features = torch.cat(
            [
                count_features(policy, observe(source, samples[i : i + _CHUNK], policy.config,
                                               device=policy.device), told).cpu()
                for i in range(0, len(samples), _CHUNK)
            ]
        )  # fmt: skip
    config = CountConfig(grid, features.shape[1], 128, told, weights_digest(policy))
    head, loss = _fitted(config, features, target, settings)
    report = {
        "scores": target.numel(),
        "questions": len(samples),
        "held_out_loss": round(loss, 5),
        "mean_curve": [round(float(one), 4) for one in target.mean(0)],
        "settings": asdict(settings),
    }
    return head.to(policy.device), report


def _fitted(
    config: CountConfig, features: Tensor, target: Tensor, settings: CountFit
) -> tuple[CountHead, float]:
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = CountHead(config)
    with torch.no_grad():
        head.outer.bias.copy_(torch.logit(target.mean(0).clamp(0.02, 0.98)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=0.01)
    order = torch.randperm(len(features), generator=generator)
    cut = max(int(len(features) * settings.held_out), 1)
    held, train = order[:cut], order[cut:]
    best, state = math.inf, head.state_dict()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps) + 1e-5
        rows = train[torch.randint(len(train), (settings.batch_size,), generator=generator)]
        noise = settings.noise * torch.randn(len(rows), features.shape[1], generator=generator)
        loss = F.binary_cross_entropy_with_logits(head(features[rows] + noise), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49 or step == settings.steps - 1:
            with torch.no_grad():
                value = F.binary_cross_entropy_with_logits(head(features[held]), target[held])
            if value.item() < best:
                best = value.item()
                state = {name: one.clone() for name, one in head.state_dict().items()}
    head.load_state_dict(state)
    return head.eval(), best
