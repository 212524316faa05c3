"""A trained policy as a pruner: top-k, calibrated threshold, or a rollout of several steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.checks import check_choice
from tprl_env.data.features.source import TokenSource
from tprl_env.env.rewards import step_budgets
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.observations import observe, observe_inputs, with_progress
from tprl_env.reducers.interfaces import Knowledge, PruneInputs, Pruner
from tprl_env.reducers.selection import top_k_mask

Mode = Literal["topk", "threshold", "multistep"]
Penalty = float | Literal["coverage"]
COVERAGE = "coverage"
PENALTIES: tuple[Penalty, ...] = (0.0, 2.0, 4.0, 8.0, 16.0, "coverage")
_BISECTIONS = 50
_LOGIT_RANGE = 40.0  # log-odds searched for a threshold; float64 resolves p on the whole range


@dataclass(frozen=True)
class Calibration:
    """What a calibrated threshold keeps on the images it was calibrated on.

    Attributes:
        budget: Wanted mean.
        threshold: tau.
        mean_kept: Mean number of kept tokens.
        std_kept: Its standard deviation over images.
        images: Number of (image, question) pairs.
    """

    budget: float
    threshold: float
    mean_kept: float
    std_kept: float
    images: int


@dataclass(frozen=True, eq=False)
class PolicyPruner(Pruner):
    """Prune by a :class:`~tprl_env.policy.PruningPolicy`.

    Made by hand it acts as the fields say; :meth:`as_trained` and :meth:`from_pretrained` choose
    mode and steps as the policy was trained.

    * ``"topk"`` keeps the ``budget`` largest log-odds: exact.
    * ``"threshold"`` keeps p > tau, the arg-max where nothing passes (TPRL eq. 16). The number
      differs between images; :meth:`calibrate` chooses tau for a wanted mean.
    * ``"multistep"`` acts greedily for ``steps`` steps: a policy that sees the budget keeps
      geometric counts down to it (exact); another keeps ``discount**t * p > tau`` at step t.

    With a ``redundancy_penalty`` an exact mode keeps one token after the other, each with the
    largest log-odds less the penalty times its similarity to what is kept (maximal marginal
    relevance, Carbonell & Goldstein 1998), or, with ``"coverage"``, with the largest
    p (1 - similarity).

    Attributes:
        policy: The policy; used in evaluation only, never trained here.
        mode: See above.
        threshold: tau, strictly between 0 and 1; needed wherever a threshold decides.
        steps: Steps of the rollout.
        redundancy_penalty: Log-odds that a copy of a kept token loses, or ``"coverage"``, for
            the exact modes; similarity is the cosine of the codes, at least 0. The exact-budget
            distribution says how many of several equal tokens to keep, but their log-odds are
            equal: top-k alone keeps all copies of one object before the first of the next.
        discount: lambda_disc of eq. 14 for thresholded rollouts; 1 leaves p as it is.
        batch_size: Images per forward pass.
        calibration: How tau was found, if it was calibrated.
    """

    name: ClassVar[str] = "policy"
    knowledge: ClassVar[Knowledge] = "policy"
    needs: ClassVar[tuple[str, ...]] = ("codes",)

    policy: PruningPolicy
    mode: Mode = "topk"
    threshold: float | None = None
    steps: int = 3
    redundancy_penalty: Penalty = 0.0
    discount: float = 1.0
    batch_size: int = 128
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot prune."""
        check_choice("mode", self.mode, get_args(Mode))
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must lie in (0, 1), got {self.threshold!r}")
        if not 0.0 < self.discount <= 1.0:
            raise ValueError(f"discount must lie in (0, 1], got {self.discount!r}")
        penalty = self.redundancy_penalty
        if penalty != COVERAGE and (
            isinstance(penalty, str) or not (math.isfinite(penalty) and penalty >= 0)
        ):
            raise ValueError(
                f"redundancy_penalty must be 0 or positive, or {COVERAGE!r}, got {penalty!r}"
            )
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}"
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **fields: Any) -> PolicyPruner:
        """Load the policy of a folder, acting as it was trained; see :meth:`as_trained`."""
        return cls.as_trained(PruningPolicy.from_pretrained(folder), **fields)

    @classmethod
    def as_trained(
        cls, policy: PruningPolicy, steps: int | None = None, **fields: Any
    ) -> PolicyPruner:
        """Exact pruner in as many steps as the policy was trained to take.

        A policy that does not see the budget cannot act in steps down to it: top-k in one pass.

        Args:
            policy: The policy.
            steps: By default ``policy.config.trained_steps``.
            **fields: Other fields of the class; a ``mode`` overrides the choice above.
        """
        steps = policy.config.trained_steps if steps is None else steps
        mode: Mode = "multistep" if steps > 1 and policy.config.budget else "topk"
        return cls(policy, **{"mode": mode, "steps": steps, **fields})

    @property
    def exact(self) -> bool:
        """Whether exactly ``budget`` tokens are kept."""
        return self.mode == "topk" or (self.mode == "multistep" and self.policy.config.budget)

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep-mask of one image; where a threshold decides, ``budget`` only informs the policy."""
        return self.prune_batch([inputs], budget)[0]

    def prune_batch(self, inputs: Sequence[PruneInputs], budget: int) -> list[Tensor]:
        """Masks of several images, ``batch_size`` at a time."""
        masks: list[Tensor] = []
        for start in range(0, len(inputs), self.batch_size):
            part = inputs[start : start + self.batch_size]
            for one in part:
                self.check(one, budget)
            obs = observe_inputs(part, self.policy.config, device=self.policy.device)
            keep = self.keep(obs, budget).cpu()
            masks += [row[: one.num_tokens] for row, one in zip(keep, part, strict=True)]
        return masks

    @torch.no_grad()
    def keep(self, obs: dict[str, Tensor], budget: int) -> Tensor:
        """Masks bool (B, N) for a batch of first observations."""
        if self.exact:
            return self._rollout(obs, self._counts(obs, budget), budget)[-1]
        if self.threshold is None:
            raise ValueError(
                f"mode {self.mode!r} needs a threshold for this policy; pass threshold=... or use "
                "calibrate(source, budget)"
            )
        return self._threshold(obs, budget, math.log(self.threshold))

    @torch.no_grad()
    def trajectory(self, inputs: PruneInputs, budgets: Sequence[int]) -> list[Tensor]:
        """Greedy top-k masks after each step, nested, with chosen counts.

        Args:
            inputs: One image.
            budgets: Tokens left after each step, never growing; the last is what the policy is
                told.

        Returns:
            One bool (n,) per step.
        """
        if not budgets or any(b > a for a, b in itertools.pairwise(budgets)):
            raise ValueError(f"budgets must be one or more counts that never grow, got {budgets}")
        for budget in budgets:
            self.check(inputs, budget)
        obs = observe_inputs([inputs], self.policy.config, device=self.policy.device)
        counts = torch.tensor([list(budgets)], device=self.policy.device)
        return [mask[0].cpu() for mask in self._rollout(obs, counts, budgets[-1])]

    @torch.no_grad()
    def calibrate(
        self,
        data: TokenSource | Sequence[PruneInputs],
        budget: int,
        samples: Sequence[int] | None = None,
    ) -> PolicyPruner:
        """A copy whose threshold keeps ``budget`` tokens on average.

        Args:
            data: Held-out store, or prune inputs.
            budget: Wanted mean count.
            samples: Rows of the store to use; None uses all.

        Returns:
            The same pruner in a thresholded mode (``"topk"`` becomes ``"threshold"``), with
            ``threshold`` and ``calibration`` set. The mean misses the budget only by ties, or
            where a mean that small or large is out of reach.

        Raises:
            ValueError: When the mode is exact for this policy, or there is nothing to calibrate on.
        """
        mode: Mode = "threshold" if self.mode == "topk" else self.mode
        pruner = dataclasses.replace(self, mode=mode)
        if pruner.exact:
            raise ValueError(
                "this policy's multistep mode keeps exact counts; nothing to calibrate"
            )
        batches = pruner._batches(data, samples)
        number = [int(obs["alive"].sum(1).max()) for obs in batches]
        if not batches or not 1 <= budget <= max(number):
            raise ValueError(
                f"calibrate needs images and a budget in [1, {max(number, default=0)}], "
                f"got {len(batches)} batches and {budget}"
            )
        threshold, kept = pruner._solve(batches, budget)
        report = Calibration(
            budget, threshold, float(kept.mean()), float(kept.std(unbiased=False)), len(kept)
        )
        return dataclasses.replace(pruner, threshold=threshold, calibration=report)

    def _solve(self, batches: list[dict[str, Tensor]], budget: int) -> tuple[float, Tensor]:
        """Bisect log-odds of tau until the mean count meets the budget; (tau, counts (images,))."""
        first = None
        if self.mode == "threshold":  # one forward pass serves every tau
            first = [self._logits(obs, obs["alive"], 0, budget) for obs in batches]

        def counts(log_tau: float) -> Tensor:
            kept = [
                self._threshold(obs, budget, log_tau, None if first is None else first[i]).sum(1)
                for i, obs in enumerate(batches)
            ]
            return torch.cat(kept).double().cpu()

        low, high = -_LOGIT_RANGE, _LOGIT_RANGE
        for _ in range(_BISECTIONS if first is not None else 24):
            middle = (low + high) / 2
            if float(counts(_log_sigmoid(middle)).mean()) > budget:
                low = middle
            else:
                high = middle
        best = min((low, high), key=lambda x: abs(float(counts(_log_sigmoid(x)).mean()) - budget))
        # tau is stored as a probability; the counts reported are those of the stored number
        threshold = min(max(math.exp(_log_sigmoid(best)), 5e-324), 1.0 - 2.0**-53)
        return threshold, counts(math.log(threshold))

    def _batches(
        self, data: TokenSource | Sequence[PruneInputs], samples: Sequence[int] | None
    ) -> list[dict[str, Tensor]]:
        config, device, size = self.policy.config, self.policy.device, self.batch_size
        if isinstance(data, Sequence):
            if samples is not None:
                raise ValueError("samples chooses rows of a store; slice the prune inputs instead")
            starts = range(0, len(data), size)
            return [observe_inputs(data[i : i + size], config, device=device) for i in starts]
        rows = np.arange(len(data)) if samples is None else np.asarray(samples, dtype=np.int64)
        starts = range(0, len(rows), size)
        return [observe(data, rows[i : i + size], config, device=device) for i in starts]

    def _counts(self, obs: dict[str, Tensor], budget: int) -> Tensor:
        """Tokens to keep after each step, int64 (B, T)."""
        number = obs["alive"].sum(1)
        steps = self.steps if self.mode == "multistep" else 1
        table = step_budgets(number.cpu().numpy(), np.full(len(number), budget), steps)
        return torch.from_numpy(table).to(number.device)

    def _logits(self, obs: dict[str, Tensor], alive: Tensor, step: int, budget: Any) -> Tensor:
        return self.policy.logits(with_progress(obs, alive=alive, step=step, budget=budget))

    def _rollout(self, obs: dict[str, Tensor], counts: Tensor, budget: Any) -> list[Tensor]:
        """Greedy top-k per step; masks bool (B, N) after each."""
        alive, masks = obs["alive"], []
        for step in range(counts.shape[1]):
            logits = self._logits(obs, alive, step, budget)
            if self.redundancy_penalty:
                number = counts[:, step]
                alive = marginal_mask(logits, alive, number, obs["tokens"], self.redundancy_penalty)
            else:
                alive = top_k_mask(logits, alive, counts[:, step])
            masks.append(alive)
        return masks

    def _threshold(
        self, obs: dict[str, Tensor], budget: int, log_tau: float, first: Tensor | None = None
    ) -> Tensor:
        """discount**t * p > tau at each step, the arg-max where nothing passes."""
        alive = obs["alive"]
        for step in range(self.steps if self.mode == "multistep" else 1):
            logits = first if step == 0 and first is not None else None
            if logits is None:
                logits = self._logits(obs, alive, step, budget)
            # in float64 and log space: p of a confident float32 policy would all round to 1
            log_p = F.logsigmoid(logits.double()) + step * math.log(self.discount)
            passed = (log_p > log_tau) & alive
            one = torch.ones(len(alive), dtype=torch.int64, device=alive.device)
            alive = torch.where(passed.any(1, keepdim=True), passed, top_k_mask(logits, alive, one))
        return alive


def marginal_mask(
    logits: Tensor, alive: Tensor, count: Tensor, codes: Tensor, penalty: Penalty
) -> Tensor:
    """Greedy choice of tokens that are wanted and unlike what is kept already.

    The value of a token is its logit - penalty * similarity, the similarity being the largest to
    a kept token (maximal marginal relevance); or, with ``"coverage"``, p (1 - similarity).

    Args:
        logits: (B, N).
        alive: bool (B, N).
        count: int64 (B,), tokens to keep; at most the number alive.
        codes: (B, N, d), whose cosine (at least 0) is the similarity.
        penalty: Log-odds lost by a copy of a kept token, or ``"coverage"``.

    Returns:
        bool (B, N) with ``count`` kept per row, ties by lowest index.
    """
    unit = F.normalize(codes, dim=-1)
    wanted_alone = F.logsigmoid(logits)
    similarity = torch.zeros_like(logits)
    keep = torch.zeros_like(alive)
    rows = torch.arange(len(logits), device=logits.device)
    for taken in range(int(count.max()) if len(count) else 0):
        if isinstance(penalty, str):
            value = wanted_alone + torch.log1p(-similarity.clamp(max=1 - 1e-6))
        else:
            value = logits - penalty * similarity
        chosen = value.masked_fill(keep | ~alive, -math.inf).argmax(1)
        wanted = taken < count
        keep[rows[wanted], chosen[wanted]] = True
        cosine = (unit @ unit[rows, chosen][..., None])[..., 0].clamp(min=0)
        similarity = torch.where(wanted[:, None], torch.maximum(similarity, cosine), similarity)
    return keep


def choose_penalty(
    pruner: PolicyPruner,
    accuracy: Callable[[PolicyPruner], float],
    candidates: Sequence[Penalty] = PENALTIES,
) -> PolicyPruner:
    """The copy with the redundancy penalty that scores best; ties go to the first.

    Args:
        pruner: A pruner of an exact mode.
        accuracy: Scores a candidate on held-out (calibration) questions.
        candidates: Penalties to try.

    Raises:
        ValueError: There are no candidates, or the pruner does not keep exact counts.
    """
    if not candidates or not pruner.exact:
        raise ValueError(
            f"a penalty is chosen among at least one candidate for a pruner that keeps exact "
            f"counts, got {candidates} and mode {pruner.mode!r}"
        )
    tried = [dataclasses.replace(pruner, redundancy_penalty=value) for value in candidates]
    return max(tried, key=accuracy)


def _log_sigmoid(x: float) -> float:
    """Natural logarithm of 1 / (1 + exp(-x))."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
