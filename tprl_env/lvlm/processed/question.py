"""Finding the question in a prompt of ids, by what the checkpoint's template puts around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_EXAMPLES = ("what is it ?", "Is there a red one?", "3", "color at the left")


@dataclass(frozen=True)
class QuestionFrame:
    """Ids of the template directly around a question.

    Attributes:
        before: Between the last picture and the question.
        behind: From the question to the end of the prompt.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]

    @classmethod
    def of(cls, lvlm: Any) -> QuestionFrame:
        """The frame of an LVLM's template.

        Tokens that the tokenizer makes of template and question together belong to the question,
        as in the question embeddings that policies are trained on.

        Args:
            lvlm: As ``load_lvlm`` gives.

        Raises:
            ValueError: The template puts the question before the picture.
        """
        (visual,) = lvlm.encode_images([np.full((64, 64, 3), 127, np.uint8)])
        before, behind = [], []
        for example in _known(lvlm, visual):
            start, stop = example.question_span
            before.append(example.ids[example.behind_images : start])
            behind.append(example.ids[stop:][::-1])
            if start < example.behind_images:
                raise ValueError(
                    "the checkpoint's template puts the question before the picture; give "
                    "question_spans to prune"
                )
        return cls(_common(before), _common(behind)[::-1])

    def find(self, ids: npt.NDArray[np.int64], visual_at: npt.NDArray[np.int64]) -> tuple[int, int]:
        """(start, stop) of the question in a prompt.

        Args:
            ids: (L,) of the full prompt.
            visual_at: (n,) places of its visual tokens.

        Raises:
            ValueError: The prompt is not as the template has it.
        """
        start = int(visual_at[-1]) + 1 if len(visual_at) else 0
        stop = len(ids) - len(self.behind)
        opened = tuple(ids[start : start + len(self.before)].tolist()) == self.before
        closed = stop >= 0 and tuple(ids[stop:].tolist()) == self.behind
        start += len(self.before)
        if not (opened and closed and start < stop):
            raise ValueError(
                "the question cannot be found: the prompt must end as the checkpoint's chat "
                "template has it for one user message, pictures first, then the question, with "
                "add_generation_prompt=True; for other prompts pass question_spans, (start, stop) "
                "of the question's ids in each row of input_ids"
            )
        return start, stop


def _known(lvlm: Any, visual: Any) -> Sequence[Any]:
    """Prompts of questions that the vocabulary has words for."""
    found = []
    for question in _EXAMPLES:
        try:
            found.append(lvlm.prompt(question, [visual]))
        except ValueError:  # a small vocabulary has no such word
            continue
    if len(found) < 2:
        raise ValueError(
            "the checkpoint's vocabulary lacks plain English words, so what its template puts "
            "around a question cannot be told; give question_spans to prune"
        )
    return found


def _common(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ids that all begin with."""
    length = 0
    while all(len(one) > length and one[length] == parts[0][length] for one in parts):
        length += 1
    return parts[0][:length]
