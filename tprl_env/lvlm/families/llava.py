"""LLaVA-1.5 and every checkpoint saved as ``LlavaForConditionalGeneration``.

Shapes: B rows, n visual tokens of one image, D token width, Dv tower width, Q question tokens,
M answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tprl_env.lvlm.execution.attention import IMPLEMENTATION, QuestionProbe, probing
from tprl_env.lvlm.execution.decoder import greedy, judge, run_layers, states_at
from tprl_env.lvlm.execution.sequence import (
    Layout,
    check_context,
    check_rows,
    embed,
    layout,
    on_device,
)
from tprl_env.lvlm.loading.checkpoint import check_folder, folder_fingerprint, is_local, read_config
from tprl_env.lvlm.loading.prompts import Prompter
from tprl_env.lvlm.loading.supported import (
    check_kinds,
    check_parts,
    check_vocabulary,
    end_ids,
    pick_device,
    pick_dtype,
    read_llava_config,
)
from tprl_env.lvlm.loading.vision import VisionEncoder
from tprl_env.lvlm.loading.weights import load_model
from tprl_env.lvlm.protocol import LVLMScores, Positions, Prompt, Visual

_ATTENTION_ELEMENTS = 1 << 26


class LlavaLVLM:
    """A frozen LLaVA: encodes images, and scores or answers from the tokens that are kept.

    Attributes:
        name: Folder name or hub id.
        device: Where it runs.
        dtype: Weights and activations; logits are always computed in float32.
        image_backend: What prepares pictures: "pil", or "torchvision" where it is installed.
        max_positions: Places of the language model's context, visual tokens included.
        token_width: D, which is also ``query_width``.
        tower_width: Dv of the features before the projector.
        cls_attention_layer: Tower layer whose CLS attention ``encode_images`` reports. It is
            ``config.cls_attention_layer`` where the checkpoint's config.json has that field, else
            -2, the layer that makes LLaVA-1.5's features (FasterVLM, VisPruner).
        image_token_id: The placeholder's id.
    """

    def __init__(self, model: Any, processor: Any, name: str, fingerprint: str | Path) -> None:
        """Freeze ``model``; most callers want :meth:`from_pretrained`.

        Args:
            model: A ``LlavaForConditionalGeneration``.
            processor: Its ``LlavaProcessor``.
            name: For messages and manifests.
            fingerprint: The fingerprint, or the folder to compute it from when first asked.

        Raises:
            ValueError: The tokenizer or the template cannot be used; see :class:`Prompter`.
        """
        config = model.config
        self.name = name
        self._fingerprint = fingerprint
        self._model = model.eval().requires_grad_(False)
        self._text = model.model.language_model
        self._text.set_attn_implementation(IMPLEMENTATION)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.image_token_id = int(config.image_token_id)
        self._eos_ids = end_ids(model, processor.tokenizer)
        self._prompter = Prompter(processor, self.image_token_id, self._eos_ids[0])
        self._vision = VisionEncoder(model, processor.image_processor)
        self.cls_attention_layer = self._vision.cls_attention_layer
        self.image_backend = self._vision.backend
        self.max_positions = int(config.text_config.max_position_embeddings)
        self.token_width = self.query_width = int(config.text_config.hidden_size)
        self.tower_width = self._vision.width

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> LlavaLVLM:
        """Load a checkpoint from a local folder or the hub; safetensors only, no remote code.

        Args:
            checkpoint: Folder, or hub id ``owner/name``.
            device: Default: the GPU if there is one, else the CPU.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU. A name like ``"bfloat16"`` will
                do; on CPUs with bfloat16 instructions it scores up to twice as fast.
            revision: Branch, tag or commit of a hub repository.

        Raises:
            FileNotFoundError: No such folder or repository.
            ValueError: Not a LLaVA, parts that cannot be run, pickle weights, weights that are
                missing, left over or of another shape, or no such dtype.
        """
        checkpoint = str(checkpoint)
        plain = read_config(checkpoint, revision)
        kind = plain.get("model_type")
        if kind != "llava":
            raise ValueError(
                f"{checkpoint!r} has model_type {kind!r}, but LlavaLVLM loads 'llava'; "
                f"use load_lvlm(), which picks the class"
            )
        device = pick_device(device)
        local = check_folder(checkpoint) if is_local(checkpoint) else None
        source = str(local or checkpoint)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        check_kinds(plain, checkpoint)
        config = read_llava_config(LlavaConfig, source, checkpoint, **options)
        check_parts(config, checkpoint)
        processor = LlavaProcessor.from_pretrained(source, **options)
        check_vocabulary(config, processor.tokenizer, checkpoint)
        model = load_model(
            LlavaForConditionalGeneration,
            source,
            checkpoint=checkpoint,
            dtype=pick_dtype(dtype, device),
            **options,
        )
        model.to(device)
        commit = getattr(model.config, "_commit_hash", None)
        name = local.resolve().name if local else checkpoint
        return cls(model, processor, name, local or f"{checkpoint}@{commit or revision}")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the folder's weights and configuration; ``name@commit`` for hub checkpoints.

        Computed when first asked, since hashing a large checkpoint takes seconds.
        """
        if isinstance(self._fingerprint, Path):
            return folder_fingerprint(self._fingerprint)
        return self._fingerprint

    @cached_property
    def _head(self) -> Tensor:
        """(V, D) float32 output embedding; bfloat16 logits would tie and flip the arg-max."""
        weight: Tensor = self._model.lm_head.weight
        return weight.float()

    @torch.inference_mode()
    def encode_images(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Visual]:
        """Encode pictures.

        Args:
            images: (H, W, 3) uint8 RGB each, any size; the checkpoint's own processor resizes.

        Returns:
            One :class:`Visual` per picture, tensors on the LVLM's device.
        """
        return self._vision.encode(images)

    def prompt(self, question: str) -> Prompt:
        """Tokenise ``question``; see :meth:`Prompter.prompt` for the errors."""
        return self._prompter.prompt(question)

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
        positions: Positions = "original",
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
            positions: Rotary positions of what is left.

        Raises:
            ValueError: Lengths differ, a row has no answer, a mask does not fit, or a sequence
                does not fit into the context.
        """
        check_rows(prompts, tokens, keep, answers=answers)
        if not prompts:
            return LVLMScores(np.zeros(0, np.float32), np.zeros(0, np.float32))
        distinct = [list(dict.fromkeys(self._one_end(a) for a in row)) for row in answers]
        owner = [b for b, row in enumerate(distinct) for _ in row]
        targets = [answer for row in distinct for answer in row]
        visual = on_device(tokens, self.device, self.dtype, self.token_width)
        plan = layout(
            [prompts[b] for b in owner],
            [target[:-1] for target in targets],
            [len(visual[b]) for b in owner],
            [keep[b] for b in owner] if keep is not None else None,
            positions,
        )
        check_context(plan, self.max_positions, owner=owner)
        wrong, log_likelihood = self._teacher_force(plan, [visual[b] for b in owner], targets)
        exact = np.zeros(len(prompts), np.float32)
        np.maximum.at(exact, owner, (wrong == 0).astype(np.float32))
        likelihood = np.zeros(len(prompts), np.float64)
        np.add.at(likelihood, owner, np.exp(log_likelihood))
        clipped = np.minimum(likelihood, 1.0).astype(np.float32)
        return LVLMScores(exact, clipped, len(targets), plan.padded_tokens)

    def _one_end(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The answer with the first of its possible end tokens: any of them means the same."""
        ends = answer[-1] in self._eos_ids
        return (*answer[:-1], self._eos_ids[0]) if ends else tuple(answer)

    def _teacher_force(
        self, plan: Layout, visual: Sequence[Tensor], targets: Sequence[tuple[int, ...]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Per sequence the number of answer tokens that are not the arg-max, and sum of log p."""
        sizes = np.array([len(target) for target in targets])
        slot = np.arange(sizes.max())
        answered = slot[None] < sizes[:, None]
        places = np.minimum((plan.lengths - sizes)[:, None] + slot, plan.lengths[:, None] - 1)
        states = states_at(
            self._text,
            embed(plan, visual, self._text.embed_tokens),
            torch.from_numpy(plan.positions).to(self.device),
            torch.from_numpy(places).to(self.device),
        )[torch.from_numpy(answered).to(self.device)]
        wanted = torch.tensor([i for target in targets for i in target], device=self.device)
        ends = torch.tensor(self._eos_ids, device=self.device)
        hits, log_p = judge(states, self._head, wanted, ends)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        wrong = np.add.reduceat((~hits).cpu().numpy().astype(np.int64), starts)
        return wrong, np.add.reduceat(log_p.cpu().numpy().astype(np.float64), starts)

    def generate(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        max_new_tokens: int = 20,
        positions: Positions = "original",
    ) -> list[str]:
        """Answer greedily from the kept tokens; new tokens continue the prompt's positions.

        Raises:
            ValueError: Lengths differ, a mask does not fit, or prompt and ``max_new_tokens`` do
                not fit into the context.
        """
        written = self.generate_ids(prompts, tokens, keep, max_new_tokens, positions)
        return [self._prompter.decode(ids) for ids in written]

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        max_new_tokens: int = 20,
        positions: Positions = "original",
    ) -> list[list[int]]:
        """As :meth:`generate`, but token ids without the end token."""
        check_rows(prompts, tokens, keep)
        if not prompts:
            return []
        visual = on_device(tokens, self.device, self.dtype, self.token_width)
        counts = [len(t) for t in visual]
        plan = layout(prompts, [()] * len(prompts), counts, keep, positions, left=True)
        check_context(plan, self.max_positions, max_new_tokens)
        return greedy(
            self._text,
            self._head,
            embed(plan, visual, self._text.embed_tokens),
            torch.from_numpy(plan.positions).to(self.device),
            torch.from_numpy(plan.valid()).to(self.device),
            frozenset(self._eos_ids),
            max_new_tokens,
        )

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
        check_rows(prompts, tokens, None)
        if any(p.question_span[0] < p.image_at for p in prompts):
            raise ValueError(
                "question_attention needs the image before the question, but this checkpoint's "
                "template puts the question first"
            )
        found: list[npt.NDArray[np.float32]] = []
        visual = on_device(tokens, self.device, self.dtype, self.token_width)
        start = 0
        while start < len(prompts):
            stop = start + self._rows_per_probe(prompts[start], len(visual[start]))
            found += self._probe(prompts[start:stop], visual[start:stop])
            start = stop
        return found

    def _rows_per_probe(self, prompt: Prompt, count: int) -> int:
        """Rows whose (heads, question, places) attention stays within a quarter gigabyte."""
        heads = self._model.config.text_config.num_attention_heads
        places = len(prompt.ids) + count
        question = prompt.question_span[1] - prompt.question_span[0]
        return max(1, min(32, _ATTENTION_ELEMENTS // (heads * question * places)))

    def _probe(
        self, prompts: Sequence[Prompt], visual: Sequence[Tensor]
    ) -> list[npt.NDArray[np.float32]]:
        counts = np.array([len(t) for t in visual])
        plan = layout(prompts, [()] * len(prompts), counts.tolist(), None, "original")
        check_context(plan, self.max_positions)
        spans = np.array([p.question_span for p in prompts]) + (counts - 1)[:, None]
        rows = spans[:, :1] + np.arange((spans[:, 1] - spans[:, 0]).max())
        valid = rows < spans[:, 1:]
        images = np.array([p.image_at for p in prompts])[:, None]
        columns = images + np.minimum(np.arange(counts.max()), counts[:, None] - 1)
        probe = QuestionProbe(
            torch.from_numpy(np.minimum(rows, spans[:, 1:] - 1)).to(self.device),
            torch.from_numpy(valid).to(self.device),
            torch.from_numpy(columns).to(self.device),
        )
        hidden = embed(plan, visual, self._text.embed_tokens)
        with probing(probe):
            run_layers(self._text, hidden, torch.from_numpy(plan.positions).to(self.device))
        largest = probe.largest.cpu().numpy()
        return [largest[i, :count] for i, count in enumerate(counts)]
