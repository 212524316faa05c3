"""Training the token autoencoder (TPRL eq. 1) and writing its codes into stores.

Codes are what the policy reads; the LVLM never sees them, it always gets the original tokens
that are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import CODES, FeatureStore
from tprl_env.policy.autoencoder import CHUNK_TOKENS, AutoencoderConfig, Space, TokenAutoencoder

__all__ = [
    "AutoencoderConfig",
    "AutoencoderReport",
    "TokenAutoencoder",
    "train_autoencoder",
    "write_codes",
]

HELD_OUT = 0.05  # part of the images that is never trained on
POOL_BYTES = 512 << 20  # tokens in memory at a time while training
POOL_STEPS = 500  # steps before other images are drawn into a pool that cannot hold all


@dataclass(frozen=True)
class AutoencoderReport:
    """How a training went.

    Attributes:
        reconstruction_error: Squared L2 error per token, averaged over the tokens of held-out
            images, in the units of the tokens (eq. 1).
        explained_variance: 1 - error / variance of those tokens.
        seconds: Wall-clock time.
        steps: Optimisation steps.
        held_out_images: Images the two numbers were measured on; 0 when the store has a single
            image and they were measured on that.
    """

    reconstruction_error: float
    explained_variance: float
    seconds: float
    steps: int
    held_out_images: int


def train_autoencoder(
    store: FeatureStore,
    *,
    code_width: int | None = None,
    steps: int = 2000,
    batch_tokens: int = 512,
    lr: float = 2e-3,
    seed: int = 0,
    space: Space = "tokens",
    standardise: bool = True,
    normalise_codes: bool = True,
    hidden: int = 256,
    device: str | torch.device | None = None,
) -> tuple[TokenAutoencoder, AutoencoderReport]:
    """Train an autoencoder on the images of a store (AdamW, 5 % warm-up, cosine to zero).

    Args:
        store: A finished store; 5 % of its images are held out.
        code_width: Width of the codes; by default a sixteenth of the token width (at least 4).
        steps: Optimisation steps.
        batch_tokens: Tokens per step.
        lr: Peak learning rate.
        seed: Seed of weights, held-out images and batches.
        space: Encode the LLM's tokens or the vision tower's features.
        standardise: Centre tokens and divide them by one common scale before encoding.
        normalise_codes: Give codes zero mean and unit variance per dimension at the end.
        hidden: Width of the hidden layers.
        device: Default: the GPU if there is one.

    Returns:
        The frozen model and its report.

    Raises:
        ValueError: A number is below one, or the codes would be wider than the features.
        StoreError: ``space="tower"`` and the store has no tower features.
        FloatingPointError: The loss stopped being finite.
    """
    for name, value in (("steps", steps), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    started = time.perf_counter()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    width = _input_width(store, space)
    if code_width is not None and not 1 <= code_width <= width:
        raise ValueError(
            f"code_width must lie between 1 and the width of the features, {width}, got "
            f"{code_width}; the default is {max(width // 16, 4)}"
        )
    config = AutoencoderConfig(
        width, code_width or max(width // 16, 4), hidden, space, store.manifest.lvlm_fingerprint
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(store.num_images)
    held_out = max(int(HELD_OUT * len(order)), 1) if len(order) > 1 else 0
    test, train = order[:held_out], order[held_out:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TokenAutoencoder(config).to(where)
    pool = _load_pool(store, train, space, rng)
    if standardise:
        model.fit_scales(pool.float().to(where))
    _fit(model, store, train, pool, steps, batch_tokens, lr, rng)
    pool = _load_pool(store, train, space, rng)
    if normalise_codes:
        model.fit_codes(pool[: 16 * CHUNK_TOKENS].float().to(where))
    model.eval().requires_grad_(False)
    error, explained = _measure(model, _load_pool(store, test if held_out else train, space, rng))
    seconds = time.perf_counter() - started
    model.config = replace(config, reconstruction_error=error, explained_variance=explained)
    return model, AutoencoderReport(error, explained, seconds, steps, held_out)


def _fit(
    model: TokenAutoencoder,
    store: FeatureStore,
    images: npt.NDArray[np.int64],
    pool: Tensor,
    steps: int,
    batch_tokens: int,
    lr: float,
    rng: np.random.Generator,
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / warm_up,
            0.5 * (1 + math.cos(math.pi * max(step - warm_up, 0) / max(steps - warm_up, 1))),
        ),
    )
    total = int(sum(store.image_count(int(image)) for image in images))
    # The scale makes the loss per token independent of the tokens' units (Adam's epsilon).
    unit = model.token_scale.square() * model.config.input_width
    for step in range(steps):
        if step and step % POOL_STEPS == 0 and len(pool) < total:
            pool = _load_pool(store, images, model.config.space, rng)
        index = torch.from_numpy(rng.integers(len(pool), size=batch_tokens))
        batch = pool[index].to(model.token_mean.device).float()
        loss = model.loss(batch) / unit
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the autoencoder's loss is {loss.item()} at step {step}; lower lr (now {lr})"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def _input_width(store: FeatureStore, space: Space) -> int:
    if space == "tower":
        if not store.manifest.tower_width:
            raise StoreError(
                f"{store.path} has no vision-tower features; encode with tower=True or train on "
                f"space='tokens'"
            )
        return store.manifest.tower_width
    return store.token_width


def _image_features(store: FeatureStore, image: int, space: Space) -> npt.NDArray[np.float16]:
    features = store.image_tokens(image) if space == "tokens" else store.image_tower(image)
    if features is None:
        raise StoreError(f"{store.path} has no vision-tower features; encode with tower=True")
    return features


def _load_pool(
    store: FeatureStore, images: npt.NDArray[np.int64], space: Space, rng: np.random.Generator
) -> Tensor:
    """Load tokens of random images into one float16 tensor of at most ``POOL_BYTES``."""
    parts: list[npt.NDArray[np.float16]] = []
    size = 0
    for image in rng.permutation(images):
        part = _image_features(store, int(image), space)
        if parts and size + part.nbytes > POOL_BYTES:
            break
        parts.append(part)
        size += part.nbytes
    return torch.from_numpy(np.concatenate(parts))


@torch.no_grad()
def _measure(model: TokenAutoencoder, tokens: Tensor) -> tuple[float, float]:
    """Return the error of eq. 1 and the explained variance on tokens ``(n, d_v)``."""
    error, device = 0.0, model.token_mean.device
    for part in tokens.split(CHUNK_TOKENS):
        batch = part.to(device).float()
        error += float((model(batch) - batch).square().sum(dtype=torch.float64))
    everything = tokens.double()
    variance = float((everything - everything.mean(0)).square().sum())
    return error / len(tokens), 1.0 - error / max(variance, 1e-12)


@torch.no_grad()
def write_codes(
    store: FeatureStore,
    autoencoder: TokenAutoencoder,
    dtype: Literal["float16", "float32"] = "float16",
) -> None:
    """Write the per-image channel ``"codes"``; replaces codes that are there.

    The store may be another split's than the one the autoencoder was trained on, as long as the
    same LVLM encoded both.

    Args:
        store: A finished store.
        autoencoder: A trained model.
        dtype: Type on disk; readers always get float32.

    Raises:
        StoreError: The widths or the LVLM do not fit, or codes are not finite.
    """
    config = autoencoder.config
    width = _input_width(store, config.space)
    if width != config.input_width:
        raise StoreError(
            f"{store.path} has {config.space} of width {width}, the autoencoder reads "
            f"{config.input_width}; train one with `tprl autoencoder {store.path}`"
        )
    if config.lvlm_fingerprint not in ("", store.manifest.lvlm_fingerprint):
        raise StoreError(
            f"{store.path} was encoded by the LVLM {store.manifest.lvlm} (fingerprint "
            f"{store.manifest.lvlm_fingerprint}), the autoencoder belongs to "
            f"{config.lvlm_fingerprint}; train one with `tprl autoencoder {store.path}`"
        )
    meta: dict[str, Any] = {"fingerprint": autoencoder.fingerprint, **asdict(config)}
    store.write_channel(CODES, _codes(store, autoencoder), per="image", meta=meta, dtype=dtype)


def _codes(store: FeatureStore, autoencoder: TokenAutoencoder) -> Iterator[npt.NDArray[np.float32]]:
    device = autoencoder.token_mean.device
    step = max(CHUNK_TOKENS // store.max_tokens, 1)
    for start in range(0, store.num_images, step):
        images = range(start, min(start + step, store.num_images))
        parts = [_image_features(store, image, autoencoder.config.space) for image in images]
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        codes = autoencoder.encode(tokens.to(device)).cpu()
        yield from (c.numpy() for c in codes.split([len(part) for part in parts]))
