"""The one record every dataset yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_choice
from tprl_env.data.graders import GRADERS


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about one picture, or about several.

    Attributes:
        id: Unique inside a dataset split; appears in error messages.
        image: RGB picture, ``(height, width, 3)`` uint8; the first one where there are several.
        question: Text of the question, without any chat template.
        answers: Accepted answers; the first one is the reference that is teacher-forced.
        image_id: Samples with the same ``image_id`` share their pictures, which are encoded once.
        question_type: Question type, used to break accuracy down; empty when the dataset has none.
        grader: Name in ``tprl_env.data.graders.GRADERS`` that grades free text.
        relevance: Answer-blind per-token relevance for datasets that know it (the built-in
            scenes), ``(num_tokens,)`` float32, larger is more relevant; ``None`` elsewhere.
        meta: Anything else a dataset wants to keep; the library reads ``"where"`` alone, the file
            and line that a message names.
        more_images: The pictures behind the first, in the order in which the prompt shows them.
    """

    id: str
    image: npt.NDArray[np.uint8]
    question: str
    answers: tuple[str, ...]
    image_id: str
    question_type: str = ""
    grader: str = "exact"
    relevance: npt.NDArray[np.float32] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    more_images: tuple[npt.NDArray[np.uint8], ...] = ()

    def __post_init__(self) -> None:
        """Refuse samples that no LVLM can be asked.

        Raises:
            ValueError: The question is empty, there is no answer, the grader is unknown, or the
                image is not RGB uint8.
        """
        if not self.question.strip():
            raise ValueError(f"sample {self.id!r} has an empty question; remove it or fill it in")
        if not self.answers or not all(a.strip() for a in self.answers):
            raise ValueError(f"sample {self.id!r} has no answer; remove it or fill it in")
        check_choice(f"sample {self.id!r}: grader", self.grader, GRADERS)
        for number, image in enumerate(self.images, start=1):
            shape = image.shape
            if len(shape) != 3 or shape[2] != 3 or 0 in shape or image.dtype != np.uint8:
                name = "image" if not self.more_images else f"image {number}"
                raise ValueError(
                    f"sample {self.id!r}: {name} must be (height, width, 3) uint8 and not empty, "
                    f"got {shape} {image.dtype}; convert it to RGB"
                )

    @property
    def images(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """All pictures, in the order in which the prompt shows them."""
        return (self.image, *self.more_images)
