"""Built-in scenes: tinted handwritten digits on photographs, with questions about cells.

A scene is a 96x96 image of 6x6 cells (16 px each, so 2x2 visual tokens of 8 px). Digits are real
scans (scikit-learn's ``load_digits``), warped and tinted; decoy glyphs and dimmed crops of the two
photographs that scikit-learn ships fill the rest. Rows are called ``a``-``f``, columns ``u``-``z``,
a cell is a row letter and a column letter ("cx"). Which visual tokens matter depends on the
question alone, so every sample knows its relevance without looking at the answer.

The splits share nothing: each has its own scans, band of the photographs and seed streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_choice, check_integer
from tprl_env.data.sample import Sample

CELL, GRID = 16, 6
SIZE = CELL * GRID  # pixels of one side
CELLS_PER_SCENE = GRID * GRID
TOKENS = 4 * CELLS_PER_SCENE  # visual tokens of 8x8 px, raster order
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (50, 80, 255),
    "yellow": (240, 225, 30),
    "purple": (170, 40, 220),
    "cyan": (30, 225, 230),
    "white": (245, 245, 245),
    "orange": (250, 135, 20),
}
COLOR_NAMES = tuple(COLORS)
DECOY, BACKGROUND, NO_COLOR = 10, 11, len(COLORS)  # classes 0-9 are the digits
ROWS, COLUMNS = "abcdef", "uvwxyz"
CELL_NAMES = tuple(row + column for row in ROWS for column in COLUMNS)
QUESTION_TYPES = ("at", "color", "rowcol", "exists", "larger", "read")
SPLITS = ("train", "calibration", "test")
TASKS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {  # digits, decoys per scene
    "crowded": ((16, 24), (0, 4)),
    "sparse": ((5, 8), (4, 8)),
}
SCANS = {"train": 1197, "calibration": 240, "test": 360}
PHOTO_BANDS = {"train": (0, 384), "calibration": (384, 512), "test": (512, 640)}
RELEVANT, RELATED = 10.0, 4.0  # asked cells; the other digits of an ``exists`` question's line
_WARPS = {"train": 12, "calibration": 4, "test": 4}
_BACKGROUNDS = {"train": 800, "calibration": 200, "test": 300}
_GLYPHS = {"train": 1000, "calibration": 300, "test": 400}
_SPLIT_SEED = 20240917
_CHUNK = 32

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Question:
    """One question about a scene.

    Attributes:
        question_type: One of `QUESTION_TYPES`.
        text: The question, words separated by blanks.
        answer: Reference answer, words separated by blanks.
        cells: Flat indices of the cells that answer it; empty for ``exists`` answered with "no".
        related: Flat indices of every digit of the line an ``exists`` question asks about.
    """

    question_type: str
    text: str
    answer: str
    cells: tuple[int, ...]
    related: tuple[int, ...] = ()

    @property
    def relevance(self) -> Floats:
        """Answer-blind relevance of every visual token, ``(144,)``."""
        scores: Floats = np.zeros(CELLS_PER_SCENE, np.float32)
        scores[list(self.related)] = RELATED
        scores[list(self.cells)] = RELEVANT
        grid: Floats = scores.reshape(GRID, GRID)
        return grid.repeat(2, axis=0).repeat(2, axis=1).reshape(-1)


def scan_indices(split: str) -> Ints:
    """Indices into ``load_digits()`` that belong to ``split``."""
    check_choice("split", split, SPLITS)
    order = np.random.default_rng(_SPLIT_SEED).permutation(sum(SCANS.values()))
    ends = np.cumsum([SCANS[name] for name in SPLITS])
    return np.split(order, ends[:-1])[SPLITS.index(split)]


def seed_sequence(task: str, split: str, seed: int, stream: int) -> np.random.SeedSequence:
    """Seed of one random stream; the spawn key keeps tasks, splits and streams apart."""
    key = (list(TASKS).index(task), SPLITS.index(split), stream)
    return np.random.SeedSequence(check_integer("seed", seed, 0), spawn_key=key)


def _warp(scan: npt.NDArray[np.float64], rng: np.random.Generator, distort: float) -> Floats:
    """Scale, rotate, shear, shift (and bend) one 8x8 scan into a cell, ``(16, 16)`` in [0, 1]."""
    from scipy import ndimage

    scale_y = CELL / 8.0 * rng.uniform(0.86, 1.02)
    scale_x = scale_y * rng.uniform(0.92, 1.08)
    angle, shear = rng.normal(0, 0.10 + 0.04 * distort), rng.normal(0, 0.08 + 0.04 * distort)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle) + shear, np.cos(angle)]]
    ) @ np.diag([1 / scale_y, 1 / scale_x])
    center = np.full(2, (CELL - 1) / 2) + rng.uniform(-1.3, 1.3, 2)
    grid = np.indices((CELL, CELL)).reshape(2, -1)
    points = turn @ (grid - center[:, None]) + 3.5
    if distort:
        coarse = rng.normal(0, 0.35 * distort, (2, 3, 3))
        points += ndimage.zoom(coarse, (1, CELL / 3, CELL / 3), order=1).reshape(2, -1)
    warped = ndimage.map_coordinates(scan, points, order=1).reshape(CELL, CELL)
    return np.clip(warped * 1.15, 0, 1).astype(np.float32)


def _glyph(rng: np.random.Generator) -> Floats:
    """Draw one decoy: box, cross, triangle, plus, bars or diamond, ``(16, 16)`` in [0, 1]."""
    from PIL import Image, ImageDraw

    side = 64
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    shape, width = int(rng.integers(6)), int(rng.integers(6, 11))
    left, top = (int(v) for v in rng.integers(6, 16, 2))
    right, bottom = (side - int(v) for v in rng.integers(6, 16, 2))
    mid_x, mid_y = (left + right) // 2, (top + bottom) // 2
    box, rising = [left, top, right, bottom], [left, bottom, right, top]
    if shape == 0:
        draw.rectangle(box, outline=255, width=width)
    elif shape == 2:
        draw.polygon([(mid_x, top), (right, bottom), (left, bottom)], outline=255, width=width)
    elif shape == 5:
        draw.polygon([(mid_x, top), (right, mid_y), (mid_x, bottom), (left, mid_y)], fill=255)
    else:
        bars = [[left, y, right, y] for y in range(10, 60, 20)]
        plus = [[32, top, 32, bottom], [left, 32, right, 32]]
        for line in {1: [box, rising], 3: plus, 4: bars}[shape]:
            draw.line(line, fill=255, width=width)
    small = image.resize((CELL, CELL), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32) / np.float32(255)


def _photo_crops(split: str, count: int, rng: np.random.Generator) -> Bytes:
    """Square crops from the split's band of the photographs, ``(count, 96, 96, 3)``."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    left, right = PHOTO_BANDS[split]
    bands = [photo[:, left:right] for photo in load_sample_images().images]
    crops = []
    for _ in range(count):
        band = bands[rng.integers(len(bands))]
        side = int(rng.integers(SIZE, min(band.shape[:2]) + 1))
        y = int(rng.integers(band.shape[0] - side + 1))
        x = int(rng.integers(band.shape[1] - side + 1))
        crop = Image.fromarray(band[y : y + side, x : x + side])
        crops.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    return np.stack(crops)


