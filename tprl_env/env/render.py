"""Pictures and text of pruning episodes: what was kept, what the LVLM scored (TPRL fig. 4).

Only numpy and Pillow. A frame has the same size for every sample, so that frames make a video.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tprl_env.env.token_layers import Layer, layers_of, layers_text
from tprl_env.env.token_picture import (
    PAPER,
    Box,
    Picture,
    check_picture,
    cut_off,
    frame,
    layered_picture,
    sheet,
    token_picture,
)

if TYPE_CHECKING:
    from tprl_env.data.features.source import TokenSource
    from tprl_env.env.episodes import Episodes

__all__ = [
    "TrajectoryStep",
    "draw_step",
    "draw_text",
    "draw_trajectory",
    "drawn_picture",
    "episode_frame",
]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_INK = (32, 33, 36)
_FAINT = (110, 114, 120)
_SMALLEST = 120  # pixels; captions do not fit into less


@dataclass(frozen=True)
class TrajectoryStep:
    """One panel of a trajectory.

    Attributes:
        alive: bool (n,), tokens kept at this step, row by row of the grid.
        score: Score(m_t) in [0, 1], or None where the step was not scored.
        answer: What the LVLM answered from these tokens, or None.
    """

    alive: npt.NDArray[np.bool_]
    score: float | None = None
    answer: str | None = None


def draw_step(
    picture: npt.ArrayLike,
    grid: tuple[int, int],
    alive: npt.ArrayLike,
    *,
    step: int,
    score: float | None,
    kept: int,
    question: str,
    answer: str | None = None,
    size: int = 480,
    box: Box | None = None,
    layers: Sequence[Layer] | None = None,
) -> Picture:
    """Draw one step: the picture with pruned tokens faded, and a caption.

    Args:
        picture: uint8 (H, W, 3).
        grid: Rows and columns of the visual tokens.
        alive: bool (rows * columns,), True = kept.
        step: Steps taken, 0 before the first.
        score: Score(m_t) in [0, 1], or None where it is not known.
        kept: Number of kept tokens to print.
        question: The question, cut after two lines.
        answer: Reference answer, or None.
        size: Side of the picture area in pixels, at least 120.
        box: Part of the picture that the grid covers, (top, left, bottom, right) in its pixels;
            all of it where None. What lies outside is greyed.
        layers: Where tokens are that are no grid (`layers_of`); a panel each, the tiles first.

    Returns:
        uint8 (size + caption, size, 3); the caption's height depends on ``size`` alone.

    Raises:
        ValueError: If the picture is not RGB uint8, the mask does not fill the grid, or the size
            is too small.
    """
    mask = _check_mask(grid, alive)
    rgb = check_picture(picture)
    area = _area(rgb, mask, (_check_size(size), size), box, layers)
    font, small = _font(size / 26), _font(size / 30)
    line = _line_height(font)
    canvas = Image.new("RGB", (size, size + 5 * line), PAPER)
    canvas.paste(Image.fromarray(area), (0, 0))
    draw, margin = ImageDraw.Draw(canvas), line // 2
    top = size + line // 3
    draw.text((margin, top), f"step {step}", _INK, font)
    _centred(draw, (size // 2, top), _count_text(kept, mask.size), font)
    shown = _score_text(score)
    draw.text((size - margin - draw.textlength(shown, font), top), shown, _INK, font)
    rows = _wrap(draw, question, font, size - 2 * margin, lines=2)
    for number, text in enumerate(rows):
        draw.text((margin, top + int((1.3 + number) * line)), text, _INK, font)
    left: float = size - margin
    if share := cut_off(rgb.shape, box):
        note = f"grey: not seen ({100 * share:.0f} %)"
        left -= draw.textlength(note, small)
        draw.text((left, top + int(3.4 * line)), note, _FAINT, small)
        left -= margin
    if answer is not None:
        text = _wrap(draw, f"reference answer: {answer}", small, left - margin, lines=1)[0]
        draw.text((margin, top + int((1.4 + len(rows)) * line)), text, _FAINT, small)
    return np.asarray(canvas)


def draw_trajectory(
    picture: npt.ArrayLike,
    grid: tuple[int, int],
    steps: Sequence[TrajectoryStep],
    *,
    question: str,
    answer: str | None = None,
    size: int = 280,
    columns: int | None = None,
    box: Box | None = None,
    layers: Sequence[Layer] | None = None,
) -> Picture:
    """Draw a whole episode as panels side by side (the content of TPRL fig. 4).

    Text is at least 12 pixels high where five panels in a row are shown 1040 pixels wide.

    Args:
        picture: uint8 (H, W, 3).
        grid: Rows and columns of the visual tokens.
        steps: The states T = 0, 1, ... in order; the first usually holds all tokens.
        question: Printed once above the panels.
        answer: Reference answer, printed beside the question, or None.
        size: Side of one panel in pixels, at least 120.
        columns: Panels in a row, then the next row begins; all in one row by default.
        box: As in `draw_step`.
        layers: As in `draw_step`.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: As `draw_step`, or if there are no steps.
    """
    if not steps:
        raise ValueError("steps must hold at least one step, got none")
    rgb = check_picture(picture)
    masks = [_check_mask(grid, part.alive) for part in steps]
    top, left, bottom, right = frame(rgb.shape, box)
    panel = min(_check_size(size), max(round(size * (bottom - top) / (right - left)), 1))
    if layers is not None and len(layers) > 1:
        panel = size  # room for a panel per layer
    areas = [_area(rgb, mask, (panel, size), box, layers) for mask in masks]
    font, small = _font(size / 15), _font(size / 16)
    line = _line_height(font)
    gap = line // 2
    across = min(columns or len(steps), len(steps))
    width = across * (size + gap) + gap
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    header = [(text, _INK) for text in _wrap(probe, question, font, width - 2 * gap, lines=2)]
    if answer is not None:
        text = _wrap(probe, f"reference answer: {answer}", font, width - 2 * gap, lines=1)[0]
        header.append((text, _FAINT))
    if share := cut_off(rgb.shape, box):
        text = _wrap(probe, _unseen_text(share), font, width - 2 * gap, lines=1)[0]
        header.append((text, _FAINT))
    head = gap + len(header) * line + gap // 2
    captions = 2 + any(part.answer is not None for part in steps)
    row_height = panel + captions * line + gap
    rows = -(-len(steps) // across)
    canvas = Image.new("RGB", (width, head + rows * row_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (text, colour) in enumerate(header):
        draw.text((gap, gap // 2 + number * line), text, colour, font)
    for number, (part, mask, area) in enumerate(zip(steps, masks, areas, strict=True)):
        at, above = gap + number % across * (size + gap), head + number // across * row_height
        canvas.paste(Image.fromarray(area), (at, above))
        centre, below = at + size // 2, above + panel + gap // 3
        _centred(draw, (centre, below), f"T = {number}     {_score_text(part.score)}", font)
        texts = [_count_text(int(mask.sum()), mask.size)]
        if part.answer is not None:
            texts.append(_wrap(draw, f"answers: {part.answer}", small, size, lines=1)[0])
        for row, text in enumerate(texts, start=1):
            _centred(draw, (centre, below + row * line), text, small, _FAINT)
    return np.asarray(canvas)


def draw_text(
    grid: tuple[int, int],
    alive: npt.ArrayLike,
    *,
    step: int,
    score: float | None,
    kept: int,
    question: str,
    answer: str | None = None,
    unseen: float = 0.0,
    layers: Sequence[Layer] | None = None,
) -> str:
    """Draw one step as text: ``#`` for kept, ``.`` for pruned tokens; arguments as `draw_step`.

    ``unseen`` is the share of the picture that the grid does not cover.
    """
    mask = _check_mask(grid, alive)
    rows = ["".join("#" if cell else "." for cell in row) for row in mask]
    if layers is not None:
        rows = layers_text(layers, mask.ravel())
    head = f"step {step}  {_score_text(score)}  {_count_text(kept, mask.size)}"
    lines = [head, *textwrap.wrap(question, 80)]
    if answer is not None:
        lines.append(f"reference answer: {answer}")
    if unseen:
        lines.append(_unseen_text(unseen).removeprefix("grey: "))
    return "\n".join([*lines, *rows]) + "\n"


def episode_frame(episodes: Episodes, slot: int, mode: str) -> Any:
    """Draw the present state of one running episode.

    Args:
        episodes: The state of an environment.
        slot: Which of its episodes.
        mode: "rgb_array" for `draw_step`, "ansi" for `draw_text`.

    Returns:
        uint8 (H, W, 3), or a string.
    """
    source, sample = episodes.source, int(episodes.samples[slot])
    score = float(episodes.score[slot])
    grid = source.grid(sample)
    alive = episodes.alive[slot][episodes.existing[slot]]
    common: dict[str, Any] = {
        "step": int(episodes.step[slot]),
        "score": None if np.isnan(score) else score,
        "kept": int(alive.sum()),
        "question": source.question(sample),
        "answer": " / ".join(source.answers(sample)),
    }
    find = getattr(source, "picture_box", None)  # a source of somebody's own may lack it
    box = None if find is None else find(sample)
    picture, places = drawn_picture(source, sample)
    layers = common["layers"] = layers_of(source, sample, places)
    if layers is not None:
        box = None
    if mode == "ansi":
        unseen = 0.0 if box is None else cut_off(picture.shape, box)
        return draw_text(grid, alive, **common, unseen=unseen)
    return draw_step(picture, grid, alive, **common, box=box)


def drawn_picture(
    source: TokenSource, sample: int
) -> tuple[Picture, npt.NDArray[np.float32] | None]:
    """What a sample is drawn on: its picture, or its pictures on a sheet and where they lie."""
    find = getattr(source, "pictures", None)  # only stores have questions about several
    return (source.picture(sample), None) if find is None else sheet(find(sample))


def _area(
    picture: Picture,
    mask: npt.NDArray[np.bool_],
    area: tuple[int, int],
    box: Box | None,
    layers: Sequence[Layer] | None,
) -> Picture:
    """The picture with its mask, in one panel or one per layer."""
    if layers is None:
        return token_picture(picture, mask, area, box)
    return layered_picture(picture, mask.ravel(), layers, area)


def _check_mask(grid: tuple[int, int], alive: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """The mask as (rows, columns)."""
    array, (rows, columns) = np.asarray(alive), grid
    if array.shape != (rows * columns,) or array.size == 0:
        raise ValueError(
            f"alive must hold the {rows * columns} tokens of a {rows} x {columns} grid, "
            f"got shape {array.shape}"
        )
    return array.astype(bool).reshape(rows, columns)


def _check_size(size: int) -> int:
    if size < _SMALLEST:
        raise ValueError(f"size must be at least {_SMALLEST} pixels, got {size}")
    return size


def _font(height: float) -> Font:
    return ImageFont.load_default(size=max(height, 8.0))


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ag|")
    return int((bottom - top) * 1.35) + 1


def _unseen_text(share: float) -> str:
    return f"grey: cut off before the LVLM sees it ({100 * share:.0f} % of the picture)"


def _score_text(score: float | None) -> str:
    return "not scored" if score is None else f"score {score:.2f}"


def _count_text(kept: int, total: int) -> str:
    return f"{kept} of {total} tokens ({100 * kept / total:.1f} %)"


def _centred(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    font: Font,
    colour: tuple[int, int, int] = _INK,
) -> None:
    draw.text((place[0] - draw.textlength(text, font) / 2, place[1]), text, colour, font)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float, lines: int) -> list[str]:
    """Break text at spaces, or inside a word that is too long, and cut it after ``lines``."""
    rows, rest = [""], " ".join(text.split())
    while rest:
        word, _, rest = rest.partition(" ")
        longer = f"{rows[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            rows[-1] = longer
        elif not rows[-1]:
            fits = next(
                n
                for n in range(len(word), 0, -1)
                if n == 1 or draw.textlength(word[:n], font) <= width
            )
            rows[-1], rest = word[:fits], f"{word[fits:]} {rest}".strip()
            rows.append("")
        else:
            rows.append("")
            rest = f"{word} {rest}".strip()
    rows = [row for row in rows if row] or [""]
    if len(rows) > lines:
        rows = rows[:lines]
        while rows[-1] and draw.textlength(rows[-1] + "…", font) > width:
            rows[-1] = rows[-1][:-1]
        rows[-1] += "…"
    return rows
