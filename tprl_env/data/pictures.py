"""Pictures: whatever one is given as becomes RGB, ``(H, W, 3)`` uint8.

What is decided here, once: 16-bit and float greys are scaled by mode, never cut off; transparency
is laid over white; the EXIF orientation is applied; an animation or a file of several pages is its
first frame. Colour profiles are ignored, as the datasets and processors of this field do.

Files are read by the decoders of `FORMATS` alone, found by content and not by name: others start
programs (EPS starts Ghostscript), and none is needed.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from tprl_env.files import open_regular

__all__ = ["FORMATS", "MAX_PIXELS", "PictureError", "as_picture", "read_picture"]

Picture = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000
"""Largest width x height that is decoded; LVLMs look at less than a hundredth of it."""

FORMATS: dict[str, tuple[re.Pattern[bytes], type[ImageFile.ImageFile]]] = {
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    "WEBP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
    "BMP": (re.compile(rb"BM"), BmpImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    "PPM": (re.compile(rb"P[1-6]\s"), PpmImageFile),
}
"""How a file of each format begins, and what decodes it."""

_OTHERS = {b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF"}
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError),
    *(AttributeError, RuntimeError, MemoryError, AssertionError),
    *(struct.error, zlib.error, Image.DecompressionBombError, ImageCms.PyCMSError),
)
"""What Pillow's decoders raise for damaged files, found by damaging files of every format."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 274, 262, 258, 339  # tags of EXIF and TIFF
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_CHANNELS = (1, 3, 4)
_EIGHT_BIT = "save it as an 8-bit RGB picture"


class PictureError(ValueError):
    """A picture cannot be read or taken; the message says which, why, and what to do."""


def read_picture(source: str | os.PathLike[str] | bytes) -> Picture:
    """Read a picture.

    Args:
        source: A file, or a file's bytes.

    Returns:
        RGB, ``(H, W, 3)`` uint8.

    Raises:
        PictureError: It is missing, no regular file, damaged, of a format outside `FORMATS`, has
            more than `MAX_PIXELS` pixels, or values whose scale cannot be known.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "the picture")
    try:
        with open_regular(Path(source)) as stream:
            return _decode(stream, str(source))
    except PictureError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{source}: {reason}; give a picture file") from error


def as_picture(value: Any) -> Picture:
    """Take a picture in any form in which its colours are certain.

    Args:
        value: A file, a file's bytes, a PIL image, or an array or tensor: uint8 in 0..255 or
            float in 0..1, ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with C = 1 (grey),
            3 (RGB) or 4 (RGB and alpha).

    Returns:
        RGB, ``(H, W, 3)`` uint8.

    Raises:
        PictureError: It is none of these, empty, or can be read in two ways.
    """
    if isinstance(value, (str, os.PathLike, bytes)):
        return read_picture(value)
    if isinstance(value, Image.Image):
        return _from_pil(value)
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return _from_array(value)
    raise PictureError(
        f"a picture must be a path, bytes, a PIL image, an array or a tensor, got "
        f"{type(value).__name__}"
    )


def _decode(stream: BinaryIO, name: str) -> Picture:
    head = stream.read(16)
    stream.seek(0)
    reader = next((kind for begin, kind in FORMATS.values() if begin.match(head)), None)
    if reader is None:
        found = next((text for begin, text in _OTHERS.items() if head.startswith(begin)), None)
        what = found or ("empty" if not head else "of another format, or no picture")
        raise PictureError(
            f"{name}: the file is {what}; formats that are read are {', '.join(FORMATS)}"
        )
    try:
        # the decoder itself and not Image.open, whose own limit would come before ours
        with reader(stream) as image:
            _check_size(image, name)
            return _to_rgb(image)
    except PictureError as error:
        text = str(error)
        raise PictureError(text if text.startswith(name) else f"{name}: {text}") from error
    except _BROKEN as error:
        raise PictureError(
            f"{name}: the file is damaged ({type(error).__name__}: {str(error)[:120]}); repair it"
        ) from error


def _from_pil(image: Image.Image) -> Picture:
    name = f"the PIL image {image.mode} {image.width} x {image.height}"
    if image.format not in (None, "MPO", *FORMATS):
        raise PictureError(
            f"{name} comes from a {image.format} file, which is not read here; give "
            f'image.convert("RGB")'
        )
    _check_size(image, name)
    try:
        return _to_rgb(image)
    except _BROKEN as error:
        raise PictureError(f"{name}: {str(error)[:200]}") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise PictureError(
            f"{name}: {width} x {height} pixels; a picture needs 1 to {MAX_PIXELS} of them, "
            f"{'scale it down' if width * height else 'give one with rows and columns'}"
        )


def _to_rgb(image: Image.Image) -> Picture:
    image.load()
    # after loading, because the TIFF decoder turns the picture itself and then forgets the tag
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        rgb = Image.fromarray(_grey(image)).convert("RGB")
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgb = _over_white(image)
    else:
        rgb = image.convert("RGB")
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of a 16-bit PNG, which Pillow reads as 8-bit
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # alpha that is multiplied in already
    layer = (image.convert(straight) if straight else image).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def _grey(image: Image.Image) -> Picture:
    """Greys of more than 8 bits as 8 bits."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        grey = _scaled(values, 65535)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey = np.where(values == key, np.uint8(255), grey)
    elif image.mode == "I" and tags.get(_BITS) == (16,):
        raise PictureError(f"its 16-bit numbers have a sign, so white is unknown; {_EIGHT_BIT}")
    else:
        grey = _scaled(values, _white(values))
    return 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # 0: white is zero


