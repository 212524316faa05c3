"""Demonstrations: what a pruner keeps, as supervised labels for the policy (TPRL eq. 7).

Shapes: M transitions, N ``max_tokens`` of the source, S samples. One transition is one step of one
trajectory: which tokens were alive and which of them the demonstrator kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from tprl_env.checks import check_choice
from tprl_env.data.features.source import TokenSource
from tprl_env.reducers.interfaces import PruneInputs, Pruner, RankingPruner, prune_inputs
from tprl_env.reducers.prune.vispruner import VisPruner

Nest = Literal["restrict", "intersect"]
_DTYPES: dict[str, type[np.generic]] = {
    "sample": np.int64,
    "alive": np.bool_,
    "keep": np.bool_,
    "budget": np.int64,
    "step": np.int64,
}


@dataclass(frozen=True)
class Demonstrations:
    """Transitions of a demonstrator.

    Attributes:
        sample: int64 (M,), sample number.
        alive: bool (M, N), tokens in play before the step.
        keep: bool (M, N), label 1 = kept (TPRL eq. 7); a subset of ``alive``.
        budget: int64 (M,), tokens wanted at the end of the trajectory.
        step: int64 (M,), steps taken before this one.
    """

    sample: npt.NDArray[np.int64]
    alive: npt.NDArray[np.bool_]
    keep: npt.NDArray[np.bool_]
    budget: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        count = len(self.sample)
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            wanted = self.alive.shape if name in ("alive", "keep") else (count,)
            if array.dtype != dtype or array.shape != wanted or len(array) != count:
                raise ValueError(
                    f"demonstrations need {name} of {np.dtype(dtype)}{wanted} for {count} "
                    f"transitions, got {array.dtype}{array.shape}"
                )
        if self.alive.ndim != 2 or bool((self.keep & ~self.alive).any()):
            raise ValueError("demonstrations must keep alive tokens only, (M, N) masks both")

    def __len__(self) -> int:
        """Number of transitions M."""
        return len(self.sample)

    def draw(self, generator: np.random.Generator, count: int) -> Demonstrations:
        """``count`` transitions drawn uniformly with replacement."""
        return self.rows(generator.integers(len(self), size=count))

    def rows(self, numbers: npt.NDArray[np.int64] | slice) -> Demonstrations:
        """Chosen transitions."""
        return Demonstrations(*(getattr(self, field.name)[numbers] for field in fields(self)))


class SaliencyDemonstrator:
    """Endless demonstrations: fresh budgets over a fixed ranking of each sample's tokens.

    Masks are the top ``k`` of the saliency with k log-uniform on the integers low..high,
    P(k) = log((k + 1) / k) / log((high + 1) / low), as the environment draws budgets.

    Args:
        samples: int64 (S,), sample numbers.
        saliency: float32 (S, N); padding is -inf.
        low: Smallest budget.
        high: Largest budget; images with fewer tokens keep all of them.

    Raises:
        ValueError: On shapes or budgets that cannot be, or NaN in the saliency.
    """

    def __init__(
        self,
        samples: npt.NDArray[np.int64],
        saliency: npt.NDArray[np.float32],
        low: int,
        high: int,
    ) -> None:
        if saliency.ndim != 2 or len(saliency) != len(samples) or not len(samples):
            raise ValueError(
                f"saliency must be (samples, tokens) for {len(samples)} samples, at least one, "
                f"got {saliency.shape}"
            )
        if not 1 <= low <= high <= saliency.shape[1]:
            raise ValueError(
                f"budgets must satisfy 1 <= low <= high <= {saliency.shape[1]}, "
                f"got low={low}, high={high}"
            )
        if np.isnan(saliency).any():
            raise ValueError("saliency must not hold NaN; compute the channel again")
        self.samples, self.low, self.high = samples, low, high
        self._exists = ~np.isneginf(saliency)
        # place of each token in its image's ranking: top-k is then one comparison
        order = np.argsort(-saliency, axis=1, kind="stable")
        self._place = np.empty(saliency.shape, np.int32)
        places = np.arange(saliency.shape[1], dtype=np.int32)
        np.put_along_axis(self._place, order, np.broadcast_to(places, saliency.shape), axis=1)

    def __len__(self) -> int:
        """Number of samples S."""
        return len(self.samples)

    def draw(self, generator: np.random.Generator, count: int) -> Demonstrations:
        """``count`` one-step transitions at fresh samples and budgets."""
        rows = generator.integers(len(self), size=count)
        return self.at(rows, log_uniform(generator, (self.low, self.high), count))

    def at(self, rows: npt.NDArray[np.int64], budgets: npt.ArrayLike) -> Demonstrations:
        """Transitions of chosen rows at chosen budgets (one number or one per row)."""
        alive = self._exists[rows]
        wanted = np.minimum(np.broadcast_to(budgets, rows.shape), alive.sum(1)).astype(np.int64)
        keep = (self._place[rows] < wanted[:, None]) & alive
        return Demonstrations(self.samples[rows], alive, keep, wanted, np.zeros_like(wanted))


def log_uniform(
    generator: np.random.Generator, bounds: tuple[int, int], count: int
) -> npt.NDArray[np.int64]:
    """Log-uniform integers between two bounds, both included."""
    low, high = bounds
    logs = generator.uniform(np.log(low), np.log(high + 1), size=count)
    return np.clip(np.floor(np.exp(logs)), low, high).astype(np.int64)


def saliency_demonstrator(
    source: TokenSource,
    saliency: str | RankingPruner,
    low: int,
    high: int,
    samples: Sequence[int] | npt.NDArray[np.int64] | None = None,
) -> SaliencyDemonstrator:
    """Rank the tokens of a store once, for demonstrations at any budget.

    Args:
        source: The store.
        saliency: Name of a channel ("question_attention" is recommended: from reward alone the
            policy stays blind to the question for a long time), or a ranking pruner.
        low: Smallest budget.
        high: Largest budget.
        samples: Rows to use; None uses all.

    Raises:
        ValueError: When the store lacks the channel or what the pruner needs.
    """
    chosen = np.arange(len(source)) if samples is None else np.asarray(samples, dtype=np.int64)
    table = np.full((len(chosen), source.max_tokens), -np.inf, np.float32)
    if isinstance(saliency, str) and not source.has_channel(saliency):
        raise ValueError(
            f"the store {source.location!r} has no channel {saliency!r}; compute it with "
            "`tprl encode`, or demonstrate with a ranking pruner"
        )
    for row, sample in enumerate(chosen):
        if isinstance(saliency, str):
            values = source.channel(saliency, int(sample))
        else:
            inputs = prune_inputs(source, int(sample), saliency.required())
            saliency.check(inputs, 1)
            values = saliency.saliency(inputs).numpy()
        table[row, : len(values)] = values
    return SaliencyDemonstrator(chosen, table, low, high)


def pruner_budgets(
    source: TokenSource,
    pruner: Pruner,
    low: int,
    high: int,
    seed: int,
    samples: Sequence[int] | npt.NDArray[np.int64] | None = None,
) -> Demonstrations:
    """One mask per sample of any pruner, at budgets as the environment draws them.

    Args:
        source: The store, with what the pruner needs.
        pruner: The demonstrator; it need not rank tokens.
        low: Smallest budget.
        high: Largest budget; images with fewer tokens keep all of them.
        seed: Of the budgets.
        samples: Rows to use; None uses all.

    Raises:
        ValueError: On budgets that cannot be, or a store that lacks what the pruner needs.
    """
    if not 1 <= low <= high <= source.max_tokens:
        raise ValueError(
            f"budgets must satisfy 1 <= low <= high <= {source.max_tokens}, got {low}, {high}"
        )
    chosen = np.arange(len(source)) if samples is None else np.asarray(samples, dtype=np.int64)
    drawn = log_uniform(np.random.default_rng(seed), (low, high), len(chosen))
    alive = np.asarray(source.exists(chosen), np.bool_)
    budget = np.minimum(drawn, alive.sum(1)).astype(np.int64)
    keep = np.zeros_like(alive)
    for row, sample in enumerate(map(int, chosen)):
        inputs = prune_inputs(source, sample, pruner.required())
        pruner.check(inputs, int(budget[row]))
        keep[row, : inputs.num_tokens] = pruner.prune(inputs, int(budget[row])).cpu().numpy()
    return Demonstrations(chosen, alive, keep, budget, np.zeros_like(budget))


def nested_masks(
    source: TokenSource,
    rates: Sequence[float] = (0.75, 0.5),
    nest: Nest = "restrict",
    samples: Sequence[int] | npt.NDArray[np.int64] | None = None,
    pruner: Pruner | None = None,
) -> Demonstrations:
    """The paper's trajectories: a pruner at falling keep-rates, each mask inside the one before.

    VisPruner's own masks at two budgets are not nested, because the quota of important tokens
    changes with the budget, and TPRL does not say how it nested them.

    Args:
        source: The store, with what the pruner needs (VisPruner: tower features, CLS attention).
        rates: Fractions of the image's tokens left after each step, falling.
        nest: "restrict" runs each later step on the survivors (exact counts), "intersect" runs
            it on all tokens and intersects (fewer tokens than the rate says).
        samples: Rows to use; None uses all.
        pruner: By default VisPruner with its own defaults (the paper).

    Returns:
        ``len(rates)`` transitions per sample, a sample's own ones together. ``budget`` is the
        last rate's count for all of them.

    Raises:
        ValueError: On rates that do not fall or lie outside (0, 1], or an unknown ``nest``.
    """
    check_choice("nest", nest, get_args(Nest))
    falling = all(a > b for a, b in itertools.pairwise(rates))
    if not rates or not falling or not 0.0 < rates[-1] <= rates[0] <= 1.0:
        raise ValueError(f"rates must fall and lie in (0, 1], got {tuple(rates)}")
    pruner = VisPruner() if pruner is None else pruner
    chosen = np.arange(len(source)) if samples is None else np.asarray(samples, dtype=np.int64)
    shape = (len(chosen), len(rates) + 1, source.max_tokens)
    states = np.zeros(shape, np.bool_)  # m_0, m_1, ...
    budget = np.zeros(len(chosen), np.int64)
    by_image: dict[int, int] = {}  # questions on one image share their masks
    for row, sample in enumerate(map(int, chosen)):
        first = by_image.setdefault(source.image_number(sample), row)
        if first == row:
            inputs = prune_inputs(source, sample, pruner.required())
            pruner.check(inputs, 1)
            counts = [max(1, round(rate * inputs.num_tokens)) for rate in rates]
            states[row, :, : inputs.num_tokens] = _trajectory(pruner, inputs, counts, nest)
            budget[row] = counts[-1]
        else:
            states[row], budget[row] = states[first], budget[first]
    steps = len(rates)
    return Demonstrations(
        np.repeat(chosen, steps),
        states[:, :-1].reshape(-1, shape[2]),
        states[:, 1:].reshape(-1, shape[2]),
        np.repeat(budget, steps),
        np.tile(np.arange(steps), len(chosen)),
    )


_OF_THE_QUESTION = ("query", "query_tokens", "clip_text")  # the same for every part of the image


def _trajectory(
    pruner: Pruner, inputs: PruneInputs, counts: Sequence[int], nest: Nest
) -> npt.NDArray[np.bool_]:
    """States (T + 1, n) of one image: everything, then the mask after each step."""
    states = [torch.ones(inputs.num_tokens, dtype=torch.bool)]
    for count in counts:
        alive = states[-1]
        if nest == "intersect":
            states.append(alive & pruner.prune(inputs, count))
            continue
        part = PruneInputs(sample=inputs.sample)
        for name in pruner.required():
            if name in ("grid", "vision"):
                raise ValueError(
                    f"pruner {pruner.name!r} needs {name}, which a part of an image does not have; "
                    "use nest='intersect'"
                )
            value = getattr(inputs, name)
            setattr(part, name, value if name in _OF_THE_QUESTION else value[alive])
        after = torch.zeros_like(alive)
        after[alive] = pruner.prune(part, count)
        states.append(after)
    return torch.stack(states).numpy()
