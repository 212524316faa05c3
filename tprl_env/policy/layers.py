"""The building blocks of the pruning policy (TPRL eq. 9-18).

Shapes: B batch, N visual tokens, L = N + 1 with the query, d code width, Q question tokens, d_q
query width, w policy width, H question heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttentionBlock(nn.Module):
    """F = LayerNorm(X + MHA(X)) (TPRL eq. 10, 11)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix rows of ``x`` (B, L, w); ``mask`` (B, 1, 1, L) is True where a key may be seen."""
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.norm(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class ResidualHead(nn.Module):
    """g = LayerNorm(f + W2 GELU(W1 f + b1) + b2), then w.g + b (TPRL eq. 12, 13, 17, 18).

    ``extra`` widens the input of W1 by features that are not part of the residual path.
    """

    def __init__(self, width: int, hidden: int, extra: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(width + extra, hidden)
        self.outer = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def forward(self, f: Tensor, extra: Tensor | None = None) -> Tensor:
        """Map (..., w) [and (..., extra)] to (...)."""
        wide = f if extra is None else torch.cat([f, extra], dim=-1)
        g = self.norm(f + self.outer(F.gelu(self.inner(wide))))
        return self.score(g).squeeze(-1)


class AreaEncoding(nn.Module):
    """Vectors for tokens by where they are in their picture, for pictures of any shape and tiling.

    Sines and cosines of the token's middle at four frequencies per axis, the logarithms of its
    sides, and its picture's number; then one linear map.

    Args:
        width: Width of the vectors.
    """

    FREQUENCIES = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(4 * self.FREQUENCIES + 3, width, bias=False)

    def forward(self, areas: Tensor) -> Tensor:
        """(B, N, w) from (B, N, 5): picture, top, left, bottom, right as shares of the picture."""
        first, last = areas[..., 1:3], areas[..., 3:5]
        scales = torch.pi * 2.0 ** torch.arange(self.FREQUENCIES, device=areas.device)
        angles = ((first + last) / 2)[..., None] * scales.to(areas.dtype)
        sides = (last - first).clamp(min=1e-4).log()
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
        encoded: Tensor = self.out(torch.cat([waves, sides, areas[..., :1]], -1))
        return encoded


class QuestionMatch(nn.Module):
    """How well each visual token matches the question's tokens, as a feature of width w.

    H bilinear scores between a visual and every question token; the maximum and the log-sum over
    question tokens are mapped linearly. Sixteen dimensions per head.
    """

    def __init__(self, token_width: int, query_width: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.token_key = nn.Linear(token_width, 16 * heads)
        self.question_key = nn.Linear(query_width, 16 * heads)
        self.out = nn.Linear(2 * heads, width)

    def forward(self, tokens: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        """(B, N, d), (B, Q, d_q), bool (B, Q) -> (B, N, w); rows without a question get 0."""
        keys = self.token_key(tokens).unflatten(-1, (self.heads, 16)).transpose(1, 2)
        asks = self.question_key(question).unflatten(-1, (self.heads, 16)).permute(0, 2, 3, 1)
        scores = (keys @ asks) / 4.0  # (B, H, N, Q); 4 = sqrt(16)
        if not bool(mask.all()):
            scores = scores.masked_fill(~mask[:, None, None], -1e4)
        pooled = torch.cat([scores.amax(-1), scores.logsumexp(-1)], dim=1).transpose(1, 2)
        return self.out(pooled) * mask.any(1)[:, None, None]
