"""Tuning an LVLM to a reducer: LoRA on the language model, the reducer frozen (TPRL table 5).

The tower, the projector and the policy stay as they are, so that tokens and codes of a store are
those of the tuned LVLM, too, and training needs no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tprl_env.env.budgets import Budget
from tprl_env.evaluation.measure import check_budgets, keep_masks
from tprl_env.lvlm.stored import stored_prompt, with_fixed
from tprl_env.reducers.interfaces import Pruner

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TuningSettings:
    """How an LVLM is tuned.

    Attributes:
        budgets: Budgets of the masks, one drawn per batch; empty: all tokens, the control.
        steps: Gradient steps.
        batch_size: Questions per step.
        lr: Adam's learning rate, after a warm-up of a tenth of the steps falling to zero.
        rank: Of the LoRA matrices.
        seed: Of the order, the budgets and the matrices.
    """

    budgets: tuple[Budget, ...] = ()
    steps: int = 300
    batch_size: int = 32
    lr: float = 1e-3
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: A number is out of range.
        """
        for name in ("steps", "batch_size", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr must lie in (0, 1), got {self.lr}")


def tune(
    lvlm: Any,
    store: FeatureStore,
    pruner: Pruner | None,
    settings: TuningSettings,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train LoRA matrices on a store's answers under a pruner's masks, and merge them.

    Args:
        lvlm: A loaded LVLM, the one that encoded the store; its language model is changed.
        store: Questions and answers; the first answer of each is learned.
        pruner: Chooses the masks; None, with no budgets, for the control.
        settings: How.
        on_step: Told the step and its loss.

    Returns:
        The loss of every step.

    Raises:
        ImportError: peft is not installed.
        ValueError: The store is another LVLM's, or there are budgets without a pruner.
        FloatingPointError: A loss is not finite; the LVLM is as it was.
    """
    if bool(settings.budgets) != (pruner is not None):
        raise ValueError("tuning under pruning needs a pruner and budgets; the control neither")
    if store.manifest.lvlm_fingerprint != lvlm.fingerprint:
        raise ValueError(
            f"{store.path} was encoded by another LVLM than {lvlm.name}; encode the questions with "
            f"this one"
        )
    if settings.budgets:
        check_budgets(settings.budgets, store.max_tokens)
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ImportError(
            'tuning needs peft, which is not installed: pip install "tprl-env[finetune]"'
        ) from error
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=list(TARGETS))
    adapted = get_peft_model(lvlm.text_model, config)
    weights = [one for one in adapted.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1
    )
    losses: list[float] = []
    finished = False
    try:
        for step, (samples, keep) in enumerate(_batches(store, pruner, settings)):
            loss = _loss(lvlm, store, samples, keep)
            if not bool(loss.isfinite()):
                raise FloatingPointError(
                    f"the loss of step {step} is not finite; lower lr, now {settings.lr}"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
        finished = True
    finally:
        # merged into the weights, or taken out again
        _ = adapted.merge_and_unload() if finished else adapted.unload()
        lvlm.text_model.requires_grad_(False)
    lvlm.mark_changed(f"tuned on {store.fingerprint} with {settings}")
    return losses


def _batches(
    store: FeatureStore, pruner: Pruner | None, settings: TuningSettings
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]]:
    """Questions in a new order every epoch, with masks at one budget per batch."""
    generator = np.random.default_rng(settings.seed)
    order = np.zeros(0, np.int64)
    for _ in range(settings.steps):
        while len(order) < settings.batch_size:
            order = np.concatenate([order, generator.permutation(len(store))])
        samples, order = order[: settings.batch_size], order[settings.batch_size :]
        keep = None
        if pruner is not None:
            budget = settings.budgets[int(generator.integers(len(settings.budgets)))]
            keep = keep_masks(pruner, store, samples, budget)
        yield samples, keep


def _loss(
    lvlm: Any,
    store: FeatureStore,
    samples: Sequence[int] | npt.NDArray[np.int64],
    keep: npt.NDArray[np.bool_] | None,
) -> torch.Tensor:
    rows = [int(one) for one in samples]
    masks = None
    if keep is not None:
        masks = [
            with_fixed(store, row, mask[: len(store.tokens(row))], True)
            for row, mask in zip(rows, keep, strict=True)
        ]
    tokens = [torch.from_numpy(np.array(store.visual(row).tokens)) for row in rows]
    answers = [store.answer_ids(row)[0].tolist() for row in rows]
    found: torch.Tensor = lvlm.answer_loss(
        [stored_prompt(store, row) for row in rows], answers, tokens, masks
    )
    return found
