"""Tokenizer and image processor of a checkpoint, and what the library only notices much later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from tprl_env.checks import quoted

_FILES = "tokenizer.json, tokenizer_config.json, processor_config.json, preprocessor_config.json"


def load_processor(processor_class: Any, source: str, checkpoint: str, **options: Any) -> Any:
    """The checkpoint's processor, checked as far as files can be wrong without a complaint.

    Args:
        processor_class: Has the library's ``from_pretrained``.
        source: Folder or hub id.
        checkpoint: What the user called it.
        **options: Passed on, such as the revision.

    Raises:
        ValueError: A file of tokenizer or image processor cannot be read, its template names
            tokens that it does not define, or pixels would not be finite.
        OSError: A file is missing.
    """
    tokenizer_file = Path(source) / "tokenizer.json"
    if tokenizer_file.is_file():
        _check_template(tokenizer_file, checkpoint)
    try:
        processor = processor_class.from_pretrained(source, **options)
    except OSError:
        raise
    except Exception as error:
        # The tokenizer's Rust side raises bare Exception for a file that it cannot read; other
        # kinds that wrong files cause are listed, anything else is a bug and passes through.
        known = (KeyError, TypeError, AttributeError, ValueError, OverflowError)
        if type(error) is not Exception and not isinstance(error, known):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{checkpoint!r}: tokenizer or image processor cannot be read ({reason}); fetch "
            f"{_FILES} again"
        ) from error
    _check_pixels(processor.image_processor, checkpoint)
    return processor


@dataclass(frozen=True)
class Parts:
    """Tokenizer, image processor and chat template, loaded without a processor class.

    The library's processor classes need torchvision where a family also takes videos; the parts
    do not.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | None

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The rendered text of a conversation."""
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, **options
        )
        return text


def load_parts(source: str, checkpoint: str, **options: Any) -> Parts:
    """As :func:`load_processor`, for families whose processor class is not needed.

    Raises:
        ValueError: As for :func:`load_processor`.
        OSError: A file is missing.
    """
    return cast(Parts, load_processor(_PartsLoader, source, checkpoint, **options))


class _PartsLoader:
    """Loads the parts one by one."""

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> Parts:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        images = AutoImageProcessor.from_pretrained(source, **options)
        template = tokenizer.chat_template
        older = Path(source) / "chat_template.json"  # where processors of earlier releases had it
        if template is None and older.is_file():
            template = json.loads(older.read_text(encoding="utf-8")).get("chat_template")
        return Parts(tokenizer, images, template)


def check_pictures(
    image_processor: Any,
    checkpoint: str,
    needs: Sequence[str],
    axes: int,
    last: int | None = None,
    rows: int | None = None,
    **prepare: Any,
) -> None:
    """Refuse an image processor of another family or size, by what it makes of a grey picture.

    Args:
        image_processor: The checkpoint's.
        checkpoint: What the user called it.
        needs: What it must give, pixels first.
        axes: Axes of the pixels of one call.
        last: Their last size; ``None`` where any will do.
        rows: Their first size, of one picture; ``None`` where any will do.
        **prepare: More arguments of the image processor.

    Raises:
        ValueError: It gives something else.
    """
    name = type(image_processor).__name__
    picture = Image.new("RGB", (64, 48), "grey")
    try:
        prepared = image_processor(images=[picture], return_tensors="pt", **prepare)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{checkpoint!r}: its image processor, {name}, does not fit its model ({reason}); "
            f"fetch {_FILES} of the same checkpoint"
        ) from error
    missing = [one for one in needs if one not in prepared]
    if missing:
        raise ValueError(
            f"{checkpoint!r}: its image processor, {name}, gives {', '.join(prepared)} but the "
            f"model needs {', '.join(missing)}; fetch {_FILES} of the same checkpoint"
        )
    shape = tuple(prepared[needs[0]].shape)
    if len(shape) != axes or last not in (None, shape[-1]) or rows not in (None, shape[0]):
        sizes = {"first": rows, "last": last}
        wanted = f"{axes} axes" + "".join(f", the {n} of {k}" for n, k in sizes.items() if k)
        raise ValueError(
            f"{checkpoint!r}: its image processor, {name}, gives pixels of shape {shape}, but the "
            f"model takes {wanted}; fetch {_FILES} of the same checkpoint"
        )


def _check_template(path: Path, checkpoint: str) -> None:
    """Refuse a post-processor that names tokens it does not define: encoding would abort."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{checkpoint!r}: tokenizer.json is no valid JSON ({error}); fetch it again"
        ) from error
    parts: list[Any] = [content.get("post_processor") if isinstance(content, Mapping) else None]
    while parts:
        part = parts.pop()
        if not isinstance(part, Mapping):
            continue
        nested = part.get("processors")
        parts += nested if isinstance(nested, list) else []
        if part.get("type") != "TemplateProcessing":
            continue
        defined = part.get("special_tokens")
        pieces = [*_pieces(part, "single"), *_pieces(part, "pair")]
        for piece in pieces:
            special = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
            name = special.get("id") if isinstance(special, Mapping) else None
            if name is not None and not (isinstance(defined, Mapping) and name in defined):
                raise ValueError(
                    f"{checkpoint!r}: the post_processor of tokenizer.json puts {name!r}, which "
                    f"its special_tokens do not define; fetch tokenizer.json again"
                )


def _pieces(part: Mapping[str, Any], name: str) -> list[Any]:
    pieces = part.get(name)
    return pieces if isinstance(pieces, list) else []


def _check_pixels(image_processor: Any, checkpoint: str) -> None:
    """Refuse constants that make pixels NaN or infinite, which no later step would name."""
    for name in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(image_processor, name, None)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            if number is None:
                continue
            real = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not real or not math.isfinite(number) or (name == "image_std" and number <= 0):
                wanted = "positive numbers" if name == "image_std" else "finite numbers"
                raise ValueError(
                    f"{checkpoint!r}: {name} of the image processor must be {wanted}, got "
                    f"{quoted(value)}; fetch {_FILES} again"
                )
