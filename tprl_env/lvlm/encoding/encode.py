"""Encoding: samples and an LVLM become a feature store, once; everything else reads the store.

Every distinct image is encoded once, every question is embedded, and every sample is scored with
all its tokens, because Score(m_0) must be known before training starts (TPRL eq. 4). The work is
cut into units that are written atomically, so a killed process loses at most one unit.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tprl_env.data.features.arrow import ArrowRows, write_arrow
from tprl_env.data.features.journal import Journal, Skipped, UnitEntry, unit_names
from tprl_env.data.features.manifest import JOURNAL_NAME, StoreError, describe_file, trusting
from tprl_env.data.features.placement import StoredVisual
from tprl_env.data.features.rows import (
    ImageRow,
    SampleRow,
    image_batch,
    read_visual,
    sample_batch,
)
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.graders import GRADED_TOKENS, GRADERS
from tprl_env.data.sample import Sample
from tprl_env.files import folder_lock
from tprl_env.lvlm.encoding.bad_samples import (
    Texts,
    check_context,
    finish,
    leaving_out,
    tokenise,
    warn_of_low_scores,
)
from tprl_env.lvlm.encoding.units import (
    SkippingReader,
    Unit,
    check_unit,
    count_samples,
    describe_dataset,
    plan_units,
)
from tprl_env.lvlm.picture_sets import joined_visual

if TYPE_CHECKING:
    import pyarrow as pa

    from tprl_env.lvlm.protocol import LVLM, Visual

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
VisualOf = Callable[[int], StoredVisual]


def write_unit(
    lvlm: LVLM,
    unit: Unit,
    folder: Path,
    batch_size: int,
    tower: bool,
    earlier: VisualOf,
    skip_bad: bool = False,
    grade: int = 0,
) -> UnitEntry:
    """Encode one unit and write its two files.

    Args:
        lvlm: The model.
        unit: The work.
        folder: The store.
        batch_size: Images, and questions, per call of the LVLM.
        tower: Store the vision-tower features too.
        earlier: Gives images from earlier units.
        skip_bad: Leave out samples that the LVLM cannot be asked; the entry lists them.
        grade: Longest answer that is written and graded; 0 writes none.

    Raises:
        StoreError: A value is not finite or has the wrong shape; the sample is named.
        BadSampleError: The LVLM cannot be asked a sample and ``skip_bad`` is off.
        OSError: The disk is full.
    """
    image_file, sample_file = (folder / name for name in unit_names(unit.number))
    skipped: list[Skipped] = []
    texts: dict[int, Texts] = {}
    for i, sample in enumerate(unit.samples):  # before any image is encoded
        with leaving_out(skipped, skip_bad):
            texts[i] = tokenise(lvlm, sample)
    first = _encode_images(lvlm, unit.new[:batch_size], tower)
    schema = image_batch(first).schema

    def image_batches() -> Iterator[pa.RecordBatch]:
        if first:
            yield image_batch(first)
        for start in range(batch_size, len(unit.new), batch_size):
            yield image_batch(_encode_images(lvlm, unit.new[start : start + batch_size], tower))

    image_rows = write_arrow(image_file, schema, image_batches())
    written = ArrowRows([image_file], [image_rows])

    def visual_of(image: int) -> StoredVisual:
        if image < unit.first_image:
            return earlier(image)
        return read_visual(written, image - unit.first_image, lvlm.token_width)

    rows: list[SampleRow] = []
    counts: list[int] = []
    asked = list(texts)
    for part in (asked[at : at + batch_size] for at in range(0, len(asked), batch_size)):
        visuals: dict[int, StoredVisual] = {}
        for i in part:
            visual = visual_of(unit.images[i])
            with leaving_out(skipped, skip_bad):
                texts[i] = tokenise(lvlm, unit.samples[i], visual, texts[i])
                check_context(lvlm, unit.samples[i], texts[i], len(visual.tokens))
                visuals[i] = visual
        rows += _encode_samples(lvlm, unit, visuals, texts, grade)
        counts += [int(visual.droppable.sum()) for visual in visuals.values()]
    batch = sample_batch(rows, counts)
    sample_rows = write_arrow(sample_file, batch.schema, [batch])
    return UnitEntry(
        describe_file(image_file, image_rows),
        describe_file(sample_file, sample_rows),
        unit.dataset,
        tuple(skipped),
    )


def _encode_images(lvlm: LVLM, first: Sequence[Sample], tower: bool) -> list[ImageRow]:
    if not first:
        return []
    encoded = iter(lvlm.encode_images([image for sample in first for image in sample.images]))
    rows = []
    for sample in first:
        visual = joined_visual([next(encoded) for _ in sample.images], sample.images)
        tokens = to_numpy(visual.tokens)
        if tokens.ndim != 2 or tokens.shape[1] != lvlm.token_width:
            raise StoreError(
                f"image {sample.image_id!r}: the LVLM gave tokens of shape {tokens.shape}, its "
                f"token width is {lvlm.token_width}"
            )
        rows.append(_image_row(sample, visual, tokens, tower))
    return rows


def _image_row(sample: Sample, visual: Visual, tokens: npt.NDArray[Any], tower: bool) -> ImageRow:
    """One image, its tokens that are always kept apart from the others."""
    # LVLMs of one grid that see whole pictures need not know of boxes and placements
    box, placement = getattr(visual, "box", None), getattr(visual, "placement", None)
    shown = np.ones(len(tokens), bool) if placement is None else placement.droppable
    features = to_numpy(visual.tower) if tower and visual.tower is not None else None
    if features is not None and features.shape[1:] == (0,):  # the LVLM hands out none
        features = None
    attention = None if visual.cls_attention is None else to_numpy(visual.cls_attention)
    return ImageRow(
        sample.image_id,
        sample.image,
        tokens[shown] if not shown.all() else tokens,
        features if features is None or shown.all() else features[shown],
        attention if attention is None or shown.all() else attention[shown],
        (int(visual.grid[0]), int(visual.grid[1])),
        box,
        placement,
        None if shown.all() else tokens[~shown],
        getattr(visual, "placeholder", ""),
        sample.more_images,
    )


def _encode_samples(
    lvlm: LVLM,
    unit: Unit,
    visuals: Mapping[int, StoredVisual],
    texts: Mapping[int, Texts],
    grade: int,
) -> list[SampleRow]:
    """Score those samples of a unit that ``visuals`` names by their place."""
    if not visuals:
        return []
    prompts, answers = zip(*(texts[i] for i in visuals), strict=True)
    tokens = [visual.tokens for visual in visuals.values()]
    scores = lvlm.score(prompts, answers, tokens, None)
    written = lvlm.generate(prompts, tokens, None, grade) if grade else []
    exact, likelihood = to_numpy(scores.exact), to_numpy(scores.likelihood)
    return [
        SampleRow(
            sample=unit.samples[i],
            image=unit.images[i],
            prompt_ids=prompts[row].ids,
            visual_at=prompts[row].visual_at,
            question_span=prompts[row].question_span,
            answer_ids=answers[row],
            query_tokens=to_numpy(lvlm.question_embeddings(prompts[row])),
            exact=float(exact[row]),
            likelihood=float(likelihood[row]),
            graded=_graded(unit.samples[i], written[row]) if grade else None,
        )
        for row, i in enumerate(visuals)
    ]


def _graded(sample: Sample, text: str) -> float:
    return GRADERS[sample.grader](text, sample.answers)


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """Return an array or a tensor (any device, bfloat16 too) as a numpy array."""
    if hasattr(values, "detach"):
        return np.asarray(values.detach().float().cpu().numpy())
    return np.asarray(values)


def lvlm_identity(lvlm: LVLM) -> dict[str, Any]:
    """Return what decides whether two LVLMs give the same features.

    A GPU counts by the number type that it takes by default.
    """
    return {
        "name": lvlm.name,
        "fingerprint": lvlm.fingerprint,
        "model_type": str(getattr(lvlm, "model_type", "")),
        "token_width": lvlm.token_width,
        "query_width": lvlm.query_width,
        "dtype": str(lvlm.dtype).removeprefix("torch."),
        "image_backend": lvlm.image_backend,
    }


def unit_settings(tower: bool, shard_images: int, grade: bool) -> dict[str, Any]:
    """What a store's units depend on; ``grade`` is the longest graded answer, if any."""
    found: dict[str, Any] = {"tower": tower, "shard_images": shard_images}
    return found | {"grade": GRADED_TOKENS} if grade else found


