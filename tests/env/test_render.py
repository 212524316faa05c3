"""Pictures: sizes, what is faded, captions that fit, and bad input."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tprl_env.env.render import TrajectoryStep, _font, _wrap, draw_step, draw_text, draw_trajectory

RED = np.full((96, 96, 3), (200, 0, 0), np.uint8)
CAPTION = {"step": 1, "score": 0.5, "kept": 72, "question": "Which digit is left of it?"}


def centre(image, grid, token, size):
    row, column = divmod(token, grid[1])
    y, x = (int((i + 0.5) * size / n) for i, n in zip((row, column), grid, strict=True))
    return image[y, x].astype(int)


@pytest.mark.parametrize(
    ("side", "tokens_per_side", "size"),
    [(96, 12, 480), (336, 24, 480), (96, 12, 200), (12, 3, 240)],
)
def test_kept_tokens_keep_their_colour_and_pruned_ones_lose_it(side, tokens_per_side, size):
    picture = np.full((side, side, 3), (200, 0, 0), np.uint8)
    grid = (tokens_per_side, tokens_per_side)
    alive = np.arange(tokens_per_side**2) % 3 == 0
    image = draw_step(picture, grid, alive, **{**CAPTION, "size": size})
    assert image.dtype == np.uint8 and image.shape[1:] == (size, 3) and image.shape[0] > size
    for token in (0, 1, 2, tokens_per_side**2 - 1):
        pixel = centre(image, grid, token, size)
        if alive[token]:
            assert pixel.tolist() == [200, 0, 0]
        else:
            assert np.ptp(pixel) <= 1 and pixel[0] > 150


def test_frame_size_does_not_depend_on_the_content():
    shapes = {
        draw_step(picture, (2, 3), np.ones(6, bool), **{**CAPTION, "question": question}).shape
        for picture in (RED, RED[:30], RED[:, :20])
        for question in ("Why?", "word " * 90, "unbroken" * 40)
    }
    assert len(shapes) == 1


def test_wide_pictures_are_centred():
    image = draw_step(RED[:48], (6, 12), np.ones(72, bool), **{**CAPTION, "size": 240})
    assert image[30, 120].min() > 240 and image[125, 125].tolist() == [200, 0, 0]


def test_captions_say_what_was_given():
    alive = np.ones(144, bool)
    plain = draw_step(RED, (12, 12), alive, **CAPTION)
    for change in ({"score": None}, {"kept": 71}, {"step": 2}, {"answer": "7"}):
        assert not np.array_equal(plain, draw_step(RED, (12, 12), alive, **{**CAPTION, **change}))


def test_text_is_cut_with_an_ellipsis_and_fits():
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), _font(18)
    rows = _wrap(draw, "many short words " * 30, font, 300, lines=2)
    assert len(rows) == 2 and rows[1].endswith("…")
    assert all(draw.textlength(row, font) <= 300 for row in rows)
    assert _wrap(draw, "one  two\nthree", font, 300, lines=2) == ["one two three"]
    assert _wrap(draw, "", font, 300, lines=2) == [""]
    assert "".join(_wrap(draw, "x" * 50, font, 300, lines=9)) == "x" * 50


def test_a_trajectory_has_its_panels_side_by_side():
    steps = [
        TrajectoryStep(np.ones(144, bool), 0.9, "7"),
        TrajectoryStep(np.arange(144) < 36, None, "7"),
        TrajectoryStep(np.arange(144) < 12, 0.2, "3"),
    ]
    common = {"question": "Which digit?", "size": 200}
    image = draw_trajectory(RED, (12, 12), steps, answer="7", **common)
    single = draw_trajectory(RED, (12, 12), steps[:1], **common)
    gap = (image.shape[1] - 600) // 4
    assert image.shape[1] == 3 * 200 + 4 * gap and single.shape[1] == 200 + 2 * gap
    assert image.shape[0] > single.shape[0], "the reference answer has a line"
    coloured = (image.max(-1).astype(int) - image.min(-1) > 150).sum(0)
    shares = [coloured[gap + i * (200 + gap) :][:200].sum() / 200**2 for i in range(3)]
    np.testing.assert_allclose(shares, [1, 1 / 4, 1 / 12], atol=0.08)


def test_text_form():
    alive = np.array([True, False, True, True, False, False])
    text = draw_text((2, 3), alive, step=2, score=None, kept=3, question="Why?", answer="so")
    head = "step 2  not scored  3 of 6 tokens (50.0 %)"
    assert text == f"{head}\nWhy?\nreference answer: so\n#.#\n#..\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picture": RED[..., 0]}, r"picture must be uint8 \(H, W, 3\), got uint8\(96, 96\)"),
        ({"picture": RED / 255}, "got float64"),
        ({"alive": np.ones(143, bool)}, r"the 144 tokens of a 12 x 12 grid, got shape \(143,\)"),
        ({"size": 40}, "size must be at least 120 pixels, got 40"),
    ],
)
def test_refused_input(changes, message):
    arguments = {"picture": RED, "grid": (12, 12), "alive": np.ones(144, bool), **changes}
    with pytest.raises(ValueError, match=message):
        draw_step(**arguments, **CAPTION)


def test_a_trajectory_needs_steps():
    with pytest.raises(ValueError, match="at least one step"):
        draw_trajectory(RED, (12, 12), [], question="?")
