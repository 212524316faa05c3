"""A trained pruner in front of an LVLM: picture and question in, answer from few tokens out.

>>> model = PrunedLVLM.load("builtin:sparse", policy="runs/mine/policy",
...                         autoencoder="runs/mine/autoencoder")    # doctest: +SKIP
>>> model.answer("a.png", "what digit is at cx ?", budget=14).text  # doctest: +SKIP
'5'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tprl_env.data.pictures import PictureError, as_picture
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.reducers.interfaces import PruneInputs, Pruner

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import LVLM, Positions
    from tprl_env.policy.pruner import Penalty


@dataclass(frozen=True)
class PrunedAnswer:
    """An answer and the tokens it was given from.

    Attributes:
        text: What the LVLM generated.
        keep: Droppable tokens that reached the LLM, ``(n,)`` bool in the order of the sequence.
        grid: Rows and columns of the tokens; (1, n) where they are not one grid.
    """

    text: str
    keep: npt.NDArray[np.bool_]
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class PrunedLVLM:
    """An LVLM that sees only the tokens a pruner keeps.

    Attributes:
        lvlm: The frozen model.
        pruner: Any pruner that needs no label: the trained policy or a heuristic.
        autoencoder: Makes the codes that a policy looks at; not needed by heuristics.
        positions: Rotary positions of the kept tokens, as in training ("original").
    """

    lvlm: LVLM
    pruner: Pruner
    autoencoder: TokenAutoencoder | None = None
    positions: Positions = "original"

    def __post_init__(self) -> None:
        """Refuse a pruner whose inputs cannot be made from a picture and a question.

        Raises:
            ValueError: The pruner needs codes and there is no autoencoder, or needs a label.
        """
        if "codes" in self.pruner.required() and self.autoencoder is None:
            raise ValueError(
                f"pruner {self.pruner.name!r} looks at codes; pass the autoencoder of its store"
            )
        if "relevance" in self.pruner.required():
            raise ValueError(
                f"pruner {self.pruner.name!r} knows the built-in scenes' labels; it cannot prune "
                "a new picture, take another pruner"
            )

    @classmethod
    def load(
        cls,
        lvlm: str,
        *,
        policy: str | Path,
        autoencoder: str | Path,
        threshold: float | None = None,
        redundancy_penalty: Penalty = 0.0,
        **model: Any,
    ) -> PrunedLVLM:
        """Load everything from folders.

        Args:
            lvlm: ``builtin:<task>``, a folder or a hub id, as for ``load_lvlm``.
            policy: Exported policy; it acts in as many steps as it was trained to take.
            autoencoder: Autoencoder of the store that the policy was trained on.
            threshold: Keep p > threshold (TPRL eq. 16) in one pass instead of an exact budget.
            redundancy_penalty: See ``PolicyPruner``; `tprl evaluate --calibration` finds one.
            **model: Passed on to ``load_lvlm`` (device, dtype, revision).

        Raises:
            ValueError: A folder is missing or holds something else.
        """
        from tprl_env.lvlm import load_lvlm
        from tprl_env.policy.pruner import PolicyPruner

        fixed: dict[str, Any] = (
            {} if threshold is None else {"mode": "threshold", "threshold": threshold}
        )
        pruner = PolicyPruner.from_pretrained(
            policy, redundancy_penalty=redundancy_penalty, **fixed
        )
        return cls(load_lvlm(lvlm, **model), pruner, TokenAutoencoder.from_pretrained(autoencoder))

    def answer(
        self,
        picture: Any,
        question: str,
        budget: int,
        max_new_tokens: int = 20,
    ) -> PrunedAnswer:
        """Answer one question about one picture; see :meth:`answer_batch`."""
        return self.answer_batch([picture], [question], budget, max_new_tokens)[0]

    def answer_batch(
        self,
        pictures: Sequence[Any],
        questions: Sequence[str],
        budget: int,
        max_new_tokens: int = 20,
    ) -> list[PrunedAnswer]:
        """Encode, prune and answer.

        In float32 a batch answers as one picture at a time does. In bfloat16 the masks are equal,
        but where two words are nearly as likely, another batch size may round to the other one
        (20 to 23 of 24 texts were equal on random weights).

        Args:
            pictures: One per question: a path, a file's bytes, a PIL image, or an array or
                tensor, uint8 in 0..255 or float in 0..1, ``(H, W, 3)`` or ``(3, H, W)``; see
                ``tprl_env.data.pictures.as_picture``.
            questions: Questions.
            budget: Tokens to keep; with a threshold it only informs the policy.
            max_new_tokens: Longest answer in tokens.

        Raises:
            ValueError: Different numbers of pictures and questions, a budget out of range, or
                something that is no picture.
        """
        if isinstance(pictures, (str, bytes)) or isinstance(questions, str):
            raise ValueError("pictures and questions must be lists; for one of each use answer()")
        if len(pictures) != len(questions):
            raise ValueError(
                f"expected one question per picture, got {len(pictures)} pictures and "
                f"{len(questions)} questions"
            )
        images = [_taken(i, one) for i, one in enumerate(pictures)]
        visuals = self.lvlm.encode_images(images)
        prompts = [
            self.lvlm.prompt(question, [visual])
            for question, visual in zip(questions, visuals, strict=True)
        ]
        shown = [_droppable(visual) for visual in visuals]
        inputs = [
            self._inputs(v, p, dropped)
            for v, p, dropped in zip(visuals, prompts, shown, strict=True)
        ]
        if "question_attention" in self.pruner.required():
            maps = self.lvlm.question_attention(prompts, [visual.tokens for visual in visuals])
            for one, saliency, dropped in zip(inputs, maps, shown, strict=True):
                one.question_attention = torch.as_tensor(saliency)[dropped]
        if "question_rows" in self.pruner.needs:
            from tprl_env.reducers.layer.question_rows import QuestionRows

            rows = self.lvlm.saliency(prompts, [v.tokens for v in visuals], QuestionRows(layer=0))
            for one, saliency, dropped in zip(inputs, rows, shown, strict=True):
                one.question_rows = torch.as_tensor(saliency)[dropped]
        if "vision" in self.pruner.required():
            for one, image in zip(inputs, images, strict=True):
                one.vision = self.lvlm.vision_signals(image)
        keep = [mask.cpu().numpy() for mask in self.pruner.prune_batch(inputs, budget)]
        whole = [np.where(dropped, False, True) for dropped in shown]
        for full, mask, dropped in zip(whole, keep, shown, strict=True):
            full[dropped] = mask
        texts = self.lvlm.generate(
            prompts, [visual.tokens for visual in visuals], whole, max_new_tokens, self.positions
        )
        return [
            PrunedAnswer(text, mask, visual.grid)
            for text, mask, visual in zip(texts, keep, visuals, strict=True)
        ]

    def _inputs(self, visual: Any, prompt: Any, dropped: npt.NDArray[np.bool_]) -> PruneInputs:
        embeddings = self.lvlm.question_embeddings(prompt)
        tokens = visual.tokens.float().cpu()[dropped]
        return PruneInputs(
            tokens=tokens,
            tower=visual.tower.float().cpu()[dropped],
            cls_attention=None
            if visual.cls_attention is None
            else visual.cls_attention.float().cpu()[dropped],
            grid=visual.grid,
            coords=None
            if visual.placement is None or visual.grid[0] != 1
            else torch.from_numpy(visual.placement.coords[dropped]),
            areas=None if visual.placement is None else torch.from_numpy(visual.placement.areas()),
            query=embeddings.mean(0),
            query_tokens=embeddings,
            codes=self.autoencoder.encode(tokens) if self.autoencoder is not None else None,
        )


def _droppable(visual: Any) -> npt.NDArray[np.bool_]:
    """Tokens that a pruner may drop; the others show no place of the picture and are kept."""
    if visual.placement is None:
        return np.ones(len(visual.tokens), bool)
    shown: npt.NDArray[np.bool_] = visual.placement.droppable
    return shown


def _taken(number: int, picture: Any) -> npt.NDArray[np.uint8]:
    try:
        return as_picture(picture)
    except PictureError as error:
        raise PictureError(f"picture {number}: {error}") from error
