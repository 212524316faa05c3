"""A policy that chooses how many tokens to keep: a value per count, and one price for all.

A head on a trained policy's features says how likely the right answer is at each count of a grid.
With v(k) that value, the count kept is the one with the largest

    v(k) - price * k / N,

and then exactly that many tokens are kept. The price moves along the whole frontier of accuracy
against tokens; :meth:`CountPruner.calibrate` finds the one that keeps a wanted mean.

Shapes: B questions, N tokens, w width of the policy, d_q query width, K counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tprl_env.data.features.source import TokenSource
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.observations import with_progress
from tprl_env.policy.pruner import Calibration, PolicyPruner
from tprl_env.policy.weights import load_module, read_config, save_weights, weights_digest
from tprl_env.reducers.interfaces import PruneInputs

KIND = "count-head"
FOLDER = "counts"
"""Where a policy's folder holds its head."""

_TOP = 48
_LOWEST = -12.0  # log-odds that stand for tokens that there are not
_DEAREST = 1e4


@dataclass(frozen=True)
class CountConfig:
    """What a head was fitted for.

    Attributes:
        counts: Counts of the grid, growing.
        inputs: Width of the features.
        hidden: Width of its layer.
        told: Budget that the policy is told when its features are read.
        policy: Digest of the policy's weights.
    """

    counts: tuple[int, ...]
    inputs: int
    hidden: int
    told: int
    policy: str

    def __post_init__(self) -> None:
        """Refuse a grid that is none.

        Raises:
            ValueError: It is empty, does not grow, or begins below 1.
        """
        grid = self.counts
        if not grid or grid[0] < 1 or any(b <= a for a, b in itertools.pairwise(grid)):
            raise ValueError(f"counts must grow from at least 1, got {grid}")


class CountHead(nn.Module):
    """Probability of the right answer at each count, from a policy's features."""

    def __init__(self, config: CountConfig) -> None:
        """Make an unfitted head."""
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.inputs)
        self.inner = nn.Linear(config.inputs, config.hidden)
        self.outer = nn.Linear(config.hidden, len(config.counts))

    def forward(self, features: Tensor) -> Tensor:
        """(B, K) log-odds of the right answer."""
        found: Tensor = self.outer(F.gelu(self.inner(self.norm(features))))
        return found

    def choose(self, features: Tensor, number: Tensor, price: float) -> Tensor:
        """Counts int64 (B,) with the largest value less price, among those that rows have.

        Args:
            features: (B, F).
            number: int64 (B,), tokens of each row.
            price: Of all its tokens, in probability of the right answer.
        """
        grid = torch.tensor(self.config.counts, device=features.device)
        value = self(features).double().sigmoid() - price * grid / number[:, None].double()
        value = value.masked_fill(grid > number[:, None].clamp(min=int(grid[0])), -torch.inf)
        return torch.minimum(grid[value.argmax(1)], number)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and weights beside a policy's, atomically."""
        fields = {**asdict(self.config), "counts": list(self.config.counts)}
        save_weights(folder, kind=KIND, config=fields, module=self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: PruningPolicy) -> CountHead:
        """Load what :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or belongs to another policy.
        """
        fields = read_config(folder, kind=KIND)
        try:
            config = CountConfig(**{**fields, "counts": tuple(fields["counts"])})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder}/config.json does not describe a head: {error}") from error
        if config.policy != weights_digest(policy):
            raise ValueError(
                f"the count head in {folder} was fitted to another policy; fit one with "
                f"`tprl fit-counts`"
            )
        return load_module(folder, kind=KIND, config=fields, build=lambda: cls(config))


def count_features(policy: PruningPolicy, obs: dict[str, Tensor], told: int) -> Tensor:
    """(B, 2 w + d_q + 48): what a head reads of a policy's first pass.

    The mean of the token features, their mean weighted by softmax of the log-odds, the mean
    question, and the 48 largest log-odds over 4.

    Args:
        policy: The policy, which does not change.
        obs: First observations.
        told: Budget that a policy with a budget input is told.
    """
    seen = with_progress(obs, alive=obs["alive"], step=0, budget=told)
    features, query, logits = policy.token_features(seen)
    alive = obs["alive"].bool()
    weight = alive.to(features.dtype)[..., None]
    mean = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
    share = logits.masked_fill(~alive, -torch.inf).softmax(1)[..., None]
    focused = (features * share).sum(1)
    sorted_ = logits.masked_fill(~alive, _LOWEST).sort(1, descending=True).values[:, :_TOP]
    sorted_ = F.pad(sorted_, (0, _TOP - sorted_.shape[1]), value=_LOWEST)
    return torch.cat([mean, focused, query, sorted_.clamp(min=_LOWEST) / 4], 1)