def _paint(cells: Floats) -> Floats:
    """Tile cell pictures ``(B, 36, 16, 16, C)`` into images ``(B, 96, 96, C)``."""
    grid = cells.reshape(len(cells), GRID, GRID, CELL, CELL, -1)
    return grid.swapaxes(2, 3).reshape(len(cells), SIZE, SIZE, -1)


class SceneWorld:
    """An endless, seeded source of scenes of one task and split.

    Args:
        task: Name in `TASKS`.
        split: Name in `SPLITS`.
        seed: Chooses the stream of scenes inside the split.
        digits: Least and most digits per scene; the task's own numbers by default.
        decoys: Least and most decoys per scene; the task's own numbers by default.
        warps: Warped versions kept of every scan; the split's default otherwise.
        distort: Extra bending of the digits, an augmentation for training; 0 for none.

    Raises:
        ValueError: Unknown task or split.
    """

    def __init__(
        self,
        task: str,
        split: str,
        seed: int = 0,
        *,
        digits: tuple[int, int] | None = None,
        decoys: tuple[int, int] | None = None,
        warps: int | None = None,
        distort: float = 0.0,
    ) -> None:
        from sklearn.datasets import load_digits

        check_choice("task", task, TASKS)
        check_choice("split", split, SPLITS)
        self.digits = digits or TASKS[task][0]
        self.decoys = decoys or TASKS[task][1]
        self.rng = np.random.default_rng(seed_sequence(task, split, seed, stream=0))
        scans, own, copies = load_digits(), scan_indices(split), warps or _WARPS[split]
        pictures = scans.images[own] / 16.0
        self._bank = np.stack(
            [_warp(p, self.rng, distort) for p in pictures for _ in range(copies)]
        )
        self._labels = np.repeat(scans.target[own], copies)
        self._glyphs = np.stack([_glyph(self.rng) for _ in range(_GLYPHS[split])])
        self._crops = _photo_crops(split, _BACKGROUNDS[split], self.rng)

    def batch(self, n: int) -> tuple[Bytes, Ints, Ints]:
        """Draw ``n`` scenes.

        Returns:
            Images ``(n, 96, 96, 3)``, classes ``(n, 6, 6)`` (0-9 digit, `DECOY`, `BACKGROUND`)
            and colours ``(n, 6, 6)`` (index into `COLOR_NAMES`, `NO_COLOR` on background).
        """
        rng, shape = self.rng, (n, CELLS_PER_SCENE)
        digits = rng.integers(self.digits[0], self.digits[1] + 1, (n, 1))
        decoys = rng.integers(self.decoys[0], self.decoys[1] + 1, (n, 1))
        rank = rng.random(shape).argsort(1)  # a random permutation of the cells
        is_digit, is_decoy = rank < digits, (rank >= digits) & (rank < digits + decoys)
        filled = is_digit | is_decoy
        picks = rng.integers(len(self._bank), size=int(is_digit.sum()))
        classes = np.full(shape, BACKGROUND, np.int64)
        classes[is_digit], classes[is_decoy] = self._labels[picks], DECOY
        colors = np.full(shape, NO_COLOR, np.int64)
        colors[filled] = rng.integers(len(COLORS), size=int(filled.sum()))
        alpha = np.zeros((*shape, CELL, CELL), np.float32)
        alpha[is_digit] = self._bank[picks]
        alpha[is_decoy] = self._glyphs[rng.integers(len(self._glyphs), size=int(is_decoy.sum()))]
        images = self._compose(alpha, colors, filled)
        square = (n, GRID, GRID)
        return images, classes.reshape(square), colors.reshape(square)

    def _compose(self, alpha: Floats, colors: Ints, filled: npt.NDArray[np.bool_]) -> Bytes:
        """Tint ``alpha`` (B, 36, 16, 16) and lay it on dimmed, perhaps mirrored photographs."""
        rng, n = self.rng, len(alpha)
        palette = np.array([*COLORS.values(), (0, 0, 0)], np.float32)
        tint = palette[colors] * rng.uniform(0.85, 1.05, (*colors.shape, 1))
        tint = np.clip(tint + rng.normal(0, 8, tint.shape), 0, 255) * filled[..., None]
        back = self._crops[rng.integers(len(self._crops), size=n)]
        mirrored = rng.random((n, 1, 1, 1)) < 0.5
        back = np.where(mirrored, back[:, :, ::-1], back).astype(np.float32)
        back = back * rng.uniform(0.30, 0.55, (n, 1, 1, 1)).astype(np.float32)
        cover = _paint(alpha[..., None])
        full = np.broadcast_to(tint[:, :, None, None].astype(np.float32), (*alpha.shape, 3))
        return np.clip(back * (1 - cover) + _paint(full) * cover, 0, 255).astype(np.uint8)


