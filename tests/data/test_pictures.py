"""Pictures of every mode and format: the right values, or one sentence and no hang."""

import io
import os
import re
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from tprl_env.data import pictures
from tprl_env.data.pictures import FORMATS, MAX_PIXELS, PictureError, as_picture, read_picture

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))  # grey, mean 127.5
ALPHA = np.repeat([[0, 255]], 128, axis=1).repeat(4, 0).astype(np.uint8)  # left half is clear
CLEAR = np.where(ALPHA == 0, 255, RAMP)  # what a ramp with that alpha is over white


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def grey(values: np.ndarray, mode: str) -> Image.Image:
    """A PIL image of a mode that holds `values`, which numpy's types do not tell apart."""
    return Image.frombytes(mode, values.shape[::-1], values.tobytes())


def with_alpha(mode: str) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]).convert(mode)


def palette(transparency: int | bytes | None) -> Image.Image:
    """A picture whose left half is entry 0 (a dark red) and whose right half is a green."""
    image = Image.fromarray((ALPHA // 255).astype(np.uint8), "P")
    image.putpalette([90, 0, 0, 0, 120, 0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 4), colour)


def lab(colour: tuple[int, int, int]) -> Image.Image:
    srgb, profile = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(flat("RGB", colour), srgb, profile, outputMode="LAB")


RAMP16 = (RAMP.astype(np.uint16) * 257).astype("<u2")
GREY = [127.5] * 3
OVER_WHITE = [float(CLEAR.mean())] * 3
RED, GREEN, WHITE = [90, 0, 0], [0, 120, 0], [255, 255, 255]


def halves(left: list, right: list) -> list[float]:
    return [(a + b) / 2 for a, b in zip(left, right, strict=True)]


MODES = {
    "1": (Image.fromarray(RAMP > 127), GREY),
    "L": (Image.fromarray(RAMP), GREY),
    "LA": (with_alpha("LA"), OVER_WHITE),
    "La": (with_alpha("LA").convert("La"), OVER_WHITE),
    "P": (palette(None), halves(RED, GREEN)),
    "P, one clear entry": (palette(0), halves(WHITE, GREEN)),
    "P, half clear entries": (palette(bytes([255, 0])), halves(RED, WHITE)),
    "PA": (with_alpha("RGBA").convert("PA"), OVER_WHITE),
    "RGB": (flat("RGB", (10, 20, 30)), [10, 20, 30]),
    "RGBX": (flat("RGBX", (10, 20, 30, 0)), [10, 20, 30]),
    "RGBA": (with_alpha("RGBA"), OVER_WHITE),
    "RGBa": (with_alpha("RGBA").convert("RGBa"), OVER_WHITE),
    "CMYK": (flat("CMYK", (255, 0, 0, 0)), [0, 255, 255]),
    "YCbCr": (flat("RGB", (200, 30, 60)).convert("YCbCr"), [200, 30, 60]),
    "LAB": (lab((200, 30, 60)), [200, 30, 60]),
    "HSV": (flat("RGB", (200, 30, 60)).convert("HSV"), [200, 30, 60]),
    "I": (grey(RAMP.astype("<i4"), "I"), GREY),
    "I, 16 bits": (grey(RAMP16.astype("<i4"), "I"), GREY),
    "I;16": (grey(RAMP16, "I;16"), GREY),
    "I;16L": (grey(RAMP16, "I;16L"), GREY),
    "I;16B": (grey(RAMP16.astype(">u2"), "I;16B"), GREY),
    "F": (Image.fromarray(RAMP.astype(np.float32)), GREY),
    "F, 0..1": (Image.fromarray(RAMP.astype(np.float32) / 255), GREY),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_its_right_mean(name: str):
    image, mean = MODES[name]
    assert image.mode == name.partition(",")[0]
    taken = as_picture(image)
    assert taken.dtype == np.uint8 and taken.shape == (image.height, image.width, 3)
    np.testing.assert_allclose(taken.mean((0, 1)), mean, atol=2 if "YCbCr" not in name else 3)


def test_every_mode_of_pillow_is_in_the_table():
    from PIL import ImageMode

    known = {name.partition(",")[0] for name in MODES}
    native = {"I;16N"}  # the machine's own I;16
    assert set(getattr(ImageMode, "_modes", None) or known) - native <= known
    assert set(Image.MODES) - native <= known


@pytest.mark.parametrize("name", ["L", "P, one clear entry", "LA", "RGBA", "I;16", "F, 0..1"])
def test_a_file_gives_what_the_image_gives(name: str, tmp_path):
    image, _ = MODES[name]
    format = "TIFF" if name.startswith("F") else "PNG"
    data = saved(image, format)
    np.testing.assert_array_equal(read_picture(data), as_picture(image))
    (tmp_path / "a").write_bytes(data)  # found by content, not by name
    np.testing.assert_array_equal(read_picture(tmp_path / "a"), as_picture(image))
    np.testing.assert_array_equal(read_picture(str(tmp_path / "a")), as_picture(image))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_tiff_of_more_than_8_bits(mode: str):
    data = saved(MODES[{"I": "I, 16 bits"}.get(mode, mode)][0], "TIFF")
    np.testing.assert_allclose(read_picture(data).mean((0, 1)), GREY, atol=0.6)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, more: bytes = b"") -> bytes:
    """A PNG of a kind that Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(b"\0" + row for row in rows) if isinstance(rows, list) else rows
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), more,
         chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    )  # fmt: skip


def trns(*values: int) -> bytes:
    data = b"tRNS" + struct.pack(f">{len(values)}H", *values)
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


DEEP = RAMP16.astype(">u2")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png(channels: int):
    full = np.full_like(DEEP, 65535)
    planes = {1: [DEEP], 2: [DEEP, full], 3: [DEEP] * 3, 4: [DEEP] * 3 + [full]}[channels]
    rows = [row.tobytes() for row in np.stack(planes, -1)]
    data = png(256, 4, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)
    np.testing.assert_allclose(read_picture(data).mean((0, 1)), GREY, atol=0.6)


@pytest.mark.parametrize("colour", [0, 2])
def test_a_transparent_colour_of_a_16_bit_png_is_white(colour: int):
    rows = [np.repeat(row[:, None], 3 if colour else 1, 1).tobytes() for row in DEEP]
    key = trns(*[10 * 257] * (3 if colour else 1))
    picture = read_picture(png(256, 4, 16, colour, rows, key))
    assert picture[0, 9:12].tolist() == [[9] * 3, WHITE, [11] * 3]


def tiff(bits: int, photometric: int, sample_format: int, values: np.ndarray) -> bytes:
    """A little-endian TIFF of one strip and one or more samples per pixel."""
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    data = values.tobytes()
    at = 8 + 2 + 10 * 12 + 4
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1),
        (262, 3, 1, photometric), (273, 4, 1, at + 8 * 2), (277, 3, 1, samples),
        (278, 4, 1, height), (279, 4, 1, len(data)), (339, 3, 1, sample_format),
    ]  # fmt: skip
    if samples > 1:
        tags[2] = (258, 3, samples, at)
        tags[9] = (339, 3, samples, at + 8)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    lists = struct.pack("<4H", *[bits] * 4) + struct.pack("<4H", *[sample_format] * 4)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + lists + data


def test_16_bit_tiff():
    np.testing.assert_allclose(read_picture(tiff(16, 1, 1, RAMP16)).mean(), 127.5)
    inverted = read_picture(tiff(16, 0, 1, RAMP16))  # white is zero
    assert inverted[0, 0].tolist() == WHITE and inverted[0, -1].tolist() == [0, 0, 0]
    colour = read_picture(tiff(16, 2, 1, np.stack([RAMP16, RAMP16, RAMP16 * 0], -1)))
    np.testing.assert_allclose(colour.mean((0, 1)), [127.5, 127.5, 0], atol=0.6)
    with pytest.raises(PictureError, match="have a sign"):
        read_picture(tiff(16, 1, 2, (RAMP16 // 2).astype("<i2")))


def nan_at_one_place() -> np.ndarray:
    return np.where(np.arange(1024).reshape(4, 256) == 7, np.nan, 0.5).astype(np.float32)


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 8), 70000, np.int32),
        np.full((4, 8), -1, np.int32),
        np.full((4, 8), 300.0, np.float32),
        np.full((4, 8), 4.0, np.float32),  # overexposed 0..1, or a black 0..255
        np.full((4, 8), -0.5, np.float32),
        np.full((4, 8), np.inf, np.float32),
        nan_at_one_place(),
    ],
)
def test_values_of_an_unknown_scale_are_refused(values: np.ndarray):
    for take in (as_picture, lambda image: read_picture(saved(image, "TIFF"))):
        with pytest.raises(PictureError, match=r"values go from .* save it as an 8-bit"):
            take(Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("PNG", "I;16"),
     ("TIFF", "I;16")],
)  # fmt: skip
def test_the_exif_orientation_is_applied(orientation: int, format: str, mode: str):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # a white corner at the top left of the upright picture
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    image = (
        image.convert("RGB") if mode == "RGB" else grey(np.asarray(image) * np.uint16(257), mode)
    )
    options = {"lossless": True} if format == "WEBP" else {}
    read = read_picture(saved(image, format, exif=exif, **options))
    np.testing.assert_allclose(read[..., 0].astype(int), upright, atol=3)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(format: str):
    frames = [Image.new("RGB", (8, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_allclose(read_picture(data).mean((0, 1)), (250, 0, 0), atol=4)


# Files that must not be opened, or not be decoded -------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_are_read(format: str):
    assert format in FORMATS
    picture = read_picture(saved(Image.new("RGB", (8, 4), (200, 60, 60)), format))
    np.testing.assert_allclose(picture.mean((0, 1)), (200, 60, 60), atol=4)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 0 0 setrgbcolor\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (EPS, "is PostScript"),
        (b"\xc5\xd0\xd3\xc6" + b"\0" * 40 + EPS, "is PostScript"),
        (b"%PDF-1.7\n", "is PDF"),
        (b"", "is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (saved(Image.new("RGB", (8, 4)), "JPEG2000"), "another format"),
        (saved(Image.new("RGB", (8, 4)), "ICO"), "another format"),
    ],
)
def test_other_formats_start_nothing(data: bytes, what: str, monkeypatch, tmp_path):
    def start(*words: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {words}")

    for name in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork"):
        monkeypatch.setattr(name, start)
    (tmp_path / "harmless.png").write_bytes(data)
    with pytest.raises(PictureError, match=rf"harmless.png: .*{what}.*PNG, JPEG, WEBP"):
        read_picture(tmp_path / "harmless.png")


def test_a_lazily_opened_postscript_image_is_refused():
    with pytest.raises(PictureError, match="comes from a EPS file"):
        as_picture(Image.open(io.BytesIO(EPS)))


def header_only(format: str, side: int) -> bytes:
    """A file that declares `side` x `side` pixels and holds none."""
    if format == "PNG":
        return png(side, side, 8, 2, b"")
    if format == "PPM":
        return f"P6 {side} {side} 255\n".encode()
    if format == "BMP":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24,
                                   *[0] * 6)  # fmt: skip
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", side, side, 0x80, 0, 0)
        + b"\0" * 6
        + (b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x01\x00\x00;")
    )


@pytest.mark.parametrize("side", [7072, 20000, 60000])
@pytest.mark.parametrize("format", ["PNG", "PPM", "BMP", "GIF"])
def test_too_many_pixels_are_refused_before_decoding(format: str, side: int, monkeypatch):
    def decode(*args: object) -> None:
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr(pictures, "_to_rgb", decode)
    assert 7071**2 < MAX_PIXELS < 7072**2
    with pytest.raises(PictureError, match=rf"{side} x {side} pixels; .* {MAX_PIXELS} .* scale"):
        read_picture(header_only(format, side))


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # a socket's path may be short only
    server.bind("socket.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    cases = {
        "fifo.png": "it is a FIFO", "socket.png": "it is a socket", "folder.png": "it is a folder",
        "link.png": "it is a FIFO", "loop.png": "symbolic links", "none.png": "No such file",
        "/dev/zero": "it is a device", "a\0b.png": "null", "x" * 300: "too long",
    }  # fmt: skip
    for name, reason in cases.items():
        with pytest.raises(PictureError, match=rf"{reason}.*; give a picture file"):
            read_picture(name if name.startswith("/") or "\0" in name else tmp_path / name)
    server.close()


def test_a_fifo_put_in_the_place_of_a_file_blocks_nobody(tmp_path, monkeypatch):
    from tprl_env import files

    os.mkfifo(tmp_path / "fifo.png")
    monkeypatch.setattr(files, "_check_regular", lambda mode, path: None)
    done = threading.Event()

    def read() -> None:
        with pytest.raises(PictureError):
            read_picture(tmp_path / "fifo.png")
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damaged_files_are_read_or_refused_in_one_sentence(format: str):
    rng = np.random.default_rng(list(format.encode()))
    noise = Image.fromarray(rng.integers(256, size=(24, 31, 3), dtype=np.uint8))
    whole = saved(noise, format)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            data[place if rng.random() < 0.5 else place % 64] = rng.integers(256)
        if rng.random() < 0.3:
            data = data[: rng.integers(1, len(data))]
        try:
            picture = read_picture(bytes(data))
            assert picture.dtype == np.uint8 and picture.ndim == 3
        except PictureError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


# Pictures in memory --------------------------------------------------------------------------

COLOURS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


@pytest.mark.parametrize(
    "value",
    [
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        (COLOURS / 255).astype(np.float32),
        torch.from_numpy(COLOURS),
        torch.from_numpy(COLOURS).permute(2, 0, 1) / 255,
        (torch.from_numpy(COLOURS).permute(2, 0, 1) / 255).double().requires_grad_(),
        Image.fromarray(COLOURS),
        np.concatenate([COLOURS, np.full_like(COLOURS[..., :1], 255)], -1),
        saved(Image.fromarray(COLOURS), "PNG"),
    ],
)
def test_what_is_taken_as_a_picture(value: object):
    np.testing.assert_array_equal(as_picture(value), COLOURS)


def test_grey_and_alpha_arrays():
    ramp, alpha, clear = (part.repeat(2, 0) for part in (RAMP, ALPHA, CLEAR))  # 8 rows
    for value in (ramp, ramp[None], ramp[..., None], torch.from_numpy(ramp)[None]):
        np.testing.assert_array_equal(as_picture(value)[..., 2], ramp)
    np.testing.assert_array_equal(as_picture(np.dstack([ramp] * 3 + [alpha]))[..., 0], clear)
    half = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert as_picture(half).shape == (8, 9, 3)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (torch.zeros(3, 0, 8), "has no pixels"),
        (Image.new("RGB", (0, 4)), "rows and columns"),
        (COLOURS.astype(np.int64), "give uint8"),
        (COLOURS > 3, "give uint8"),
        (COLOURS.astype(np.float32), r"floats must lie in 0\.\.1"),
        (COLOURS / 255 - 0.5, r"\(not normalised\)"),
        (np.full((5, 7, 3), np.nan), "floats must lie"),
        (np.zeros((3, 7, 3), np.uint8), r"could be \(H, W, C\) or \(C, H, W\)"),
        (np.zeros((5, 7, 2), np.uint8), "with C = 1, 3 or 4"),
        (np.zeros((1, 5, 7, 3), np.uint8), "give one picture"),
        (np.zeros(7, np.uint8), "give one picture"),
        (np.array("a.png"), "is no picture"),
        (None, "got NoneType"),
        ([[1, 2], [3, 4]], "got list"),
    ],
)
def test_what_is_not_taken_as_a_picture(value: object, reason: str):
    with pytest.raises(PictureError, match=reason) as caught:
        as_picture(value)
    assert "\n" not in str(caught.value)


def test_text_chunks_do_not_eat_memory():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (1 << 24), zip=True)
    with pytest.raises(PictureError, match="damaged"):
        read_picture(saved(Image.new("RGB", (4, 4)), "PNG", pnginfo=info))


def test_sentences_name_the_file_once(tmp_path):
    (tmp_path / "a.tif").write_bytes(saved(Image.fromarray(np.full((4, 8), 4.0, "f4")), "TIFF"))
    with pytest.raises(PictureError) as caught:
        read_picture(tmp_path / "a.tif")
    assert len(re.findall(r"a\.tif", str(caught.value))) == 1