def check_sizes(batch_size: int, shard_images: int) -> None:
    """Refuse sizes below one.

    Raises:
        ValueError: One of them is.
    """
    for name, value in (("batch_size", batch_size), ("shard_images", shard_images)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@contextmanager
def full_disk_as_store_error(folder: Path) -> Iterator[None]:
    """Turn a full disk into one clear sentence; other errors pass through.

    Raises:
        StoreError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreError(
            f"the disk of {folder} is full ({error.strerror}); free some space and run the same "
            f"command again, it continues where it stopped"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Be the only writer of a store's folder, and leave no folder behind for nothing.

    A folder that a failed encoding made but committed nothing to is removed; what was committed
    stays, because the same call continues it.

    Raises:
        FolderInUseError: Another process encodes into the folder.
    """
    made = not folder.exists()
    with folder_lock(folder, "tprl encode"):
        finished = False
        try:
            yield
            finished = True
        finally:
            if made and not (finished or (folder / JOURNAL_NAME).exists()):
                # a worker may still be writing there: the error that is on its way says more
                shutil.rmtree(folder, ignore_errors=True)


@trusting
def encode_dataset(
    lvlm: LVLM,
    samples: Iterable[Sample],
    out: str | Path,
    *,
    batch_size: int = 64,
    tower: bool = True,
    shard_images: int = 256,
    resume: bool = True,
    skip_bad: bool = False,
    progress: bool = True,
    description: str | Mapping[str, Any] | None = None,
    trust: bool = False,
    grade: bool = False,
) -> FeatureStore:
    """Encode samples into a feature store, continuing an interrupted run.

    Args:
        lvlm: The model.
        samples: Read once, in order; the same ones in the same order continue a run, and more
            of them behind those extend it.
        out: Folder of the store: new, empty, or holding an encoding of these samples or
            of the first of them.
        batch_size: Images, and questions, per call of the LVLM.
        tower: Store the vision-tower features too (some pruners need them).
        shard_images: Images per file; at most one file is lost when the process is killed.
        resume: Continue what is in ``out``; ``False`` removes it and starts over.
        skip_bad: Leave out samples that cannot be read, whose grader is not computed, or that the
            LVLM cannot be asked; they are counted, and listed in the store's ``skipped.jsonl``.
        progress: Show a progress bar.
        description: Names the dataset in the manifest; by default the samples' own.
        trust: Compare sizes of files there already, not their checksums (``--trust``).
        grade: Also write answers and grade them by each sample's grader, which the score kind
            "graded" needs.

    Returns:
        The finished store; at once if ``out`` holds these samples already.

    Raises:
        StoreError: ``out`` holds something else (another LVLM, samples, settings), a value is
            not finite, there are no samples, or the disk is full. What was committed stays
            resumable, a new folder without anything committed goes.
        BadSampleError: A sample cannot be read or asked, or wants a grader that is not computed,
            and ``skip_bad`` is off.
        FolderInUseError: Another process encodes into ``out``.
        ValueError: A size is below one.
    """
    check_sizes(batch_size, shard_images)
    folder = Path(out)
    settings = unit_settings(tower, shard_images, grade)
    reader = SkippingReader(samples, skip_bad, grade)
    total = count_samples(samples)
    with writing(folder), full_disk_as_store_error(folder):
        dataset = describe_dataset(description, samples)
        journal = Journal.start(folder, dataset, settings, resume=resume)
        journal.identify(lvlm_identity(lvlm))
        units = 0
        with tqdm(total=total, unit=" samples", desc="encode", disable=not progress) as bar:
            for unit in plan_units(reader, shard_images, journal.cuts):
                if unit.number < len(journal.units):
                    check_unit(journal, unit)
                else:
                    earlier = _earlier_visuals(journal, lvlm.token_width)
                    longest = settings.get("grade", 0)
                    work = (lvlm, unit, folder, batch_size, tower, earlier, skip_bad, longest)
                    journal.commit(write_unit(*work))
                units += 1
                bar.update(len(unit.samples))
        finish(journal, units, reader)
    store = FeatureStore.open(folder, lvlm_fingerprint=lvlm.fingerprint)
    warn_of_low_scores(store, lvlm)
    return store


def _earlier_visuals(journal: Journal, width: int) -> VisualOf:
    opened: list[ArrowRows] = []

    def visual(image: int) -> StoredVisual:
        # Opened on the first use: most datasets ask about an image in one go.
        if not opened:
            opened.append(journal.rows(0))
        return read_visual(opened[0], image, width)

    return visual
