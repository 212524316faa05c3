"""A frozen LVLM: what is alike in every family, on top of a language model and a vision part.

Shapes: B rows, n visual tokens of one image, D token width, Dv tower width, Q question tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.placement import Pictured
from tprl_env.lvlm.execution.language import LanguageModel
from tprl_env.lvlm.execution.question_map import question_map
from tprl_env.lvlm.execution.selection import Selection
from tprl_env.lvlm.loading.checkpoint import folder_fingerprint
from tprl_env.lvlm.loading.prompts import Prompter
from tprl_env.lvlm.loading.supported import end_ids
from tprl_env.lvlm.protocol import Inside, LVLMScores, Positions, Prompt, Visual
from tprl_env.reducers.layer_pruner import LayerPruner, RankingLayerPruner
from tprl_env.reducers.vision import VisionSignals


class VisionPart(Protocol):
    """What is in front of the language model."""

    backend: str
    width: int
    placed: bool

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Visual]:
        """Encode (H, W, 3) uint8 RGB pictures."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """(m, D) tokens for (m, Dv) features of the tower."""
        ...

    def signals(self, image: npt.NDArray[np.uint8]) -> VisionSignals:
        """The tower and the projector on one picture, on request."""
        ...

    def tower_pass(self, image: npt.NDArray[np.uint8]) -> Callable[[], object]:
        """What runs tower and projector on a picture that is prepared already."""
        ...


class FrozenLVLM:
    """Encodes images, and scores or answers from the tokens that are kept.

    Attributes:
        name: Folder name or hub id.
        device: Where it runs; of a model over several GPUs, where its input embeddings are.
        dtype: Weights and activations; logits are always computed in float32.
        image_backend: What prepares pictures: "pil", or "torchvision" where it is installed.
        max_positions: Places of the language model's context, visual tokens included.
        num_layers: Decoder layers of the language model.
        token_width: Width of the visual tokens: D, or D and DeepStack's levels behind it.
        query_width: D, width of the language model's input embeddings.
        tower_width: Dv of the features before the projector.
        image_token_id: The placeholder's id.
        placed: Whether prompts need their pictures before they can be run, because tokens stand
            otherwise than in one run at consecutive positions, or with text between them.
        model_type: The checkpoint's family.
    """

    def __init__(
        self,
        model: Any,
        text: Any,
        processor: Any,
        vision: VisionPart,
        name: str,
        fingerprint: str | Path,
        levels: int = 0,
    ) -> None:
        """Freeze ``model``; most callers want ``load_lvlm``.

        Args:
            model: One of the library's models that generate from images and text.
            text: Its language model, with ``layers``.
            processor: Has the tokenizer and the chat template.
            vision: What is in front of the language model.
            name: For messages and manifests.
            fingerprint: The fingerprint, or the folder to compute it from when first asked.
            levels: DeepStack levels.

        Raises:
            ValueError: The tokenizer or the template cannot be used; see :class:`Prompter`.
        """
        config = model.config
        self.name = name
        self.model_type = str(getattr(config, "model_type", ""))
        self._fingerprint = fingerprint
        self._model = model.eval().requires_grad_(False)
        self._text = text
        self.device: torch.device = text.embed_tokens.weight.device
        self.dtype: torch.dtype = model.dtype
        self.image_token_id = int(config.image_token_id)
        self._eos_ids = end_ids(model, processor.tokenizer)
        self._prompter = Prompter(processor, self.image_token_id, self._eos_ids[0])
        self._vision = vision
        self.image_backend, self.placed = vision.backend, vision.placed
        words = config.get_text_config()
        self.max_positions = int(words.max_position_embeddings)
        self._language = LanguageModel(
            text, model.lm_head, self._eos_ids, self.max_positions, levels, self.placed
        )
        self.num_layers = self._language.num_layers
        self.query_width = int(words.hidden_size)
        self.token_width = self.query_width * (1 + levels)
        self.tower_width = vision.width

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the folder's weights and configuration; ``name@commit`` for hub checkpoints.

        Computed when first asked, since hashing a large checkpoint takes seconds.
        """
        if isinstance(self._fingerprint, Path):
            return folder_fingerprint(self._fingerprint)
        return self._fingerprint

    @property
    def model(self) -> Any:
        """The library's own model, frozen."""
        return self._model

    @property
    def text_model(self) -> Any:
        """The library's language model, frozen."""
        return self._text

    def mark_changed(self, how: str) -> None:
        """Take another fingerprint: the weights are no longer those of the checkpoint.

        Args:
            how: What was done to them, in words.
        """
        told = f"{self.fingerprint} {how}".encode()
        self._fingerprint = f"changed:{hashlib.sha256(told).hexdigest()}"
        self.__dict__.pop("fingerprint", None)

    @property
    def text_config(self) -> Any:
        """Configuration of the language model: its depth and widths."""
        return self._text.config

    @property
    def _head(self) -> Tensor:
        return self._language.head

    @torch.inference_mode()
    def encode_images(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Visual]:
        """Encode pictures.

        Args:
            images: (H, W, 3) uint8 RGB each, any size; the checkpoint's own processor resizes.

        Returns:
            One :class:`Visual` per picture, tensors on the LVLM's device.
        """
        return self._vision.encode(images)

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """(m, D) visual tokens for (m, Dv) features of the tower."""
        return self._vision.project(features)

    def vision_signals(self, image: npt.NDArray[np.uint8]) -> VisionSignals:
        """What methods may ask of the tower and the projector for one picture, on request."""
        return self._vision.signals(image)

    def tower_pass(self, image: npt.NDArray[np.uint8]) -> Callable[[], object]:
        """What runs tower and projector on a picture that is prepared already, to be timed."""
        return self._vision.tower_pass(image)

    def prompt(self, question: str, visuals: Sequence[Pictured] | None = None) -> Prompt:
        """Tokenise ``question`` about pictures; see :meth:`Prompter.prompt` for the errors."""
        return self._prompter.prompt(question, visuals)

    def answer_ids(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """Ids of ``answer`` behind ``prompt`` with the end token; see :class:`Prompter`."""
        return self._prompter.answer_ids(prompt, answer)

    @torch.inference_mode()
    def question_embeddings(self, prompt: Prompt) -> Tensor:
        """(Q, d_q) float32 input embeddings of the question's text tokens, on the CPU."""
        ids = torch.tensor(prompt.ids[slice(*prompt.question_span)], device=self.device)
        embedded: Tensor = self._text.embed_tokens(ids)
        return embedded.float().cpu()

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Sequence[int]]],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        positions: Positions | None = None,
        **inside: Unpack[Inside],
    ) -> LVLMScores:
        """Teacher-force every distinct answer in ONE padded forward pass.

        Greedy decoding gives an answer exactly when each of its tokens, the end token included,
        is the arg-max at its place, so no decoding is needed. At the end place any of the
        checkpoint's end tokens counts, and their probabilities are added. Callers with many rows
        of mixed length should bucket them
        (:class:`~tprl_env.scoring.lvlm_scorer.LVLMScorer` does).

        Args:
            prompts: B prompts.
            answers: Per row the accepted answers as ids ending with an end token.
            tokens: Per row (n, D) visual tokens, array or tensor; one tensor may serve many rows.
            keep: Per row bool (n,), or ``None`` for all tokens. No token left is legal.
            positions: Rotary positions of what is left; default: the reducer's own where there is
                one, else original.
            **inside: What happens between the layers instead, or merged tokens; see
                :class:`~tprl_env.lvlm.protocol.Inside`.

        Raises:
            ValueError: Lengths differ, a row has no answer, an array does not fit, an average
                cannot be met, or a sequence does not fit into the context.
            NotFiniteError: The language model computes what is not a number.
        """
        return self._language.score(prompts, answers, tokens, Selection(keep, positions, **inside))

    def answer_loss(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        positions: Positions | None = None,
        **inside: Unpack[Inside],
    ) -> Tensor:
        """Mean negative log-probability of the answers' tokens, with gradients.

        What is trained is for the caller to add; the LVLM's own weights are frozen.

        Args:
            prompts: B prompts.
            answers: Per row one answer as ids ending with an end token.
            tokens: As for :meth:`score`.
            keep: As for :meth:`score`.
            positions: As for :meth:`score`.
            **inside: As for :meth:`score`.

        Raises:
            ValueError: As for :meth:`score`.
        """
        selection = Selection(keep, positions, **inside)
        return self._language.answer_loss(prompts, answers, tokens, selection)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights, configuration, tokenizer and image processor, as the library saves them.

        Args:
            folder: Made if needed; must not hold another checkpoint.

        Raises:
            ValueError: It does.
        """
        place = Path(folder)
        if (place / "config.json").exists():
            raise ValueError(f"{place} holds a checkpoint already; take another folder")
        parts = self._prompter.processor
        whole = hasattr(parts, "save_pretrained")
        for one in [parts] if whole else [parts.tokenizer, parts.image_processor]:
            one.save_pretrained(place)
        self._model.save_pretrained(place)  # last: a folder without weights is none
        return place

    def generate(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        max_new_tokens: int = 20,
        positions: Positions | None = None,
        **inside: Unpack[Inside],
    ) -> list[str]:
        """Answer greedily from the kept tokens; new tokens continue the prompt's positions.

        Args as in :meth:`score`.

        Raises:
            ValueError: Lengths differ, an array does not fit, or prompt and ``max_new_tokens`` do
                not fit into the context.
        """
        written = self.generate_ids(prompts, tokens, keep, max_new_tokens, positions, **inside)
        return [self._prompter.decode(ids) for ids in written]

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        max_new_tokens: int = 20,
        positions: Positions | None = None,
        **inside: Unpack[Inside],
    ) -> list[list[int]]:
        """As :meth:`generate`, but token ids without the end token."""
        selection = Selection(keep, positions, **inside)
        return self._language.generate_ids(prompts, tokens, max_new_tokens, selection)

    @torch.inference_mode()
    def reduce(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        reducer: LayerPruner,
        average: float | None = None,
        positions: Positions | None = None,
    ) -> list[npt.NDArray[np.uint8]]:
        """What a reducer inside the language model drops, running only the layers that it needs.

        Returns:
            Per row uint8 (n,), the number of decoder layers that each token enters; give it to
            :meth:`score` or :meth:`generate` as ``lives``, with the reducer's ``positions``.

        Raises:
            ValueError: As in :meth:`score`.
        """
        selection = Selection(None, positions, reducer=reducer, average=average)
        return self._language.reduce(prompts, tokens, selection)

    @torch.inference_mode()
    def saliency(
        self, prompts: Sequence[Prompt], tokens: Sequence[Any], rule: RankingLayerPruner
    ) -> list[npt.NDArray[np.float32]]:
        """Per row the values (n,) that a rule ranks by at its first cut, all tokens present."""
        return self._language.saliency(prompts, tokens, rule)

    @torch.inference_mode()
    def question_attention(
        self, prompts: Sequence[Prompt], tokens: Sequence[Any]
    ) -> list[npt.NDArray[np.float32]]:
        """The demonstrator: the largest attention that any question token pays a visual token.

        Maximum over all decoder layers, heads and question tokens, in one full pass with all
        visual tokens present; neither the weights nor later outputs are touched.

        Returns:
            Per row (n,) float32 in [0, 1].

        Raises:
            ValueError: The template puts the question before the image, where it cannot see it.
        """
        return question_map(self._language, prompts, tokens)
