"""Fewer visual tokens for a plain transformers model, in three lines.

>>> pruner = TokenPruner.from_pretrained("my/policy")            # doctest: +SKIP
>>> inputs = pruner.prune(model, processor_inputs, budget=0.2)   # doctest: +SKIP
>>> model.generate(**inputs)                                     # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tprl_env.env.budgets import Budget, check_budget, tokens_of
from tprl_env.inference.jobs import Job, picture_groups, together
from tprl_env.inference.origin import Origin
from tprl_env.inference.reducing import (
    check_reducer,
    make_inputs,
    reduce_all,
    wants_areas,
    wants_question,
)
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.reducers.interfaces import Merger, Positions, PruneInputs, Pruner, Reducer

if TYPE_CHECKING:
    from tprl_env.lvlm.processed.assembling import Left, PrunedInputs
    from tprl_env.lvlm.processed.question import QuestionFrame
    from tprl_env.lvlm.processed.reading import ReadPrompt

Spans = Sequence[tuple[int, int]]
_OF_THE_LLM = ("question_attention", "question_rows")


@dataclass(frozen=True, eq=False)
class TokenPruner:
    """Shortens what a processor made of texts and pictures, before the language model sees it.

    Attributes:
        reducer: A policy, or a published pruner or merger before the language model.
        autoencoder: Makes the codes that a policy looks at; not needed by other reducers.
        budget: Where :meth:`prune` gets none.
        question: What the checkpoint's template puts around a question; needed by reducers that
            look at it (policies do), unless ``prune`` is told where the questions are.
        origin: What a policy was trained on; checked against the model that is pruned.
        allow_other_lvlm: Prune models other than the one a policy was trained on, with a warning.
        positions: Rotary positions of what is left. ``None``: a pruner keeps its tokens' own, as
            in training; mergers do what their authors' code does.
    """

    reducer: Reducer
    autoencoder: TokenAutoencoder | None = None
    budget: Budget | None = None
    question: QuestionFrame | None = None
    origin: Origin | None = None
    allow_other_lvlm: bool = False
    positions: Positions | None = None
    _seen: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a reducer whose inputs are not there before the language model.

        Raises:
            ValueError: It is inside the language model, or looks at its attention; it needs codes
                and there is no autoencoder; it needs a label; or the budget is none.
        """
        check_reducer(self.reducer, self.autoencoder)
        inside = [need for need in self.reducer.required() if need in _OF_THE_LLM]
        if inside or not isinstance(self.reducer, (Pruner, Merger)):
            raise ValueError(
                f"{self.reducer.name!r} works inside the language model, so that inputs cannot be "
                f"pruned in front of it; use PrunedLVLM(lvlm, reducer), or a reducer such as "
                f"divprune"
            )
        if self.budget is not None:
            check_budget(self.budget)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        allow_other_lvlm: bool = False,
        **settings: Any,
    ) -> TokenPruner:
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            source: Folder, or hub id ``owner/name``.
            revision: Branch, tag or commit of a hub repository.
            allow_other_lvlm: See the class.
            **settings: Fields of ``PolicyPruner`` to act differently than saved, such as
                ``redundancy_penalty``.

        Raises:
            FileNotFoundError: There is no such folder or repository, or a file is missing.
            ValueError: A file is damaged, or files of different saves are mixed.
        """
        from tprl_env.inference.bundle import load_bundle

        made = load_bundle(source, revision, settings)
        return dataclasses.replace(made, allow_other_lvlm=allow_other_lvlm)

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        results: str | Path | None = None,
        budget: Budget | None = None,
        lvlm: Any = None,
        autoencoder: str | Path | None = None,
        **settings: Any,
    ) -> TokenPruner:
        """The policy of a training run, with all that belongs to it.

        Args:
            run: Folder of ``tprl train``.
            results: Folder or ``results.json`` of ``tprl evaluate`` on this policy, for the model
                card.
            budget: Default budget; else the largest count that the policy was trained for.
            lvlm: The run's LVLM, loaded; ``None`` loads it.
            autoencoder: Its folder; ``None`` takes the one in the run's store.
            **settings: Fields of ``PolicyPruner``, such as ``redundancy_penalty``.

        Raises:
            FileNotFoundError: The run, its store or its LVLM is not where the run has it.
            ValueError: Something of them does not fit, or ``results`` are of another policy.
        """
        from tprl_env.inference.export import read_run

        return read_run(run, results, budget, lvlm, autoencoder, settings)

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> Path:
        """Write policy, autoencoder, settings and a model card.

        Args:
            folder: Made if needed; may hold an earlier save.
            license: Identifier for the card, such as ``"apache-2.0"``.

        Returns:
            The folder.

        Raises:
            ValueError: The reducer is no policy, or it is not known what it was trained on.
            OSError: The folder cannot be written.
        """
        from tprl_env.inference.bundle import save_bundle

        return save_bundle(self, Path(folder), license=license)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, license: str | None = None, **upload: Any
    ) -> str:
        """Save and upload to a model repository of the hub, which is made if needed.

        Args:
            repo_id: ``owner/name``.
            private: Whether a new repository is private.
            license: As in :meth:`save_pretrained`.
            **upload: Passed on to ``HfApi.upload_folder``, such as ``commit_message``.

        Returns:
            Address of the commit.

        Raises:
            ValueError: As in :meth:`save_pretrained`, or the hub's own errors.
        """
        from tprl_env.inference.bundle import push_bundle

        return push_bundle(self, repo_id, private, license, upload)

    def prune(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        budget: Budget | None = None,
        *,
        per_picture: bool = False,
        question_spans: Spans | None = None,
    ) -> PrunedInputs:
        """Inputs for ``model(**inputs)`` or ``model.generate(**inputs, ...)`` with fewer tokens.

        The model is not changed; its vision tower runs once, here. Texts, and newlines between
        rows of tiles, always stay. What is left keeps the positions of the full prompt, so the
        answer is that of the model with the other tokens masked out.

        Args:
            model: A model of the library, of any family in ``PLACES``.
            inputs: What its processor made of one or more texts and their pictures; several
                pictures per text are fine, padding on either side.
            budget: Visual tokens to leave of each prompt, its pictures together: a count, or a
                float in (0, 1], a share of the droppable tokens. 0 drops them all, a count above
                their number keeps all. A policy with a threshold takes it as information.
            per_picture: The budget is about each picture on its own instead.
            question_spans: (start, stop) of the question's ids in each row of ``input_ids``,
                padding included, where the prompts do not follow the checkpoint's template.

        Returns:
            A mapping, padded on the left; see :class:`PrunedInputs`.

        Raises:
            ValueError: The policy was trained on another LVLM; there is no picture, or a video;
                the budget cannot be; placeholders and pictures do not fit together; or a question
                cannot be found.
        """
        from tprl_env.lvlm.processed.assembling import assemble
        from tprl_env.lvlm.processed.reading import check_model, read

        wanted = self.budget if budget is None else budget
        if wanted is None:
            raise ValueError("there is no default budget; pass budget=, a count or a share")
        check_budget(wanted)
        check_model(model)
        self._check_lvlm(model)
        prompts = read(model, inputs)
        questions = self._questions(model, inputs, prompts, question_spans)
        jobs = [
            Job(prompt, question, first, last)
            for prompt, question in zip(prompts, questions, strict=True)
            for first, last in picture_groups(len(prompt.pictures.placements), per_picture)
        ]
        seen = [self._inputs(model, inputs, job) for job in jobs]
        budgets = [tokens_of(wanted, one.num_tokens) for one in seen]
        assert isinstance(self.reducer, (Pruner, Merger))
        found = reduce_all(self.reducer, seen, budgets)
        left: dict[int, list[Left]] = {id(prompt): [] for prompt in prompts}
        for job, (places, tokens) in zip(jobs, found, strict=True):
            left[id(job.prompt)].append(job.left(places, tokens))
        whole = [together(left[id(prompt)], prompt) for prompt in prompts]
        own = self.reducer.positions if isinstance(self.reducer, Merger) else "original"
        return assemble(model, prompts, whole, self.positions or own)

    def _check_lvlm(self, model: Any) -> None:
        """Refuse, or warn about, a model that the policy was not trained on; once per model."""
        if self.origin is None or model in self._seen:
            return
        from tprl_env.lvlm.processed.identity import model_signature

        try:
            same = model_signature(model) == self.origin.lvlm_signature
        except ValueError:
            if not self.allow_other_lvlm:
                raise
            same = False
        if not same:
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            what = (
                f"the policy was trained on {self.origin.lvlm} "
                f"({self.origin.lvlm_fingerprint[:19]}...), and the weights of {name!r} are others"
            )
            if not self.allow_other_lvlm:
                raise ValueError(
                    f"{what}; load {self.origin.lvlm}, or pass allow_other_lvlm=True to prune it "
                    f"all the same, without knowing how well"
                )
            warnings.warn(f"{what}: nobody has measured how well it prunes", stacklevel=3)
        self._seen.add(model)

    def _questions(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        prompts: Sequence[ReadPrompt],
        spans: Spans | None,
    ) -> list[Tensor | None]:
        """(Q, d_q) embeddings of each prompt's question; None where the reducer needs none."""
        if not wants_question(self.reducer):
            return [None] * len(prompts)
        if spans is not None and len(spans) != len(prompts):
            raise ValueError(f"expected {len(prompts)} question_spans, one a row, got {len(spans)}")
        embed = model.get_input_embeddings()
        found: list[Tensor | None] = []
        for number, prompt in enumerate(prompts):
            if not len(prompt.visual_at):  # a prompt without a picture: nothing to choose
                found.append(None)
                continue
            if spans is not None:
                ids = _span(inputs, number, spans[number], int(model.config.image_token_id))
            elif self.question is None:
                raise ValueError(
                    f"{self.reducer.name!r} looks at the question; pass question_spans, (start, "
                    f"stop) of the question's ids in each row of input_ids, or give the "
                    f"TokenPruner question=QuestionFrame.of(load_lvlm(...))"
                )
            else:
                try:
                    start, stop = self.question.find(prompt.ids, prompt.visual_at)
                except ValueError as error:
                    raise ValueError(f"prompt {number}: {error}") from error
                ids = torch.from_numpy(prompt.ids[start:stop])
            with torch.no_grad():
                found.append(embed(ids.to(embed.weight.device)).float().cpu())
        return found

    def _inputs(self, model: Any, inputs: Mapping[str, Any], job: Job) -> PruneInputs:
        """What the reducer looks at, of one prompt or of one picture."""
        needs = set(self.reducer.required())
        if self.autoencoder is not None and self.autoencoder.config.space == "tower":
            needs.add("tower")
        if wants_areas(self.reducer) and not job.prompt.pictures.areas_known:
            raise ValueError(
                f"the policy looks at where tokens lie in their picture, and the processor of "
                f"{model.config.model_type} does not say how it cut a picture into tiles; use "
                f"PrunedLVLM, which prepares pictures itself"
            )
        more: dict[str, Any] = {}
        vision = None
        if needs & {"vision", "tower", "cls_attention"}:
            from tprl_env.lvlm.processed.tower import tower_signals

            pictures = range(job.first, job.last)
            towers = [
                tower_signals(model, inputs, job.prompt.first_picture + one) for one in pictures
            ]
            more["tower"] = torch.cat([one.features()[int(one.cls) :] for one in towers])
            if "cls_attention" in needs:
                rows = [one.block(one.cls_block).cls_attention().mean(0) for one in towers]
                more["cls_attention"] = torch.cat(rows)
            vision = towers[0]
            if "vision" in needs and len(towers) > 1:
                raise ValueError(
                    f"{self.reducer.name!r} looks into the tower of one picture, and a prompt has "
                    f"{len(towers)}; pass per_picture=True"
                )
        made = make_inputs(job.tokens, job.placement, job.question, self.autoencoder, **more)
        made.vision = vision if "vision" in needs else None
        return made


def _span(inputs: Mapping[str, Any], number: int, span: tuple[int, int], image: int) -> Tensor:
    """Ids of a question that the caller has pointed out."""
    row = inputs["input_ids"][number]
    start, stop = span
    if not 0 <= start < stop <= len(row) or bool((row[start:stop] == image).any()):
        raise ValueError(
            f"question_spans[{number}] is ({start}, {stop}); it must lie within the {len(row)} "
            f"places of input_ids, be no empty stretch, and hold no image placeholder"
        )
    return row[start:stop]