@dataclass(frozen=True, eq=False)
class CountPruner(PolicyPruner):
    """A policy that keeps as many tokens as its head finds worth their price.

    Attributes:
        head: The policy's count head.
        price: Of all tokens of a picture, in probability of the right answer; None until
            :meth:`calibrate` found one.
    """

    name: ClassVar[str] = "policy"

    head: CountHead | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        """Refuse a head that there is not, and a price that cannot be paid.

        Raises:
            ValueError: There is no head, it acts otherwise than top-k, or the price is below 0 or
                not finite.
        """
        super().__post_init__()
        if self.head is None:
            raise ValueError(
                "a policy without a count head cannot choose counts; fit one with `tprl fit-counts`"
            )
        if self.mode != "topk":
            raise ValueError(f"counts are chosen in one pass, mode='topk', got {self.mode!r}")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"price must be finite and at least 0, got {self.price!r}")

    @classmethod
    def of_folder(cls, folder: str | Path, **fields: Any) -> CountPruner:
        """The policy of a folder with its head.

        Raises:
            FileNotFoundError: There is no policy.
            ValueError: It has no head, or another policy's.
        """
        policy = PruningPolicy.from_pretrained(folder)
        return cls(policy, head=load_head(folder, policy), **fields)

    @property
    def exact(self) -> bool:
        """False: counts differ between questions."""
        return False

    @torch.no_grad()
    def keep(self, obs: dict[str, Tensor], budget: int) -> Tensor:
        """Masks bool (B, N); ``budget`` has no effect, the price decides."""
        if self.price is None:
            raise ValueError("there is no price; pass price=... or use calibrate(source, mean)")
        chosen = self.counts(obs)
        return self._rollout(obs, chosen[:, None], chosen)[-1]

    @torch.no_grad()
    def counts(self, obs: dict[str, Tensor]) -> Tensor:
        """Tokens that each row of observations keeps, int64 (B,)."""
        assert self.head is not None
        price = 0.0 if self.price is None else self.price
        features = count_features(self.policy, obs, self.head.config.told)
        return self.head.choose(features, obs["alive"].sum(1).long(), price)

    @torch.no_grad()
    def calibrate(
        self,
        data: TokenSource | Sequence[PruneInputs],
        budget: float,
        samples: Sequence[int] | None = None,
        nearest: bool = False,
    ) -> CountPruner:
        """A copy whose price keeps ``budget`` tokens on average.

        Args:
            data: Held-out store, or prune inputs.
            budget: Wanted mean count.
            samples: Rows of the store to use; None uses all.
            nearest: Take the nearest mean where the grid cannot have this one.

        Raises:
            ValueError: The grid cannot have that mean; the message has the range.
        """
        assert self.head is not None
        batches = self._batches(data, samples)
        told = self.head.config.told
        seen = [
            (count_features(self.policy, obs, told), obs["alive"].sum(1).long()) for obs in batches
        ]

        def kept(price: float) -> Tensor:
            assert self.head is not None
            return torch.cat([self.head.choose(f, n, price) for f, n in seen]).double()

        low, high = (float(kept(price).mean()) for price in (_DEAREST, 0.0)) if seen else (1, 0)
        if nearest and seen:
            budget = min(max(budget, low), high)
        if not low <= budget <= high:
            raise ValueError(
                f"a mean of {budget:g} tokens is out of this head's reach here, {low:.3g} to "
                f"{high:.3g}; ask for one in that range, or fit a head on other counts"
            )
        cheap, dear = 0.0, _DEAREST
        for _ in range(60):
            middle = math.sqrt(max(cheap, 1e-9) * dear)
            cheap, dear = (middle, dear) if float(kept(middle).mean()) > budget else (cheap, middle)
        price = min((cheap, dear), key=lambda one: abs(float(kept(one).mean()) - budget))
        found = kept(price)
        report = Calibration(
            round(budget), price, float(found.mean()), float(found.std(unbiased=False)), len(found)
        )
        return dataclasses.replace(self, price=price, calibration=report)


def load_head(folder: str | Path, policy: PruningPolicy) -> CountHead:
    """The head in a policy's folder.

    Raises:
        ValueError: There is none, or it is another policy's.
    """
    place = Path(folder) / FOLDER
    if not place.is_dir():
        raise ValueError(
            f"the policy in {folder} has no count head; fit one with "
            f"`tprl fit-counts STORE --policy {folder}`"
        )
    return CountHead.from_pretrained(place, policy)
