"""The token autoencoder's network (TPRL eq. 1) and its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tprl_env.checks import check_integer
from tprl_env.policy.weights import WIDEST, load_module, read_config, save_weights

Space = Literal["tokens", "tower"]

CHUNK_TOKENS = 16_384  # tokens per forward pass outside training
_KIND = "token-autoencoder"


@dataclass(frozen=True)
class AutoencoderConfig:
    """What ``config.json`` holds.

    Attributes:
        input_width: Width d_v of the tokens.
        code_width: Width d of the codes.
        hidden: Width of the hidden layers.
        space: Which features are encoded: ``"tokens"`` (what the LLM gets) or ``"tower"``.
        lvlm_fingerprint: LVLM whose features it was trained on; empty before training.
        reconstruction_error: Squared L2 error per token on held-out images; 0 before training.
        explained_variance: Explained part of the variance there; 0 before training.
    """

    input_width: int
    code_width: int
    hidden: int = 256
    space: Space = "tokens"
    lvlm_fingerprint: str = ""
    reconstruction_error: float = 0.0
    explained_variance: float = 0.0

    def __post_init__(self) -> None:
        """Refuse widths and spaces that do not exist.

        Raises:
            ValueError: A width is below one or the space is unknown.
        """
        for name in ("input_width", "code_width", "hidden"):
            value = getattr(self, name)
            if check_integer(f"autoencoder {name}", value, 1) > WIDEST:
                raise ValueError(f"autoencoder {name} must be at most {WIDEST}, got {value}")
        if self.space not in ("tokens", "tower"):
            raise ValueError(f"autoencoder space must be 'tokens' or 'tower', got {self.space!r}")


class TokenAutoencoder(nn.Module):
    """Token-wise autoencoder (TPRL eq. 1).

    ``encode``: Linear(d_v, 256), LayerNorm, GELU, Linear(256, d); ``decode`` mirrors it. Around
    the two, buffers set by :meth:`fit_scales` and :meth:`fit_codes` centre and scale: tokens by
    their mean and ONE common scale, so that eq. 1 changes by a constant factor only; codes to
    zero mean and unit variance per dimension, so that a policy gets well-scaled inputs. Both are
    undone in ``decode``, and both are the identity until they are fitted.

    Args:
        config: Widths and origin.
    """

    token_mean: Tensor
    token_scale: Tensor
    code_mean: Tensor
    code_scale: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden, code = config.input_width, config.hidden, config.code_width
        self.encoder = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, code)
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, width)
        )
        self.register_buffer("token_mean", torch.zeros(width))
        self.register_buffer("token_scale", torch.ones(()))
        self.register_buffer("code_mean", torch.zeros(code))
        self.register_buffer("code_scale", torch.ones(code))

    @property
    def code_width(self) -> int:
        """Width d of the codes."""
        return self.config.code_width

    def encode(self, tokens: Tensor) -> Tensor:
        """Return codes ``(..., d)`` of tokens ``(..., d_v)``, on the device of the tokens."""
        here = tokens.to(self.token_mean.device)
        raw = self.encoder((here - self.token_mean) / self.token_scale)
        return ((raw - self.code_mean) / self.code_scale).to(tokens.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Return reconstructed tokens ``(..., d_v)`` of codes ``(..., d)``."""
        scaled = self.decoder(codes * self.code_scale + self.code_mean)
        return scaled * self.token_scale + self.token_mean

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the reconstruction of tokens ``(..., d_v)``."""
        return self.decode(self.encode(tokens))

    def loss(self, tokens: Tensor) -> Tensor:
        """Return eq. 1: the squared L2 error per token, averaged over tokens."""
        return (self(tokens) - tokens).square().sum(-1).mean()

    @torch.no_grad()
    def fit_scales(self, tokens: Tensor) -> None:
        """Set the centre and the common scale of tokens ``(n, d_v)``."""
        self.token_mean.copy_(tokens.mean(0))
        scale = (tokens - self.token_mean).square().mean().sqrt()
        self.token_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    @torch.no_grad()
    def fit_codes(self, tokens: Tensor) -> None:
        """Make the codes of tokens ``(n, d_v)`` zero-mean and unit-variance per dimension."""
        parts = [
            self.encoder((part - self.token_mean) / self.token_scale)
            for part in tokens.split(CHUNK_TOKENS)
        ]
        raw = torch.cat(parts)
        scale = raw.std(0, correction=0)
        self.code_mean.copy_(raw.mean(0))
        self.code_scale.copy_(torch.where(scale > 1e-6, scale, torch.ones_like(scale)))

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and every weight."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``, each atomically."""
        save_weights(folder, kind=_KIND, config=asdict(self.config), module=self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TokenAutoencoder:
        """Load what ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: A file is damaged, fields or tensors are missing, unknown or of another
                shape, or weights are not finite.
        """
        content = read_config(folder, kind=_KIND)
        known = {field.name for field in fields(AutoencoderConfig)}
        if set(content) != known:
            raise ValueError(
                f"the autoencoder's config.json in {folder} has missing or unknown fields "
                f"{sorted(known ^ set(content))}; save the model again"
            )
        config = AutoencoderConfig(**content)
        model = load_module(folder, kind=_KIND, config=content, build=lambda: cls(config))
        return model.eval().requires_grad_(False)
