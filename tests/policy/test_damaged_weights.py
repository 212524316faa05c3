"""Weights that are flipped, not finite or larger than their file are refused when loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tprl_env.policy.autoencoder import AutoencoderConfig, TokenAutoencoder
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.policy.weights import has_digest

KINDS = {
    "policy": lambda: PruningPolicy(
        PolicyConfig(
            *(4, 3, 8, 2, 2, 16),
            query="tokens",
            question_heads=2,
            step_input=True,
            position_slots=5,
        )
    ),
    "autoencoder": lambda: TokenAutoencoder(AutoencoderConfig(input_width=6, code_width=2)),
}


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path):
    model = KINDS[request.param]()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(folder: Path, change, *, drop: tuple[str, ...] = ()) -> None:
    """Change the weights and keep the header, but for some of its fields."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = {k: v for k, v in file.metadata().items() if k not in drop}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(change(tensors), path, metadata=header)


def test_every_flipped_byte_is_refused_or_means_the_same(saved):
    model, folder = saved
    same = {key: value.clone() for key, value in model.state_dict().items()}
    rng, refused = np.random.default_rng(0), 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            try:
                loaded = type(model).from_pretrained(folder)
            except ValueError:
                refused += 1
                continue
            for key, value in loaded.state_dict().items():
                assert torch.equal(value, same[key])
            assert loaded.config == model.config
        path.write_bytes(whole)
    assert refused > 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("drop", [(), ("sha256",)])
def test_weights_that_are_not_finite_are_refused(saved, value: float, drop: tuple[str, ...]):
    model, folder = saved
    key, weight = next((k, v) for k, v in model.named_parameters() if v.dim() == 2)
    weight.data[0, 0] = value
    model.save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors, drop=drop)
    with pytest.raises(ValueError, match=rf"weights that are not finite, in {key};"):
        type(model).from_pretrained(folder)


def test_a_flipped_weight_is_named_as_damage_and_older_saves_still_load(saved):
    model, folder = saved
    key = next(k for k, v in model.named_parameters() if v.dim() == 2)

    def change(tensors):
        tensors[key][0, 0] *= -1.5
        return tensors

    assert has_digest(folder)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"damaged: its weights are not those that were saved"):
        type(model).from_pretrained(folder)
    rewrite(folder, lambda tensors: tensors, drop=("sha256",))
    assert not has_digest(folder)
    type(model).from_pretrained(folder)


@pytest.mark.parametrize("size", [10**12, 10**30, 1 << 20, 900, 2.0**40, True, "9", None])
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(("policy", f) for f in ("token_width", "query_width", "layers", "position_slots")),
        *(("policy", f) for f in ("width", "hidden", "max_steps", "question_heads", "heads")),
        *(("autoencoder", f) for f in ("input_width", "code_width", "hidden")),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(
    tmp_path: Path, kind: str, field: str, size: object
):
    """With the same change in the header, as one who means harm would make it."""
    model = KINDS[kind]()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), field: size}
    path.write_text(json.dumps(config))
    name = config.pop("kind")
    save_file(
        model.state_dict(),
        tmp_path / "model.safetensors",
        metadata={"kind": name, "config": json.dumps(config, sort_keys=True)},
    )
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"{field}|model.safetensors") as caught:
        type(model).from_pretrained(tmp_path)
    assert time.monotonic() - begun < 3 and len(str(caught.value)) < 1000
