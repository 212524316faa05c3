"""Pictures and text of pruning episodes: what was kept, what the LVLM scored (TPRL fig. 4).

Only numpy and Pillow. A frame has the same size for every sample, so that frames make a video.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from tprl_env.env.episodes import Episodes

__all__ = ["TrajectoryStep", "draw_step", "draw_text", "draw_trajectory", "episode_frame"]

Picture = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER = (250, 250, 248)
_INK = (32, 33, 36)
_FAINT = (110, 114, 120)
_KEPT_EDGE = (255, 140, 0)
_GRID = np.array([128, 128, 128], np.float32)
_FADED = 240.0  # grey level that pruned tokens are blended towards
_FADE = 0.78  # how far
_GRID_OPACITY = 0.22
_HATCH = 0.11  # darkening of the stripes that tell pruned tokens from pale kept ones
_SMALLEST = 120  # pixels; captions do not fit into less


@dataclass(frozen=True)
class TrajectoryStep:
    """One panel of a trajectory.

    Attributes:
        alive: bool (n,), tokens kept at this step, row by row of the grid.
        score: Score(m_t) in [0, 1], or None where the step was not scored.
        answer: what the LVLM answered from these tokens, or None.
    """

    alive: NDArray[np.bool_]
    score: float | None = None
    answer: str | None = None


def draw_step(
    picture: ArrayLike,
    grid: tuple[int, int],
    alive: ArrayLike,
    *,
    step: int,
    score: float | None,
    kept: int,
    question: str,
    answer: str | None = None,
    size: int = 480,
) -> Picture:
    """Draw one step: the picture with pruned tokens faded, and a caption.

    Args:
        picture: uint8 (H, W, 3).
        grid: rows and columns of the visual tokens.
        alive: bool (rows * columns,), True = kept.
        step: steps taken, 0 before the first.
        score: Score(m_t) in [0, 1], or None where it is not known.
        kept: number of kept tokens to print.
        question: the question, cut after two lines.
        answer: reference answer, or None.
        size: side of the picture area in pixels, at least 120.

    Returns:
        uint8 (size + caption, size, 3); the caption's height depends on ``size`` alone.

    Raises:
        ValueError: if the picture is not RGB uint8, the mask does not fill the grid, or the size
            is too small.
    """
    mask = _check_mask(grid, alive)
    area = _token_picture(_check_picture(picture), mask, (_check_size(size), size))
    font, small = _font(size / 26), _font(size / 30)
    line = _line_height(font)
    canvas = Image.new("RGB", (size, size + 5 * line), _PAPER)
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
    if answer is not None:
        text = _wrap(draw, f"reference answer: {answer}", small, size - 2 * margin, lines=1)[0]
        draw.text((margin, top + int((1.4 + len(rows)) * line)), text, _FAINT, small)
    return np.asarray(canvas)


def draw_trajectory(
    picture: ArrayLike,
    grid: tuple[int, int],
    steps: Sequence[TrajectoryStep],
    *,
    question: str,
    answer: str | None = None,
    size: int = 280,
    columns: int | None = None,
) -> Picture:
    """Draw a whole episode as panels side by side (the content of TPRL fig. 4).

    Text is at least 12 pixels high where five panels in a row are shown 1040 pixels wide.

    Args:
        picture: uint8 (H, W, 3).
        grid: rows and columns of the visual tokens.
        steps: the states T = 0, 1, ... in order; the first usually holds all tokens.
        question: printed once above the panels.
        answer: reference answer, printed beside the question, or None.
        size: side of one panel in pixels, at least 120.
        columns: panels in a row, then the next row begins; all in one row by default.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: as `draw_step`, or if there are no steps.
    """
    if not steps:
        raise ValueError("steps must hold at least one step, got none")
    rgb = _check_picture(picture)
    masks = [_check_mask(grid, part.alive) for part in steps]
    panel = min(_check_size(size), max(round(size * rgb.shape[0] / rgb.shape[1]), 1))
    areas = [_token_picture(rgb, mask, (panel, size)) for mask in masks]
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
    top = gap + len(header) * line + gap // 2
    captions = 2 + any(part.answer is not None for part in steps)
    row_height = panel + captions * line + gap
    rows = -(-len(steps) // across)
    canvas = Image.new("RGB", (width, top + rows * row_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (text, colour) in enumerate(header):
        draw.text((gap, gap // 2 + number * line), text, colour, font)
    for number, (part, mask, area) in enumerate(zip(steps, masks, areas, strict=True)):
        left, above = gap + number % across * (size + gap), top + number // across * row_height
        canvas.paste(Image.fromarray(area), (left, above))
        centre, below = left + size // 2, above + panel + gap // 3
        _centred(draw, (centre, below), f"T = {number}     {_score_text(part.score)}", font)
        texts = [_count_text(int(mask.sum()), mask.size)]
        if part.answer is not None:
            texts.append(_wrap(draw, f"answers: {part.answer}", small, size, lines=1)[0])
        for row, text in enumerate(texts, start=1):
            _centred(draw, (centre, below + row * line), text, small, _FAINT)
    return np.asarray(canvas)


def draw_text(
    grid: tuple[int, int],
    alive: ArrayLike,
    *,
    step: int,
    score: float | None,
    kept: int,
    question: str,
    answer: str | None = None,
) -> str:
    """Draw one step as text: ``#`` for kept, ``.`` for pruned tokens; arguments as `draw_step`."""
    mask = _check_mask(grid, alive)
    rows = ["".join("#" if cell else "." for cell in row) for row in mask]
    head = f"step {step}  {_score_text(score)}  {_count_text(kept, mask.size)}"
    lines = [head, *textwrap.wrap(question, 80)]
    if answer is not None:
        lines.append(f"reference answer: {answer}")
    return "\n".join([*lines, *rows]) + "\n"