def _white(values: npt.NDArray[Any]) -> float:
    """The value that means white, for number types whose range says nothing about it.

    Whole numbers go to 255 or, where one is larger, to 65535; floats go to 1 or to 255.
    """
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    if low >= 0 and np.isfinite(high):  # a NaN fails every comparison
        if whole and high <= 65535:
            return 255 if high <= 255 else 65535
        if not whole and high <= 1.001:  # a resampled picture overshoots a little
            return 1
        if not whole and 16 < high <= 255.5:
            return 255
    range_ = "0..255 or 0..65535" if whole else "0..1 or 0..255"
    raise PictureError(
        f"its values go from {low:g} to {high:g}, where {range_} is expected; {_EIGHT_BIT}"
    )


def _scaled(values: npt.NDArray[Any], white: float) -> Picture:
    if white == 255 and values.dtype.kind in "iu":
        return values.astype(np.uint8)
    return np.clip(np.rint(values * np.float32(255 / white)), 0, 255).astype(np.uint8)


def _from_array(array: npt.NDArray[Any]) -> Picture:
    name = f"an array of shape {array.shape} and type {array.dtype}"
    if array.size == 0:
        raise PictureError(f"{name} has no pixels; give a picture with rows and columns")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise PictureError(
                f"{name} has values from {low:g} to {high:g}; floats must lie in 0..1 (not "
                f"normalised), values in 0..255 must be uint8"
            )
        array = _scaled(array, 1)
    elif array.dtype != np.uint8:
        raise PictureError(f"{name} is no picture; give uint8 in 0..255 or floats in 0..1")
    if array.ndim == 2:
        array = array[..., None]
    else:
        array = _channels_last(array, name)
    if array.shape[2] == 4:
        return np.asarray(_over_white(Image.fromarray(np.ascontiguousarray(array))))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _channels_last(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    first, last = (array.ndim == 3 and array.shape[axis] in _CHANNELS for axis in (0, -1))
    if first == last:
        why = "could be (H, W, C) or (C, H, W)" if first else "is not (H, W), (H, W, C), (C, H, W)"
        raise PictureError(f"{name} {why} with C = 1, 3 or 4; give one picture as (H, W, 3)")
    return array.transpose(1, 2, 0) if first else array
