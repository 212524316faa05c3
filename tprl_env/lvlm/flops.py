"""Floating-point operations and memory of an LVLM's pass, in closed form.

Matrix products only, as ``torch.utils.flop_counter.FlopCounterMode`` counts them: two operations
per multiply-accumulate, attention as a full square. `COUNTED` is that count. The other conventions
are those of published tables; they differ by more than 2x, so a printed figure names its own.

    per decoder layer, n tokens, width d, h heads of size s, g key-value heads, FFN width m:
    multiply-accumulates = 2 n d h s + 2 n d g s + 2 n^2 h s + 3 n d m

Lengths may be fractional: a published average need not be a whole number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_choice

if TYPE_CHECKING:
    from tprl_env.reducers.layer_pruner import Stage

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of text models whose layer has this form."""

TOWERS = ("clip_vision_model",)
"""``model_type`` of vision towers whose block has the form of :func:`tower_flops`."""


@dataclass(frozen=True)
class LanguageSizes:
    """Sizes of a decoder.

    Attributes:
        layers: Decoder layers L.
        width: Hidden size d.
        ffn_width: Inner width m of the gated feed-forward network.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_size: Width of one head.
        vocabulary: Rows of the output embedding.
    """

    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def from_config(cls, text_config: Any) -> LanguageSizes:
        """Sizes from a Transformers text config.

        Raises:
            ValueError: The layers of this ``model_type`` may have another form.
        """
        check_choice("model_type", text_config.model_type, LANGUAGE_MODELS)
        heads = int(text_config.num_attention_heads)
        width = int(text_config.hidden_size)
        return cls(
            layers=int(text_config.num_hidden_layers),
            width=width,
            ffn_width=int(text_config.intermediate_size),
            heads=heads,
            kv_heads=int(getattr(text_config, "num_key_value_heads", None) or heads),
            head_size=int(getattr(text_config, "head_dim", None) or width // heads),
            vocabulary=int(text_config.vocab_size),
        )

    @property
    def parameters(self) -> int:
        """Weights of layers, norms, and both embeddings (biases and head norms left out)."""
        attention = 2 * self.width * self.head_size * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.ffn_width + 2 * self.width
        return self.layers * layer + self.width + 2 * self.vocabulary * self.width


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a CLIP vision tower.

    Attributes:
        blocks: Transformer blocks.
        width: Hidden size.
        ffn_width: Inner width of the feed-forward network (two matrices).
        patches: Patches of one image or tile; a class token comes on top.
        patch_values: Values of a patch, channels included.
    """

    blocks: int
    width: int
    ffn_width: int
    patches: int
    patch_values: int

    @classmethod
    def from_config(cls, vision_config: Any) -> TowerSizes:
        """Sizes from a Transformers vision config.

        Raises:
            ValueError: The blocks of this ``model_type`` may have another form.
        """
        check_choice("model_type", vision_config.model_type, TOWERS)
        patch = int(vision_config.patch_size)
        return cls(
            blocks=int(vision_config.num_hidden_layers),
            width=int(vision_config.hidden_size),
            ffn_width=int(vision_config.intermediate_size),
            patches=(int(vision_config.image_size) // patch) ** 2,
            patch_values=patch * patch * int(getattr(vision_config, "num_channels", 3)),
        )


@dataclass(frozen=True)
class Convention:
    """How a table counts.

    Attributes:
        name: What a row of a table prints.
        operations: 2 for FLOPs, 1 for multiply-accumulates that are called FLOPs.
        ffn_matrices: 3 as the gated FFN has, or 2.
        grouped_heads: Whether keys and values have their own, smaller width.
        text: Whether text tokens count.
        tower: Whether vision tower and projector count.
        head: Whether the output embedding of one token counts.
        per_parameter: Count 2 operations per parameter and token, without the square of attention.
    """

    name: str
    operations: int = 2
    ffn_matrices: int = 3
    grouped_heads: bool = True
    text: bool = True
    tower: bool = True
    head: bool = True
    per_parameter: bool = False


COUNTED = Convention("FLOPs as FlopCounterMode counts them")
COUNTED_VISUAL = Convention("FLOPs, visual tokens only", text=False, tower=False, head=False)
TWO_MATRIX_MACS = Convention(
    "MACs, FFN of 2 matrices, visual tokens only (FastV)", 1, 2, False, False, False, False
)
TWO_MATRIX_MACS_WITH_TEXT = Convention(
    "MACs, FFN of 2 matrices, all tokens (DivPrune)", 1, 2, False, True, False, False
)
THREE_MATRIX_MACS = Convention(
    "MACs, FFN of 3 matrices, visual tokens only (PyramidDrop, TOP-RL)",
    *(1, 3, False, False, False, False),
)
THREE_MATRIX_MACS_WITH_TEXT = Convention(
    "MACs, FFN of 3 matrices, all tokens (SparseVLM)", 1, 3, False, True, False, False
)
TWICE_TWO_MATRIX = Convention(
    "2 x MACs, FFN of 2 matrices, visual tokens only", 2, 2, False, False, False, False
)
TWICE_THREE_MATRIX = Convention(
    "2 x MACs, FFN of 3 matrices, all tokens, no tower", 2, 3, False, True, False, False
)
PER_PARAMETER = Convention("2 x parameters x tokens, and the tower (TPRL)", per_parameter=True)


@dataclass(frozen=True)
class ModelSizes:
    """An LVLM: decoder, tower, and a projector of two matrices.

    Attributes:
        language: The decoder.
        tower: The vision tower.
        tower_blocks: Blocks that run; LLaVA leaves the last one out.
        tiles: Images or tiles that go through the tower.
    """

    language: LanguageSizes
    tower: TowerSizes | None = None
    tower_blocks: int | None = None
    tiles: int = 1


def language_flops(
    sizes: LanguageSizes,
    lengths: Sequence[float],
    *,
    head_rows: float = 0,
    convention: Convention = COUNTED,
) -> float:
    """A prefill without padding.

    Args:
        sizes: The decoder.
        lengths: Tokens, text included where it counts, that enter each layer.
        head_rows: Tokens whose logits are computed.
        convention: Its operations, matrices and heads; what enters is for the caller to choose,
            or for :func:`pass_flops`.

    Raises:
        ValueError: Not one length per layer.
    """
    _check_lengths(sizes, lengths)
    head = convention.operations * head_rows * sizes.vocabulary * sizes.width
    if convention.per_parameter:
        return float(2 * sizes.parameters * average_tokens(lengths))
    return head + convention.operations * sum(_layer_macs(sizes, n, n, convention) for n in lengths)


def decoding_flops(sizes: LanguageSizes, cached: Sequence[float], new_tokens: int) -> float:
    """Steps of one token each, logits included, behind ``cached`` tokens per layer.

    The first new token comes out of the prefill; ``new_tokens`` are those fed back.

    Raises:
        ValueError: Not one length per layer.
    """
    _check_lengths(sizes, cached)
    per_step = sum(
        _layer_macs(sizes, 1, n + step + 1, COUNTED) for step in range(new_tokens) for n in cached
    )
    return 2 * (per_step + new_tokens * sizes.vocabulary * sizes.width)


def attention_row_flops(sizes: LanguageSizes, queries: float, keys: float) -> float:
    """What a rule inside the LLM adds for ``queries`` rows of one layer's attention.

    Products of queries and keys over all heads; both exist where the layer has run.
    """
    return 2 * queries * keys * sizes.heads * sizes.head_size


def tower_flops(sizes: TowerSizes, blocks: int | None = None, tiles: int = 1) -> float:
    """The vision tower: patch embedding and ``blocks`` of it (default all), per tile."""
    n, d = sizes.patches + 1, sizes.width
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * sizes.ffn_width
    run = sizes.blocks if blocks is None else blocks
    return 2.0 * tiles * (run * block + sizes.patches * sizes.patch_values * d)


def projector_flops(tokens: float, tower_width: int, width: int) -> float:
    """LLaVA's projector: two matrices."""
    return 2 * tokens * (tower_width * width + width * width)


def pass_flops(
    sizes: ModelSizes,
    visual: Sequence[float],
    text_tokens: float,
    convention: Convention = COUNTED,
) -> float:
    """One prefill of an LVLM as a convention counts it.

    Args:
        sizes: The model.
        visual: Visual tokens that enter each decoder layer.
        text_tokens: Tokens of prompt and question; left out where the convention does.
        convention: How to count.

    Raises:
        ValueError: The convention counts the tower and the sizes have none, or not one length
            per layer.
    """
    text = text_tokens if convention.text else 0
    total = language_flops(
        sizes.language,
        [n + text for n in visual],
        head_rows=1 if convention.head else 0,
        convention=convention,
    )
    if not convention.tower:
        return total
    if sizes.tower is None:
        raise ValueError(
            f"{convention.name!r} counts the vision tower, got sizes without one; give "
            "ModelSizes(tower=...) or take a convention without it"
        )
    patches = sizes.tiles * sizes.tower.patches
    projector = projector_flops(patches, sizes.tower.width, sizes.language.width)
    return total + projector + tower_flops(sizes.tower, sizes.tower_blocks, sizes.tiles)


def kv_bytes(sizes: LanguageSizes, lengths: Sequence[float], bytes_per_value: int = 2) -> float:
    """Memory of keys and values behind a prefill; LLaVA-1.5-7B: 0.5 MiB a token in 16 bits.

    Raises:
        ValueError: Not one length per layer.
    """
    _check_lengths(sizes, lengths)
    return 2.0 * bytes_per_value * sizes.kv_heads * sizes.head_size * sum(lengths)


def average_tokens(lengths: Sequence[float]) -> float:
    """Mean over layers."""
    return sum(lengths) / len(lengths)


def lengths_of_lives(lives: npt.ArrayLike, num_layers: int) -> list[int]:
    """Visual tokens that enter each layer, from the layers that each token lives through.

    Args:
        lives: ``(N,)`` integers in [0, ``num_layers``]; 0 = dropped before the LLM.
        num_layers: Decoder layers L.

    Raises:
        ValueError: Another shape or a value outside.
    """
    found = np.asarray(lives)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(
            f"lives must be integers of one image (N,), got {found.dtype} of shape {found.shape}"
        )
    if found.size and not 0 <= int(found.min()) <= int(found.max()) <= num_layers:
        raise ValueError(f"lives must lie in [0, {num_layers}], got [{found.min()}, {found.max()}]")
    counts = np.bincount(found.astype(np.int64), minlength=num_layers + 1)
    return [int(n) for n in found.size - np.cumsum(counts)[:num_layers]]


def lengths_of_stages(stages: Sequence[Stage], num_tokens: int, num_layers: int) -> list[int]:
    """Visual tokens that enter each layer under a schedule."""
    lengths, alive = [], num_tokens
    keep = {stage.layer: stage.keep for stage in stages}
    for layer in range(num_layers):
        alive = min(alive, keep.get(layer, alive))
        lengths.append(alive)
    return lengths


def _layer_macs(sizes: LanguageSizes, queries: float, keys: float, convention: Convention) -> float:
    """Multiply-accumulates of one decoder layer."""
    inner = sizes.heads * sizes.head_size
    kv_inner = sizes.kv_heads * sizes.head_size if convention.grouped_heads else inner
    projections = 2 * queries * sizes.width * (inner + kv_inner)
    ffn = convention.ffn_matrices * queries * sizes.width * sizes.ffn_width
    return projections + 2 * queries * keys * inner + ffn


def _check_lengths(sizes: LanguageSizes, lengths: Sequence[float]) -> None:
    if len(lengths) != sizes.layers:
        raise ValueError(
            f"got {len(lengths)} lengths, expected one per decoder layer: {sizes.layers}; "
            "lengths_of_lives and lengths_of_stages make them"
        )
