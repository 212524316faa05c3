"""A trained pruner in front of an LVLM: picture and question in, answer from few tokens out.

>>> model = PrunedLVLM.load("builtin:sparse", policy="runs/mine/policy",
...                         autoencoder="runs/mine/autoencoder")    # doctest: +SKIP
>>> model.answer("a.png", "what digit is at cx ?", budget=14).text  # doctest: +SKIP
'5'
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tprl_env.data.pictures import PictureError, as_picture
from tprl_env.env.budgets import Budget, check_budget, tokens_of
from tprl_env.inference.answers import Group, Left, PrunedAnswer, PrunedScore, Result
from tprl_env.lvlm.picture_sets import joined_visual
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.reducers.interfaces import Merger, PruneInputs, Pruner, Reducer
from tprl_env.reducers.layer_pruner import LayerPruner

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import LVLM, Positions
    from tprl_env.policy.pruner import Penalty


@dataclass(frozen=True, eq=False)
class PrunedLVLM:
    """An LVLM that uses the visual tokens a reducer leaves.

    Attributes:
        lvlm: The frozen model.
        reducer: A pruner (the trained policy or a published one), a merger, or a layer pruner;
            anything that needs no label.
        autoencoder: Makes the codes that a policy looks at; not needed by other reducers.
        positions: Rotary positions of what is left. ``None``: a pruner keeps its tokens' own, as
            in training; mergers and layer pruners do what their authors' code does.
    """

    lvlm: LVLM
    reducer: Reducer
    autoencoder: TokenAutoencoder | None = None
    positions: Positions | None = None

    def __post_init__(self) -> None:
        """Refuse a reducer whose inputs cannot be made from a picture and a question.

        Codes of another LVLM's autoencoder are warned about.

        Raises:
            ValueError: It needs codes and there is no autoencoder, it needs a label, or it is
                of no known kind.
        """
        if not isinstance(self.reducer, (Pruner, Merger, LayerPruner)):
            raise ValueError(
                "reducer must be a pruner, a merger or a layer pruner, got "
                f"{type(self.reducer).__name__}; make_reducer(name) makes one"
            )
        if "codes" in self.reducer.required() and self.autoencoder is None:
            raise ValueError(
                f"pruner {self.reducer.name!r} looks at codes; pass the autoencoder of its store"
            )
        if "codes" in self.reducer.required() and self.autoencoder is not None:
            made_for = self.autoencoder.config.lvlm_fingerprint
            if made_for not in ("", self.lvlm.fingerprint):
                warnings.warn(
                    f"the autoencoder, and a policy on its codes, were trained on another LVLM "
                    f"({made_for[:19]}...) than {self.lvlm.name} ({self.lvlm.fingerprint[:19]}...):"
                    f" measure how well it prunes this one, with a store that this one encoded",
                    stacklevel=3,
                )
        if "relevance" in self.reducer.required():
            raise ValueError(
                f"pruner {self.reducer.name!r} knows the built-in scenes' labels; it cannot prune "
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
        price: float | None = None,
        **model: Any,
    ) -> PrunedLVLM:
        """Load everything from folders.

        Args:
            lvlm: ``builtin:<task>``, a folder or a hub id, as for ``load_lvlm``.
            policy: Exported policy; it acts in as many steps as it was trained to take.
            autoencoder: Autoencoder of the store that the policy was trained on.
            threshold: Keep p > threshold (TPRL eq. 16) in one pass instead of an exact budget.
            redundancy_penalty: See ``PolicyPruner``; `tprl evaluate --calibration` finds one.
            price: Let the policy's count head choose how many tokens to keep at this price; budgets
                then have no effect. `tprl evaluate --mean-tokens` finds one.
            **model: Passed on to ``load_lvlm`` (device, dtype, revision).

        Raises:
            ValueError: A folder is missing or holds something else.
        """
        from tprl_env.lvlm import load_lvlm
        from tprl_env.policy.pruner import PolicyPruner

        fixed: dict[str, Any] = (
            {} if threshold is None else {"mode": "threshold", "threshold": threshold}
        )
        pruner: PolicyPruner
        if price is not None:
            from tprl_env.policy.counts import CountPruner

            pruner = CountPruner.of_folder(
                policy, price=price, redundancy_penalty=redundancy_penalty, **fixed
            )
        else:
            pruner = PolicyPruner.from_pretrained(
                policy, redundancy_penalty=redundancy_penalty, **fixed
            )
        return cls(load_lvlm(lvlm, **model), pruner, TokenAutoencoder.from_pretrained(autoencoder))

    def answer(
        self,
        picture: Any,
        question: str,
        budget: Budget,
        max_new_tokens: int = 20,
    ) -> PrunedAnswer:
        """Answer one question about one picture; see :meth:`answer_batch`."""
        return self.answer_batch([picture], [question], budget, max_new_tokens)[0]

    def answer_batch(
        self,
        pictures: Sequence[Any],
        questions: Sequence[str],
        budget: Budget,
        max_new_tokens: int = 20,
    ) -> list[PrunedAnswer]:
        """Encode, prune and answer.

        In float32 a batch answers as one picture at a time does. In bfloat16 the masks are equal,
        but where two words are nearly as likely, another batch size may round to the other one
        (20 to 23 of 24 texts were equal on random weights).

        Args:
            pictures: One per question: a path, a file's bytes, a PIL image, or an array or
                tensor, uint8 in 0..255 or float in 0..1, ``(H, W, 3)`` or ``(3, H, W)``; see
                ``tprl_env.data.pictures.as_picture``. A list for a question about several, in the
                order in which the prompt shows them.
            questions: Questions.
            budget: Tokens to leave, or a share in (0, 1] of each question's droppable ones; with a
                threshold it only informs the policy. For a layer pruner the average over decoder
                layers.
            max_new_tokens: Longest answer in tokens.

        Raises:
            ValueError: Different numbers of pictures and questions, a budget out of range, or
                something that is no picture.
        """
        answers: dict[int, PrunedAnswer] = {}
        for group in self._groups(pictures, questions, budget):
            left = group.left
            texts = self.lvlm.generate(
                group.prompts,
                left.tokens,
                left.keep,
                max_new_tokens,
                left.positions,
                **left.inside,
            )
            for number, text, visual, result in zip(
                group.rows, texts, group.visuals, left.results, strict=True
            ):
                answers[number] = PrunedAnswer(text, result.keep, visual.grid, *result.counted)
        return [answers[number] for number in range(len(questions))]

    def score_batch(
        self,
        pictures: Sequence[Any],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        budget: Budget,
    ) -> list[PrunedScore]:
        """Encode, prune, and score given answers without decoding.

        Args:
            pictures: As for :meth:`answer_batch`.
            questions: Questions.
            answers: Per question the accepted answers.
            budget: As for :meth:`answer_batch`.

        Raises:
            ValueError: As for :meth:`answer_batch`, or an answer that the tokenizer cannot write.
        """
        if len(answers) != len(questions):
            raise ValueError(
                f"expected accepted answers per question, got {len(answers)} lists for "
                f"{len(questions)} questions"
            )
        scores: dict[int, PrunedScore] = {}
        for group in self._groups(pictures, questions, budget):
            left = group.left
            ids = [
                [self.lvlm.answer_ids(prompt, answer) for answer in answers[number]]
                for number, prompt in zip(group.rows, group.prompts, strict=True)
            ]
            found = self.lvlm.score(
                group.prompts, ids, left.tokens, left.keep, left.positions, **left.inside
            )
            for place, (number, result) in enumerate(zip(group.rows, left.results, strict=True)):
                exact, likelihood = float(found.exact[place]), float(found.likelihood[place])
                scores[number] = PrunedScore(exact, likelihood, *result.counted)
        return [scores[number] for number in range(len(questions))]

    def _groups(
        self, pictures: Sequence[Any], questions: Sequence[str], budget: Budget
    ) -> Iterator[Group]:
        """Rows with one count of tokens each, pruned."""
        if isinstance(pictures, (str, bytes)) or isinstance(questions, str):
            raise ValueError("pictures and questions must be lists; for one of each use answer()")
        if len(pictures) != len(questions):
            raise ValueError(
                f"expected one question per picture, got {len(pictures)} pictures and "
                f"{len(questions)} questions"
            )
        images = [_taken(i, one) for i, one in enumerate(pictures)]
        encoded = iter(self.lvlm.encode_images([one for row in images for one in row]))
        visuals = [joined_visual([next(encoded) for _ in row], row) for row in images]
        prompts = [
            self.lvlm.prompt(question, [visual])
            for question, visual in zip(questions, visuals, strict=True)
        ]
        counts = [budget] * len(visuals)
        if isinstance(budget, (float, np.floating)) and not budget > 1:
            check_budget(budget)
            counts = [tokens_of(budget, int(_droppable(visual).sum())) for visual in visuals]
        for count in dict.fromkeys(counts):
            rows = [number for number, one in enumerate(counts) if one == count]
            some = [prompts[i] for i in rows], [visuals[i] for i in rows]
            left = self._left(*some, [images[i] for i in rows], count)
            yield Group(rows, *some, left)

    def _left(self, prompts: list[Any], visuals: list[Any], images: list[Any], count: Any) -> Left:
        """What the reducer leaves of each row."""
        if isinstance(self.reducer, LayerPruner):
            return self._inside(self.reducer, prompts, visuals, count)
        inputs = [self._inputs(v, p) for v, p in zip(visuals, prompts, strict=True)]
        self._fill(inputs, prompts, visuals, images)
        if isinstance(self.reducer, Merger):
            return self._merged(self.reducer, inputs, visuals, count)
        pruner = self.reducer
        if not isinstance(pruner, Pruner):
            raise ValueError(f"{pruner.name!r} is no pruner")
        keep = [mask.cpu().numpy() for mask in pruner.prune_batch(inputs, count)]
        whole = []
        for mask, visual in zip(keep, visuals, strict=True):
            droppable = _droppable(visual)
            whole.append(np.ones(len(droppable), np.bool_))
            whole[-1][droppable] = mask
        layers = np.uint8(self.lvlm.num_layers)
        results = [Result(mask, mask * layers, float(mask.sum())) for mask in keep]
        tokens = [visual.tokens for visual in visuals]
        return Left(tokens, whole, self.positions or "original", {}, results)

    def _merged(
        self, merger: Merger, inputs: list[PruneInputs], visuals: list[Any], count: Any
    ) -> Left:
        """A merger's tokens."""
        from tprl_env.lvlm.stored import beside_fixed

        merged = merger.merge_batch(inputs, count)
        whole = [
            beside_fixed(one, visual.tokens, visual.placement)
            for one, visual in zip(merged, visuals, strict=True)
        ]
        results = []
        for one, visual in zip(merged, visuals, strict=True):
            keep = np.zeros(int(_droppable(visual).sum()), np.bool_)
            keep[one.places.cpu().numpy()] = True
            lives = keep * np.uint8(self.lvlm.num_layers)
            results.append(Result(keep, lives, float(len(one.places))))
        return Left(
            [tokens.to(self.lvlm.device, self.lvlm.dtype) for tokens, _ in whole],
            None,
            self.positions or merger.positions,
            {
                "places": [places for _, places in whole],
                "sizes": [len(visual.tokens) for visual in visuals],
            },
            results,
        )

    def _inside(
        self, reducer: LayerPruner, prompts: list[Any], visuals: list[Any], average: float
    ) -> Left:
        """Tokens leave between the layers."""
        tokens = [visual.tokens for visual in visuals]
        wanted = float(average)
        found = self.lvlm.reduce(prompts, tokens, reducer, wanted, self.positions)
        results = []
        for one, visual in zip(found, visuals, strict=True):
            lives = one[_droppable(visual)]
            results.append(Result(lives > 0, lives, float(lives.sum()) / self.lvlm.num_layers))
        inside = {"reducer": reducer, "average": wanted}
        return Left(tokens, None, self.positions, inside, results)

    def _fill(
        self, inputs: list[PruneInputs], prompts: list[Any], visuals: list[Any], images: list[Any]
    ) -> None:
        """What only the LVLM can compute, where the reducer reads it."""
        needs, tokens = self.reducer.required(), [visual.tokens for visual in visuals]
        if "question_attention" in needs:
            maps = self.lvlm.question_attention(prompts, tokens)
            for one, saliency, visual in zip(inputs, maps, visuals, strict=True):
                one.question_attention = torch.as_tensor(saliency)[_droppable(visual)]
        if "question_rows" in needs:
            from tprl_env.reducers.layer.question_rows import QuestionRows

            rows = self.lvlm.saliency(prompts, tokens, QuestionRows(layer=0))
            for one, saliency, visual in zip(inputs, rows, visuals, strict=True):
                one.question_rows = torch.as_tensor(saliency)[_droppable(visual)]
        if "vision" in needs:
            for number, (one, row) in enumerate(zip(inputs, images, strict=True)):
                if len(row) > 1:
                    raise ValueError(
                        f"reducer {self.reducer.name!r} looks into the vision tower at one "
                        f"picture, question {number} of the batch has {len(row)}; take another"
                    )
                one.vision = self.lvlm.vision_signals(row[0])

    def _inputs(self, visual: Any, prompt: Any) -> PruneInputs:
        embeddings, dropped = self.lvlm.question_embeddings(prompt), _droppable(visual)
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


def _taken(number: int, given: Any) -> list[npt.NDArray[np.uint8]]:
    """The pictures of one question."""
    several = isinstance(given, (list, tuple))
    if several and not given:
        raise PictureError(f"picture {number}: an empty list; a question needs a picture")
    found = []
    for place, picture in enumerate(given if several else [given], start=1):
        try:
            found.append(as_picture(picture))
        except PictureError as error:
            which = f", number {place} of its {len(given)}" if several else ""
            raise PictureError(f"picture {number}{which}: {error}") from error
    return found
