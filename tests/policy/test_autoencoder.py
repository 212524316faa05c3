"""The autoencoder: eq. 1 in numbers, learning, files, codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_lvlm import FakeLVLM, make_samples

from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.policy.autoencoder_training import (
    AutoencoderConfig,
    TokenAutoencoder,
    train_autoencoder,
    write_codes,
)

QUICK = {"code_width": 4, "steps": 300, "batch_tokens": 64, "hidden": 32, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return encode_dataset(FakeLVLM(), make_samples(24, 1), tmp_path / "s", progress=False)


def make(**fields) -> TokenAutoencoder:
    torch.manual_seed(0)
    return TokenAutoencoder(AutoencoderConfig(**{"input_width": 8, "code_width": 4, **fields}))


def test_loss_is_equation_1():
    model = make(input_width=2, code_width=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder[3].bias.copy_(torch.tensor([1.0, 2.0]))  # the reconstruction, always
    tokens = torch.tensor([[1.0, 2.0], [4.0, 6.0], [1.0, 3.0]])
    # Squared errors 0, 9 + 16, 1, averaged over three tokens.
    assert model.loss(tokens).item() == pytest.approx(26 / 3)


def test_architecture_is_the_papers():
    model = make(input_width=1024, code_width=64)
    names = [type(layer).__name__ for layer in model.encoder]
    assert (
        names
        == ["Linear", "LayerNorm", "GELU", "Linear"]
        == [type(layer).__name__ for layer in model.decoder]
    )
    assert [model.encoder[0].out_features, model.encoder[3].out_features] == [256, 64]
    assert [model.decoder[0].out_features, model.decoder[3].out_features] == [256, 1024]
    # Linear 1024-256, norm, Linear 256-64 and the mirror.
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == (262400 + 512 + 16448) + (16640 + 512 + 263168)


def test_scaling_of_codes_does_not_change_the_reconstruction():
    model, tokens = make().eval(), torch.randn(50, 8) * 3 + 5
    before = model(tokens)
    model.fit_codes(tokens)
    codes = model.encode(tokens)
    torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codes.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_default_code_width_is_a_sixteenth(tmp_path: Path):
    lvlm = FakeLVLM(token_width=80)
    store = encode_dataset(lvlm, make_samples(2), tmp_path / "wide", progress=False)
    assert train_autoencoder(store, steps=1, device="cpu")[0].code_width == 5


def test_training_reconstructs_and_is_reproducible(store: FeatureStore):
    state = torch.random.get_rng_state()
    model, report = train_autoencoder(store, **QUICK)
    again, _ = train_autoencoder(store, **QUICK)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    assert model.fingerprint == again.fingerprint
    assert train_autoencoder(store, **QUICK, seed=1)[0].fingerprint != model.fingerprint
    _, untrained = train_autoencoder(store, **{**QUICK, "steps": 1})
    assert report.reconstruction_error < 0.8 * untrained.reconstruction_error
    assert report.explained_variance > untrained.explained_variance
    assert (report.steps, report.held_out_images) == (300, 1)
    tokens = torch.randn(3, 8)
    assert not model(tokens).requires_grad


def test_tokens_that_lie_on_a_line_are_explained(tmp_path: Path):
    lvlm = FakeLVLM(token_width=16)
    store = encode_dataset(lvlm, make_samples(30, 1), tmp_path / "s", progress=False)
    rank = train_autoencoder(store, **{**QUICK, "code_width": 16, "steps": 1500, "hidden": 64})
    assert rank[1].explained_variance > 0.8


def test_tower_space(store: FeatureStore, tmp_path: Path):
    model, _ = train_autoencoder(store, **QUICK, space="tower")
    assert model.config.input_width == 5
    write_codes(store, model)
    assert store.codes([0]).shape == (1, 10, 4)
    bare = encode_dataset(
        FakeLVLM(), make_samples(2), tmp_path / "bare", tower=False, progress=False
    )
    for use in (lambda: train_autoencoder(bare, space="tower"), lambda: write_codes(bare, model)):
        with pytest.raises(StoreError, match=r"no vision-tower features.*tower=True"):
            use()


def test_codes_are_the_encoders_and_carry_their_origin(store: FeatureStore):
    model, report = train_autoencoder(store, **QUICK)
    write_codes(store, model, dtype="float32")
    codes, exists = store.codes(np.arange(24)), store.exists(np.arange(24))
    for sample in (0, 7):
        expected = model.encode(torch.tensor(store.tokens(sample).astype(np.float32)))
        np.testing.assert_allclose(codes[sample][exists[sample]], expected, atol=1e-5)
    meta = store.channel_meta("codes")
    assert meta["fingerprint"] == model.fingerprint
    assert meta["explained_variance"] == report.explained_variance
    assert meta["reconstruction_error"] == report.reconstruction_error
    assert abs(codes[exists].mean()) < 0.3 and 0.5 < codes[exists].std() < 2


def test_another_split_takes_the_same_autoencoder(store: FeatureStore, tmp_path: Path):
    model, _ = train_autoencoder(store, **QUICK)
    model.save_pretrained(tmp_path / "ae")
    other = encode_dataset(FakeLVLM(), make_samples(3), tmp_path / "test", progress=False)
    write_codes(other, TokenAutoencoder.from_pretrained(tmp_path / "ae"))
    assert other.channel_meta("codes")["fingerprint"] == model.fingerprint


def test_other_lvlms_and_widths_are_refused(store: FeatureStore, tmp_path: Path):
    model, _ = train_autoencoder(store, **QUICK)
    lvlm = FakeLVLM(fingerprint="other")
    other = encode_dataset(lvlm, make_samples(2), tmp_path / "o", progress=False)
    with pytest.raises(StoreError, match=r"autoencoder belongs to fake-1; train one with `tprl"):
        write_codes(other, model)
    with pytest.raises(StoreError, match="width 8, the autoencoder reads 9"):
        write_codes(store, make(input_width=9))


def test_codes_that_are_not_finite_are_refused(store: FeatureStore):
    model = make()
    model.encoder[3].bias.data[0] = float("nan")
    with pytest.raises(
        StoreError, match="'codes': the array of image 'i0' has values that are not"
    ):
        write_codes(store, model)
    assert not store.has_channel("codes")


def test_files_round_trip(tmp_path: Path):
    model = make(lvlm_fingerprint="x")
    model.fit_scales(torch.randn(9, 8))
    model.save_pretrained(tmp_path / "m")
    again = TokenAutoencoder.from_pretrained(tmp_path / "m")
    assert again.fingerprint == model.fingerprint and again.config == model.config
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_damaged_files_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        TokenAutoencoder.from_pretrained(tmp_path / "none")
    model = make()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        TokenAutoencoder.from_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change in ({"extra": 1}, {"code_width": 5}, {"space": "pixels"}, {"hidden": 0}):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        weights.write_bytes(data)
        with pytest.raises(ValueError, match=r"extra|different saves|'pixels'|hidden must be"):
            TokenAutoencoder.from_pretrained(tmp_path / "m")
    model.decoder[0].weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"not finite, in decoder.0.weight;"):
        TokenAutoencoder.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("field", ["steps", "batch_tokens"])
def test_numbers_below_one(store: FeatureStore, field: str):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        train_autoencoder(store, **{**QUICK, field: 0})


@pytest.mark.parametrize("width", [0, -3, 10**9])
def test_codes_wider_than_the_features_are_refused(store: FeatureStore, width: int):
    with pytest.raises(ValueError, match=r"code_width must lie between 1 and the width"):
        train_autoencoder(store, code_width=width, steps=1)
