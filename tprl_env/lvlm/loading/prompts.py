"""Rendering a question into the checkpoint's template, and tokenising answers behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from tprl_env.checks import quoted
from tprl_env.data.features.placement import PICTURE_BREAK, Pictured, Placement, raster
from tprl_env.lvlm.protocol import Prompt

LLAVA_TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
"""LLaVA-1.5's conversation without its system text, for checkpoints that carry no template."""

MAX_CHARACTERS = 20_000
"""Longest question or answer: more text fits no context, and a megabyte of it takes minutes."""

_TEMPLATE_STEPS = 3_000_000
"""Lines of Python that reading and rendering a template may take; LLaVA-1.5's takes 100 000."""

_SENTINEL = "QUESTIONxGOESxHERE"


class Prompter:
    """Turns questions and answers into token ids.

    The template is the processor's own chat template when there is one, else
    :data:`LLAVA_TEMPLATE`. The ids are those of the checkpoint's own processor: a BOS token stands
    where its tokenizer or its template puts one, and nowhere else.
    """

    def __init__(self, processor: Any, image_token_id: int, eos_id: int) -> None:
        """Read the template once.

        Raises:
            ValueError: The tokenizer reports no character offsets, or the template does not hold
                the image and the question exactly once.
        """
        self._tokenizer = processor.tokenizer
        self._image_token_id = image_token_id
        self._image_token = self._tokenizer.convert_ids_to_tokens(image_token_id)
        self._eos_id = eos_id
        if not self._tokenizer.is_fast:
            raise ValueError(
                "the checkpoint's tokenizer reports no character offsets, which are needed to find "
                "the question in the prompt; save it with a tokenizer.json (a fast tokenizer)"
            )
        words = self._tokenizer
        added = words.added_tokens_decoder.items()
        special = {*words.all_special_ids, *(i for i, token in added if token.special)}
        self._special_ids = special - {words.unk_token_id}
        self.processor = processor
        self._frames: dict[int, tuple[str, str]] = {}
        head, _ = self._frame(1)
        bos = self._tokenizer.bos_token
        # the library's processors put special tokens unless the template begins with one
        self._begins = bos is not None and head.startswith(bos)

    def _frame(self, pictures: int) -> tuple[str, str]:
        """Template text before and behind the question, with a placeholder per picture."""
        if pictures not in self._frames:
            self._frames[pictures] = self._render(pictures)
        return self._frames[pictures]

    def _render(self, pictures: int) -> tuple[str, str]:
        processor = self.processor
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}] * pictures + [{"type": "text", "text": _SENTINEL}]
            messages = [{"role": "user", "content": content}]
            text = _bounded(
                lambda: str(
                    processor.apply_chat_template(
                        messages, add_generation_prompt=True, tokenize=False
                    )
                )
            )
        else:
            text = LLAVA_TEMPLATE.format(question=_SENTINEL)
            text = text.replace("<image>", "\n".join([self._image_token] * pictures))
        if text.count(_SENTINEL) != 1 or text.count(self._image_token) != pictures:
            raise ValueError(
                f"the chat template renders to {text!r}; it must hold {self._image_token!r} once "
                f"per picture, here {pictures}, and the question exactly once"
            )
        head, tail = text.split(_SENTINEL)
        return head, tail

    def prompt(self, question: str, visuals: Sequence[Pictured] | None = None) -> Prompt:
        """Tokenise ``question`` inside the template.

        Args:
            question: Its text.
            visuals: The pictures that it asks about, in order; ``None`` for one picture that is
                one run of tokens.

        Raises:
            ValueError: The question is empty, too long, holds the image placeholder or another
                special token, or no word that the vocabulary knows; there is no picture.
        """
        question = question.strip()
        if not question:
            raise ValueError("the question is empty; every sample needs one")
        _check_length("question", question)
        if self._image_token in question:
            raise ValueError(
                f"question {question!r} contains the image placeholder {self._image_token!r}; "
                f"remove it, the template adds it"
            )
        placement = _placement(visuals)
        shown = (
            [""]
            if visuals is None
            else [text for visual in visuals for text in visual.placeholder.split(PICTURE_BREAK)]
        )
        head, tail = self._frame(len(shown))
        if visuals is not None:
            texts = iter([text or self._image_token for text in shown])
            head, tail = self._filled(head, texts), self._filled(tail, texts)
        text = head + question + tail
        encoded = self._tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=not self._begins
        )
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        ids = tuple(int(token) for token, _ in pairs)
        start, stop = len(head), len(head) + len(question)
        inside = [
            i
            for i, (_, (first, last)) in enumerate(pairs)
            if text[max(first, start) : min(last, stop)].strip()
        ]
        visual_at = tuple(i for i, token in enumerate(ids) if token == self._image_token_id)
        wanted = 1 if placement is None else len(placement.runs)
        if len(visual_at) != wanted or not inside:
            raise ValueError(
                f"prompt {text!r} tokenises to {len(visual_at)} image placeholders and "
                f"{len(inside)} question tokens; expected {wanted} and at least one"
            )
        asked = [ids[i] for i in inside]
        self._check_words(question, asked)
        span = (inside[0], inside[-1] + 1)
        return Prompt(ids, visual_at, span, text, placement)

    def _filled(self, part: str, texts: Iterator[str]) -> str:
        """Template text with each placeholder replaced by the next picture's text."""
        pieces = part.split(self._image_token)
        return pieces[0] + "".join(next(texts) + piece for piece in pieces[1:])

    def _check_words(self, question: str, ids: list[int]) -> None:
        """Refuse a question that would steer the model, or that it cannot read.

        Raises:
            ValueError: It holds a special token, which would end or restart the prompt, or
                unknown words only.
        """
        special = [i for i in ids if i in self._special_ids]
        if special:
            raise ValueError(
                f"question {question[:80]!r} contains the special token "
                f"{self._tokenizer.convert_ids_to_tokens(special[0])!r}; remove or reword it"
            )
        if all(i == self._tokenizer.unk_token_id for i in ids):
            raise ValueError(
                f"question {question[:80]!r} has no word that this LVLM's vocabulary knows; "
                f"take an LVLM for this language"
            )

    def answer_ids(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """Token ids with which the model would write ``answer``, end token appended.

        The joint text is tokenised and its suffix taken when the prompt's ids are a prefix of it;
        where the boundary merges, the answer is tokenised alone.

        Raises:
            ValueError: The answer is empty or too long, the prompt has no text, or the tokenizer
                cannot express the answer (unknown words).
        """
        answer = answer.strip()
        _check_length("answer", answer)
        if not answer or not prompt.text:
            raise ValueError(
                f"answer {quoted(answer)} behind prompt text {quoted(prompt.text)} cannot be "
                f"tokenised; neither may be empty"
            )
        gap = "" if prompt.text[-1].isspace() else " "
        joint = self._ids(prompt.text + gap + answer)
        before = self._ids(prompt.text)
        if joint[: len(before)] == before and len(joint) > len(before):
            ids = joint[len(before) :]
        else:
            ids = self._ids(answer)
        decoded = self._tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)
        if not "".join(decoded.split()).endswith("".join(answer.split())):
            raise ValueError(
                f"answer {quoted(answer)} comes back from the tokenizer as the end of "
                f"{decoded[-40:]!r}; this LVLM's vocabulary cannot express it"
            )
        return (*ids, self._eos_id)

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens and outer white space removed."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _placement(visuals: Sequence[Pictured] | None) -> Placement | None:
    """Where the tokens of all pictures stand; ``None`` for one run at consecutive positions."""
    if visuals is None:
        return None
    if not visuals:
        raise ValueError("a prompt needs a picture, got none; pass visuals=[visual, ...]")
    if len(visuals) == 1 and visuals[0].placement is None:
        return None
    parts = [v.placement or Placement.in_line(raster(*v.grid)) for v in visuals]
    return Placement.joined(parts)


def _check_length(name: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"the {name} has {len(text)} characters ({text[:40]!r}...), more than "
            f"{MAX_CHARACTERS}; shorten it"
        )


def _bounded(render: Callable[[], str]) -> str:
    """Render a template, which comes with a checkpoint and may loop for days.

    Raises:
        ValueError: It takes too many steps, or cannot be rendered.
    """
    left = _TEMPLATE_STEPS

    def step(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(
                "the checkpoint's chat template loops too long; take the template of its family"
            )
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        return render()
    except TemplateError as error:
        raise ValueError(
            f"the checkpoint's chat template cannot be rendered ({error}); take the template of "
            f"its family"
        ) from error
    finally:
        sys.settrace(before)
