"""Tiny random LLaVA checkpoints and an in-memory store, for tests without any download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = (
    "USER: ASSISTANT: what digit is ? color the there a at in row column red green blue yes no "
    "c1 c2 b1 b2 0 1 2 3 4 5 6 7 8 9"
).split()
QUESTIONS = ("what digit is at c1 ?", "is there a red digit in row c2 ?", "color at b1 ?")
IMAGE, PATCH = 32, 8
NUM_TOKENS = (IMAGE // PATCH) ** 2

LLAVA15_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def word_tokenizer(bos: str = "prepended") -> PreTrainedTokenizerFast:
    """Word-level, splitting at white space; ``bos`` is "prepended", "named" only, or "none"."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, bos)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which words carry their leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *QUESTIONS, *QUESTIONS], trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer, bos: str = "prepended") -> PreTrainedTokenizerFast:
    if bos == "prepended":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=None if bos == "none" else "<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def save_llava(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    chat_template: str | None = None,
    cls_attention_layer: int | None = None,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> Path:
    """Write a random LLaVA (3 tower and 3 decoder layers, grouped-query attention)."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(seed)
    extra = {} if cls_attention_layer is None else {"cls_attention_layer": cls_attention_layer}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE,
            patch_size=PATCH,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
            tie_word_embeddings=tie_word_embeddings,
        ),
        image_token_id=4,
        image_seq_length=NUM_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=0,
        tie_word_embeddings=tie_word_embeddings,
        **extra,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("vision" in name or "projector" in name):
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
        model.lm_head.weight[2] *= 1.6  # answers should end now and then
    model.save_pretrained(folder)
    size = {"height": IMAGE, "width": IMAGE}
    pictures = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def pictures(count: int, seed: int = 0, size: tuple[int, int] = (IMAGE, IMAGE)) -> list[Any]:
    """Random RGB pictures."""
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (count, *size, 3), dtype=np.uint8))


@dataclass
class MemoryStore:
    """What an LVLMScorer needs of a FeatureStore, held in memory."""

    encoded: list[np.ndarray]
    prompts: list[Any]
    answers: list[list[np.ndarray]]
    images: list[int]
    full: dict[str, np.ndarray]
    manifest: Any

    @property
    def max_tokens(self) -> int:
        return max(len(tokens) for tokens in self.encoded)

    def __len__(self) -> int:
        return len(self.prompts)

    def exists(self, samples: Sequence[int]) -> np.ndarray:
        counts = np.array([len(self.encoded[self.images[int(s)]]) for s in samples], np.int64)
        return np.arange(self.max_tokens)[None] < counts[:, None]

    def id(self, sample: int) -> str:
        return f"sample-{sample}"

    def full_scores(self, score_kind: str) -> np.ndarray:
        return self.full[score_kind]

    def image_number(self, sample: int) -> int:
        return self.images[sample]

    def tokens(self, sample: int) -> np.ndarray:
        return self.encoded[self.images[sample]]

    def visual(self, sample: int) -> SimpleNamespace:
        return SimpleNamespace(tokens=self.tokens(sample))

    def visual_at(self, sample: int) -> tuple[int, ...]:
        return self.prompts[sample].visual_at

    def placement(self, image: int) -> None:
        return None

    def fixed_count(self, image: int) -> int:
        return 0

    def prompt_ids(self, sample: int) -> np.ndarray:
        return np.array(self.prompts[sample].ids)

    def question_span(self, sample: int) -> tuple[int, int]:
        return self.prompts[sample].question_span

    def answer_ids(self, sample: int) -> list[np.ndarray]:
        return self.answers[sample]


def memory_store(lvlm: Any, samples: int = 12, seed: int = 0) -> MemoryStore:
    """Samples over half as many images; every third sample accepts two answers."""
    images = [i // 2 for i in range(samples)]
    visual = lvlm.encode_images(pictures((samples + 1) // 2, seed))
    prompts = [lvlm.prompt(QUESTIONS[i % len(QUESTIONS)]) for i in range(samples)]
    texts = [["7", "red c1"] if i % 3 == 0 else [str(i % 10)] for i in range(samples)]
    return MemoryStore(
        encoded=[v.tokens.float().cpu().numpy().astype(np.float16) for v in visual],
        prompts=prompts,
        answers=[
            [np.array(lvlm.answer_ids(p, a)) for a in accepted]
            for p, accepted in zip(prompts, texts, strict=True)
        ],
        images=images,
        full={m: np.ones(samples, np.float32) for m in ("exact", "likelihood")},
        manifest=SimpleNamespace(lvlm_fingerprint=lvlm.fingerprint, version=2),
    )
