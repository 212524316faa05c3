"""Samples that an LVLM cannot be asked: found before anything is computed, named, listed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tprl_env.data.features.journal import Journal, Skipped
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.placement import StoredVisual
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.jsonl import BadSampleError
from tprl_env.data.sample import Sample
from tprl_env.files import write_text
from tprl_env.lvlm.encoding.units import SkippingReader
from tprl_env.lvlm.stored import stored_prompt

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import LVLM, Prompt

logger = logging.getLogger(__name__)

SKIPPED_NAME = "skipped.jsonl"
CURE = "; repair it or pass skip_bad=True"
LOW_SCORE = 0.03
"""Mean full score below which an LVLM is taken not to do the task at all."""

_SHOWN = 3

Texts = tuple["Prompt", list[tuple[int, ...]]]


def tokenise(
    lvlm: LVLM, sample: Sample, visual: StoredVisual | None = None, before: Texts | None = None
) -> Texts:
    """Prompt and answers of a sample.

    Args:
        lvlm: The LVLM.
        sample: The sample.
        visual: Its picture, which decides the prompt where it is not one grid in one run.
        before: What was found without it.

    Raises:
        BadSampleError: The LVLM cannot be asked this question or cannot write an answer.
    """
    if before is not None and (visual is None or visual.placement is None):
        return before
    try:
        if visual is None or visual.placement is None:  # one grid in one run
            prompt = lvlm.prompt(sample.question)
        else:
            prompt = lvlm.prompt(sample.question, [visual])
        return prompt, [lvlm.answer_ids(prompt, answer) for answer in sample.answers]
    except ValueError as error:
        raise _bad(sample, str(error)) from error


def check_context(lvlm: LVLM, sample: Sample, texts: Texts, tokens: int) -> None:
    """Refuse a sample that does not fit into the LVLM's context.

    Args:
        lvlm: The LVLM.
        sample: For the message.
        texts: Its prompt and answers.
        tokens: Visual tokens of its image.

    Raises:
        BadSampleError: Prompt, visual tokens and the longest answer need more places than it has.
    """
    prompt, answers = texts
    where = getattr(prompt, "placement", None)
    places = tokens if where is None else sum(where.extents)
    # a placeholder stands for a run of tokens, and the end token is written but not read
    needed = len(prompt.ids) - len(prompt.visual_at) + places + max(map(len, answers)) - 1
    if needed > lvlm.max_positions:
        raise _bad(
            sample,
            f"prompt, {tokens} visual tokens and answer need {needed} places, {lvlm.name} has "
            f"{lvlm.max_positions} (max_position_embeddings)",
        )


def _bad(sample: Sample, reason: str) -> BadSampleError:
    where = sample.meta.get("where")
    place = f" ({where})" if where else ""
    return BadSampleError(f"sample {sample.id!r}{place}: {reason}{CURE}", sample=sample.id)


@contextmanager
def leaving_out(skipped: list[Skipped], skip_bad: bool) -> Iterator[None]:
    """Count a bad sample instead of stopping at it, if wanted."""
    try:
        yield
    except BadSampleError as error:
        if not skip_bad:
            raise
        reason = str(error).removesuffix(CURE)
        skipped.append({"id": error.sample, "reason": reason})
        logger.warning("left out: %s", reason)


def finish(journal: Journal, units: int, reader: SkippingReader) -> None:
    """List what was left out, then write the manifest.

    Raises:
        StoreError: As ``Journal.finish``.
    """
    skipped = [*reader.skipped, *journal.skipped]
    if skipped and not journal.units:
        raise StoreError(f"every sample was left out, the first because: {skipped[0]['reason']}")
    if journal.units:
        _write_skipped(journal.folder, skipped)
    journal.finish(units, len(skipped))
    if skipped:
        logger.warning(
            "%d samples were left out of %s; %s there lists them",
            len(skipped),
            journal.folder,
            SKIPPED_NAME,
        )


def _write_skipped(folder: Path, skipped: Sequence[Skipped]) -> None:
    """List what was left out in ``skipped.jsonl``; no file where nothing was."""
    path = folder / SKIPPED_NAME
    if skipped:
        write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in skipped))
    else:
        path.unlink(missing_ok=True)


def warn_of_low_scores(store: FeatureStore, lvlm: LVLM | None) -> None:
    """Warn where the LVLM answers almost nothing as expected, since nothing can be learnt then.

    Args:
        store: A finished store.
        lvlm: Shows its first answers; ``None`` where it is not in this process.
    """
    mean = float(store.full_scores("exact").mean())
    if mean >= LOW_SCORE:
        return
    shown = ""
    if lvlm is not None:
        numbers = range(min(_SHOWN, len(store)))
        said = lvlm.generate(
            [stored_prompt(store, n) for n in numbers], [store.visual(n).tokens for n in numbers]
        )
        shown = ". " + "; ".join(
            f"{store.id(n)!r}: said {text!r}, expected {' or '.join(map(repr, store.answers(n)))}"
            for n, text in zip(numbers, said, strict=True)
        )
    logger.warning(
        "with all tokens the LVLM answers %.1f %% of %s as expected, so there is next to nothing "
        "to learn; check that it fits the questions and that answers are written as it writes "
        "them%s",
        100 * mean,
        store.path,
        shown,
    )
