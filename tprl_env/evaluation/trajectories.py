"""Drawn trajectories: what a policy keeps of a picture, step by step (TPRL fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from tprl_env.env.render import TrajectoryStep, draw_trajectory
from tprl_env.env.scorer import Scorer
from tprl_env.files import write_atomically
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.reducers.interfaces import prune_inputs

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.lvlm.protocol import LVLM


def choose_examples(
    store: FeatureStore, samples: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """``count`` samples spread over the question types, of different images while there are any."""
    by_type_of_question: dict[str, list[int]] = {}
    for sample in map(int, samples):
        by_type_of_question.setdefault(store.question_type(sample), []).append(sample)
    order: list[int] = []
    seen: set[int] = set()
    fresh = True
    while len(order) < count and any(by_type_of_question.values()):
        before = len(order)
        for question_type in sorted(by_type_of_question):
            for place, sample in enumerate(by_type_of_question[question_type]):
                image = store.image_number(sample)
                if len(order) < count and not (fresh and image in seen):
                    seen.add(image)
                    order.append(by_type_of_question[question_type].pop(place))
                    break
        fresh = fresh and len(order) > before  # else ask more about the same images
    return np.array(order, dtype=np.int64)


def draw_examples(
    store: FeatureStore,
    scorer: Scorer,
    pruner: PolicyPruner,
    samples: npt.NDArray[np.int64],
    budgets: Sequence[int],
    out: Path,
    lvlm: LVLM | None = None,
) -> list[tuple[Path, str]]:
    """Draw what the policy keeps step by step on the picture, one strip per sample.

    Args:
        store: Store of the samples.
        scorer: Scores the mask of every step.
        pruner: The trained policy.
        samples: Sample numbers, ``(B,)``.
        budgets: Tokens kept after each step, largest first.
        out: Folder for ``trajectory-NN.png``.
        lvlm: If given, its generated answer is printed under every step.

    Returns:
        Files and captions.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[Path, str]] = []
    for number, sample in enumerate(map(int, samples)):
        masks = _step_masks(store, pruner, sample, budgets)
        scores = scorer(np.full(len(masks), sample, dtype=np.int64), masks)
        answers = [None] * len(masks) if lvlm is None else _answers(store, lvlm, sample, masks)
        count = int(np.prod(store.grid(sample)))
        steps = [
            TrajectoryStep(alive=mask[:count], score=float(score), answer=answer)
            for mask, score, answer in zip(masks, scores, answers, strict=True)
        ]
        strip = draw_trajectory(
            store.picture(sample),
            store.grid(sample),
            steps,
            question=store.question(sample),
            answer=store.answers(sample)[0],
            box=store.picture_box(sample),
        )
        path = out / f"trajectory-{number:02d}.png"
        save = partial(Image.fromarray(strip).save, format="PNG")
        write_atomically(path, save)
        drawn.append((path, f"{store.question(sample)} — {store.answers(sample)[0]}"))
    return drawn


def _step_masks(
    store: FeatureStore, pruner: PolicyPruner, sample: int, budgets: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """All tokens first, then what is left after each step, ``(T + 1, max_tokens)``."""
    steps = pruner.trajectory(prune_inputs(store, sample), budgets)
    masks = np.zeros((len(steps) + 1, store.max_tokens), dtype=np.bool_)
    masks[0] = store.exists(np.array([sample]))[0]
    for row, mask in enumerate(steps, start=1):
        masks[row, : len(mask)] = np.asarray(mask)
    return masks


def _answers(
    store: FeatureStore, lvlm: LVLM, sample: int, masks: npt.NDArray[np.bool_]
) -> list[str]:
    """What the LVLM says with each mask."""
    import torch

    tokens = torch.from_numpy(np.array(store.tokens(sample)))
    prompt = lvlm.prompt(store.question(sample))
    keep = [mask[: len(tokens)] for mask in masks]
    return lvlm.generate([prompt] * len(masks), [tokens] * len(masks), keep)