def episode_frame(episodes: Episodes, slot: int, mode: str) -> Any:
    """Draw the present state of one running episode.

    Args:
        episodes: the state of an environment.
        slot: which of its episodes.
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
    if mode == "ansi":
        return draw_text(grid, alive, **common)
    return draw_step(source.picture(sample), grid, alive, **common)


def _token_picture(picture: Picture, mask: NDArray[np.bool_], area: tuple[int, int]) -> Picture:
    """The picture centred on (height, width), pruned tokens faded, kept regions outlined."""
    height, width = picture.shape[:2]
    scale = min(area[0] / height, area[1] / width)
    shape = max(round(height * scale), 1), max(round(width * scale), 1)
    # Tiny pictures are diagrams whose pixels mean something; others look better smoothed.
    method = Image.Resampling.NEAREST if max(height, width) <= 64 else Image.Resampling.BICUBIC
    large = Image.fromarray(picture).resize((shape[1], shape[0]), method)
    pixels = np.asarray(large, np.float32)
    rows = np.arange(shape[0]) * mask.shape[0] // shape[0]
    columns = np.arange(shape[1]) * mask.shape[1] // shape[1]
    kept = mask[rows[:, None], columns[None, :]]
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    faded = (1 - _FADE) * grey + _FADE * _FADED
    period, stroke = max(area[1] // 60, 4), max(area[1] // 240, 1)
    stripes = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % period < stroke
    faded *= 1 - _HATCH * stripes
    shown = np.where(kept[..., None], pixels, faded[..., None])
    lines = np.zeros(shape, bool)
    lines[1:] |= (np.diff(rows) > 0)[:, None]
    lines[:, 1:] |= (np.diff(columns) > 0)[None, :]
    shown[lines] += _GRID_OPACITY * (_GRID - shown[lines])
    shown[_outline(kept, stroke)] = _KEPT_EDGE
    canvas = np.full((*area, 3), _PAPER, np.uint8)
    top, left = (area[0] - shape[0]) // 2, (area[1] - shape[1]) // 2
    canvas[top : top + shape[0], left : left + shape[1]] = np.rint(shown).astype(np.uint8)
    return canvas


def _outline(kept: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Pixels inside kept regions within ``width`` of a pruned pixel."""
    inner = kept.copy()
    for _ in range(width):
        padded = np.pad(inner, 1, constant_values=True)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return kept & ~inner


def _check_picture(picture: ArrayLike) -> Picture:
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"picture must be uint8 (H, W, 3), got {array.dtype}{array.shape}")
    return array


def _check_mask(grid: tuple[int, int], alive: ArrayLike) -> NDArray[np.bool_]:
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
