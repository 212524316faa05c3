"""Pictures: sizes, what is faded, captions that fit, and bad input."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tprl_env.env.render import (
    TrajectoryStep,
    _font,
    _wrap,
    draw_step,
    draw_text,
    draw_trajectory,
    episode_frame,
)
from tprl_env.env.token_picture import cut_off, token_picture

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


# What the LVLM does not see -----------------------------------------------------------------

WIDE = np.full((64, 192, 3), (200, 0, 0), np.uint8)
MIDDLE = (0.0, 64.0, 64.0, 128.0)  # shortest edge, then the centre: two thirds are cut off


def colourful(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(-1).astype(int) - pixels.min(-1) > 150


def test_masks_are_drawn_where_the_tokens_look():
    mask = np.zeros((4, 4), bool)
    mask[:, 0] = True  # the left column of what is seen is not the left of the picture
    drawn = colourful(token_picture(WIDE, mask, (160, 480), MIDDLE))
    columns = np.flatnonzero(drawn.any(0))
    assert columns.min() in range(159, 163) and columns.max() in range(197, 201)
    assert drawn[:, 160:200].mean() > 0.9
    everywhere = token_picture(WIDE, mask, (160, 480))
    assert np.flatnonzero(colourful(everywhere).any(0)).max() < 121  # all of it is seen


def test_what_is_cut_off_is_grey_even_where_all_tokens_are_kept():
    image = token_picture(WIDE, np.ones((4, 4), bool), (160, 480), MIDDLE).astype(int)
    assert np.ptp(image[:, :160], axis=-1).max() <= 1 and np.ptp(image[:, 320:], axis=-1).max() <= 1
    assert image[80, 30, 0] < 160  # darker than what is pruned
    assert image[60, 180].tolist() == [200, 0, 0]


def test_padding_is_drawn_around_the_picture():
    square = (-64.0, 0.0, 128.0, 192.0)  # padded above and below
    mask = np.zeros((3, 3), bool)
    mask[1] = True
    drawn = colourful(token_picture(WIDE, mask, (300, 300), square))
    assert drawn[110:190].mean() > 0.9 and not drawn[:99].any() and not drawn[201:].any()
    assert cut_off(WIDE.shape, square) == 0
    huge = (-1e9, 0.0, 1e9, 192.0)  # from a forged store: no memory, no error
    assert token_picture(WIDE, mask, (300, 300), huge).shape == (300, 300, 3)


@pytest.mark.parametrize(
    ("box", "share"), [(None, 0), (MIDDLE, 2 / 3), ((0, 0, 64, 192), 0), ((16, -9, 48, 300), 1 / 2)]
)
def test_the_share_that_is_cut_off(box, share):
    assert cut_off(WIDE.shape, box) == pytest.approx(share)


def test_what_is_cut_off_is_mentioned_once():
    alive = np.ones(16, bool)
    plain = draw_step(WIDE, (4, 4), alive, **CAPTION)
    boxed = draw_step(WIDE, (4, 4), alive, **CAPTION, box=MIDDLE)
    assert boxed.shape == plain.shape  # frames make a video
    assert not np.array_equal(boxed[480:], plain[480:])
    assert np.array_equal(draw_step(WIDE, (4, 4), alive, **CAPTION, box=(0, 0, 64, 192)), plain)
    steps = [TrajectoryStep(alive, 0.9), TrajectoryStep(np.arange(16) < 4, 0.5)]
    one = draw_trajectory(WIDE, (4, 4), steps, question="Which?")
    two = draw_trajectory(WIDE, (4, 4), steps, question="Which?", box=MIDDLE)
    line = two.shape[0] - one.shape[0]
    assert 0 < line < 30, "one line for all panels"
    text = draw_text(
        (1, 2), np.ones(2, bool), step=0, score=1.0, kept=2, question="?", unseen=2 / 3
    )
    assert text.count("cut off before the LVLM sees it (67 % of the picture)") == 1


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
@pytest.mark.parametrize("box", [None, MIDDLE, "no such method"])
def test_frames_of_an_episode_know_the_box(mode: str, box: object):
    source = SimpleNamespace(
        grid=lambda s: (4, 4), question=lambda s: "?", answers=lambda s: ("a",),
        picture=lambda s: WIDE, picture_box=lambda s: box,
    )  # fmt: skip
    if isinstance(box, str):
        del source.picture_box
    whole = np.ones((1, 16), bool)
    zero = np.zeros(1, np.int64)
    episodes = SimpleNamespace(
        source=source, samples=zero, score=np.array([0.5]), alive=whole, existing=whole, step=zero
    )
    frame = episode_frame(episodes, 0, mode)
    if mode == "ansi":
        assert ("cut off" in frame) == (box is MIDDLE)
    else:
        assert colourful(frame[:480])[240, 40] == (box is not MIDDLE)