class _Asker:
    """Draws questions about one scene; classes and colours are ``(6, 6)``."""

    def __init__(self, classes: Ints, colors: Ints, rng: np.random.Generator) -> None:
        self.rng, self.classes, self.colors = rng, classes.reshape(-1), colors.reshape(-1)
        self.digits = np.flatnonzero(self.classes < 10)
        counts = np.zeros((2, GRID, len(COLORS)), np.int64)  # digits by axis, line, colour
        for axis, lines in enumerate(np.divmod(self.digits, GRID)):
            np.add.at(counts[axis], (lines, self.colors[self.digits]), 1)
        self.single = np.argwhere(counts == 1)
        self.absent, self.present = np.argwhere(counts == 0), np.argwhere(counts > 0)

    def ask(self, question_type: str) -> Question:
        if question_type in ("rowcol", "exists"):
            return self._line(question_type)
        wanted = {"at": 1, "color": 1, "larger": 2, "read": 3}[question_type]
        cells = [int(cell) for cell in self.rng.permutation(self.digits)[:wanted]]
        names, values = [CELL_NAMES[c] for c in cells], [int(self.classes[c]) for c in cells]
        if question_type == "at":
            text, answer = f"what digit is at {names[0]} ?", str(values[0])
        elif question_type == "color":
            text = f"what color is at {names[0]} ?"
            answer = COLOR_NAMES[self.colors[cells[0]]]
        elif question_type == "larger":
            text, answer = f"what is the larger of {names[0]} and {names[1]} ?", str(max(values))
        else:
            text, answer = f"read {' '.join(names)} ?", " ".join(map(str, values))
        return Question(question_type, text, answer, tuple(cells))

    def _line(self, question_type: str) -> Question:
        if question_type == "rowcol" and not len(self.single):
            return self.ask("at")  # no colour is alone in a line: such a scene is very rare
        pool = self.single
        if question_type == "exists":
            pool = self.present if self.rng.random() < 0.5 else self.absent
        axis, line, color = (int(v) for v in pool[self.rng.integers(len(pool))])
        places = self.digits // GRID if axis == 0 else self.digits % GRID
        related = self.digits[places == line]
        cells = related[self.colors[related] == color]
        where = f"row {ROWS[line]}" if axis == 0 else f"column {COLUMNS[line]}"
        name, asked = COLOR_NAMES[color], tuple(int(c) for c in cells)
        if question_type == "rowcol":
            answer = str(self.classes[asked[0]])
            return Question(question_type, f"what digit is {name} in {where} ?", answer, asked)
        text, answer = f"is there a {name} digit in {where} ?", "yes" if asked else "no"
        return Question(question_type, text, answer, asked, tuple(int(c) for c in related))


