"""Drawn trajectories: what a policy keeps of a picture, step by step (TPRL fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tprl_env.env.render import TrajectoryStep, draw_trajectory, drawn_picture
from tprl_env.env.scorer import Scorer
from tprl_env.env.token_layers import layers_of
from tprl_env.evaluation.plots import RUN_TEXT
from tprl_env.files import write_atomically
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.reducers.interfaces import prune_inputs

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.lvlm.protocol import LVLM


COLUMNS = 5  # panels in one row; text is then readable on a page of 1200 pixels
RIGHT = 0.5  # a score from here on counts as a right answer
LOOK = 4  # candidates looked at for every example that is drawn


@dataclass(frozen=True)
class Examples:
    """Drawn trajectories.

    Attributes:
        pictures: Files and captions.
        chosen: How they were chosen, in a sentence or two.
    """

    pictures: list[tuple[Path, str]]
    chosen: str


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


def choose_with_failures(
    store: FeatureStore,
    samples: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    count: int,
    strip_end: Callable[[int], float] | None = None,
) -> npt.NDArray[np.int64]:
    """Samples as `choose_examples` picks them, with at least the share of failures there is.

    Args:
        store: Store of the samples.
        samples: Sample numbers, ``(S,)``.
        scores: What the policy scored on them, ``(S,)``; below one half is a failure.
        count: How many to choose, at most.
        strip_end: Score of a sample after the last step that is drawn, which may differ from the
            one in ``scores``; samples on which the two agree come first.

    Returns:
        The failures first.
    """
    wrong = np.asarray(scores) < RIGHT
    failures = min(math.ceil(count * float(wrong.mean())), int(wrong.sum())) if len(wrong) else 0
    failures = max(failures, count - int((~wrong).sum()))  # too few right ones to fill the rest

    def pick(number: int, among: npt.NDArray[np.int64], ends_right: bool) -> list[int]:
        order = [int(one) for one in choose_examples(store, among, LOOK * number)]
        agreed: list[int] = []
        for one in order:
            if strip_end is None or len(agreed) == number:
                break
            if (strip_end(one) >= RIGHT) == ends_right:
                agreed.append(one)
        return [*agreed, *(one for one in order if one not in agreed)][:number]

    first = pick(failures, samples[wrong], False)
    rest = pick(count - len(first), samples[~wrong], True)
    return np.array([*first, *rest], dtype=np.int64)


def draw_examples(
    store: FeatureStore,
    scorer: Scorer,
    pruner: PolicyPruner,
    samples: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    count: int,
    budgets: Sequence[int],
    out: Path,
    lvlm: LVLM | None = None,
    run: str = "",
) -> Examples:
    """Draw what the policy keeps step by step on the picture, one strip per sample.

    Args:
        store: Store of the samples.
        scorer: Scores the mask of every step.
        pruner: The trained policy.
        samples: Sample numbers to choose from, ``(S,)``.
        scores: Of the policy at the last budget, ``(S,)``, see `choose_with_failures`.
        count: How many to draw.
        budgets: Tokens kept after each step, largest first.
        out: Folder for ``trajectory-NN.png``.
        lvlm: If given, its generated answer is printed under every step.
        run: Of the results file that the pictures belong to.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("trajectory-*.png"):  # of another run
        old.unlink()

    def strip_end(sample: int) -> float:
        mask = _step_masks(store, pruner, sample, budgets)[-1:]
        return float(scorer(np.array([sample], dtype=np.int64), mask)[0])

    chosen = choose_with_failures(store, samples, scores, count, strip_end)
    drawn: list[tuple[Path, str]] = []
    ended_wrong = 0
    for number, sample in enumerate(map(int, chosen)):
        masks = _step_masks(store, pruner, sample, budgets)
        found = scorer(np.full(len(masks), sample, dtype=np.int64), masks)
        answers = [None] * len(masks) if lvlm is None else _answers(store, lvlm, sample, masks)
        path = out / f"trajectory-{number:02d}.png"
        _draw_strip(store, sample, masks, found, answers, path, run)
        drawn.append((path, _caption(store, sample, float(found[0]), float(found[-1]), budgets)))
        ended_wrong += float(found[-1]) < RIGHT
    wrong = int((np.asarray(scores) < RIGHT).sum())
    return Examples(
        drawn,
        f"{len(chosen)} of {len(samples)} questions, the first of each question type in turn, of "
        f"different pictures where there are any. In the table the policy is wrong about {wrong} "
        f"of them at {budgets[-1]} tokens ({100 * wrong / max(len(samples), 1):.1f} %); failures "
        f"come first here, at least as large a share. {ended_wrong} of the {len(chosen)} end "
        "wrong. A strip prunes step by step, which can end otherwise than the table's numbers; "
        "questions on which both agree were preferred.",
    )


def _draw_strip(
    store: FeatureStore,
    sample: int,
    masks: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.float32],
    answers: Sequence[str | None],
    path: Path,
    run: str,
) -> None:
    """One strip as PNG."""
    size = int(np.prod(store.grid(sample)))
    steps = [
        TrajectoryStep(alive=mask[:size], score=float(score), answer=answer)
        for mask, score, answer in zip(masks, scores, answers, strict=True)
    ]
    picture, places = drawn_picture(store, sample)
    strip = draw_trajectory(
        picture,
        store.grid(sample),
        steps,
        question=store.question(sample),
        answer=store.answers(sample)[0],
        columns=math.ceil(len(steps) / math.ceil(len(steps) / COLUMNS)),
        box=store.picture_box(sample),
        layers=layers_of(store, sample, places),
    )
    told = PngInfo()
    if run:
        told.add_text(RUN_TEXT, run)
    write_atomically(path, partial(Image.fromarray(strip).save, format="PNG", pnginfo=told))


def _caption(
    store: FeatureStore, sample: int, full: float, last: float, budgets: Sequence[int]
) -> str:
    """Question, answer, and whether it was right in the end."""
    end = f"{'right' if last >= RIGHT else 'wrong'} at {budgets[-1]} tokens"
    if full < RIGHT:
        end += ", wrong with all tokens"
    return f"{store.question(sample)} — {store.answers(sample)[0]}: {end}"


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

    from tprl_env.lvlm.stored import stored_prompt, with_fixed

    tokens = torch.from_numpy(np.array(store.visual(sample).tokens))
    prompt = stored_prompt(store, sample)
    count = len(store.tokens(sample))
    keep = [with_fixed(store, sample, mask[:count], True) for mask in masks]
    return lvlm.generate([prompt] * len(masks), [tokens] * len(masks), keep)