def ask(
    classes: Ints,
    colors: Ints,
    n: int,
    rng: np.random.Generator,
    question_types: Sequence[str] | None = None,
) -> list[Question]:
    """Draw ``n`` questions about one scene.

    Args:
        classes: ``(6, 6)`` classes.
        colors: ``(6, 6)`` colours.
        n: Number of questions.
        rng: Source of randomness.
        question_types: Type of each question, repeated as often as needed; drawn by default.

    Raises:
        ValueError: Unknown question_type, or fewer than three digits in the scene.
    """
    asker = _Asker(classes, colors, rng)
    if len(asker.digits) < 3:
        raise ValueError(
            f"a scene needs at least 3 digits to be asked about, got {len(asker.digits)}"
        )
    if question_types is None:
        question_types = [QUESTION_TYPES[k] for k in rng.integers(len(QUESTION_TYPES), size=n)]
    for question_type in question_types:
        check_choice("question_types", question_type, QUESTION_TYPES)
    return [asker.ask(question_types[i % len(question_types)]) for i in range(n)]


def load_scenes(
    task: str, split: str, scenes: int, questions_per_scene: int = 6, seed: int = 0
) -> list[Sample]:
    """Build the samples of a split, every question type equally often as far as possible.

    Fully determined by the arguments; asking for more scenes keeps the earlier ones as they are.

    Args:
        task: Name in `TASKS`.
        split: Name in `SPLITS`.
        scenes: Number of images.
        questions_per_scene: Number of questions about each image.
        seed: Chooses other scenes of the same split.

    Raises:
        ValueError: Unknown task or split, or a number below one.
    """
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLITS)
    for name, value in (("scenes", scenes), ("questions_per_scene", questions_per_scene)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    world, samples = SceneWorld(task, split, seed), []
    rng = np.random.default_rng(seed_sequence(task, split, seed, stream=1))
    stem = f"{task}-{split}" + (f"-seed{seed}" if seed else "")
    for start in range(0, scenes, _CHUNK):
        images, classes, colors = world.batch(_CHUNK)
        for i in range(min(_CHUNK, scenes - start)):
            image_id, first = f"{stem}-{start + i:05d}", (start + i) * questions_per_scene
            question_types = [
                QUESTION_TYPES[(first + j) % len(QUESTION_TYPES)]
                for j in range(questions_per_scene)
            ]
            for j, asked in enumerate(
                ask(classes[i], colors[i], len(question_types), rng, question_types)
            ):
                sample = Sample(
                    id=f"{image_id}-{j}",
                    image=images[i],
                    question=asked.text,
                    answers=(asked.answer,),
                    image_id=image_id,
                    question_type=asked.question_type,
                    relevance=asked.relevance,
                )
                samples.append(sample)
    return samples
