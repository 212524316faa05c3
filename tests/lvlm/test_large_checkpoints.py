"""Checkpoints in several files, in half precision, and with damaged or foreign parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.execution import decoder
from tprl_env.lvlm.tiny.families import build_random, save_random

NAMES = ("llava", "qwen2_5_vl", "internvl")
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
ANSWER = (40, 41, 2)


def sharded(name: str, folder: Path) -> Path:
    """A checkpoint whose weights are in several files."""
    model, words, images = build_random(name)
    model.save_pretrained(folder, max_shard_size="100KB")
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def log_likelihood(lvlm: Any) -> float:
    """Of one answer, all tokens kept."""
    (visual,) = lvlm.encode_images([PICTURE])
    prompt = lvlm.prompt("what color is the 7 ?", [visual])
    scored = lvlm.score([prompt], [[ANSWER]], [visual.tokens])
    return float(np.log(scored.likelihood[0]))


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_several_files_score_as_those_in_one(name: str, tmp_path: Path) -> None:
    several = sharded(name, tmp_path / "several")
    shards = sorted(several.glob("model-*.safetensors"))
    assert len(shards) > 2
    one = save_random(name, tmp_path / "one")
    assert log_likelihood(load_lvlm(several)) == log_likelihood(load_lvlm(one))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_of_weights_is_named(name: str, tmp_path: Path) -> None:
    folder = sharded(name, tmp_path)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        load_lvlm(folder)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_names_no_files_is_refused(name: str, tmp_path: Path) -> None:
    folder = sharded(name, tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="weight_map"):
        load_lvlm(folder)


@pytest.mark.parametrize("name", NAMES)
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match=r"only pickle files \(pytorch_model.bin\)"):
        load_lvlm(folder)
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("name", NAMES)
def test_mixed_types_in_the_files_become_one(name: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for at, key in enumerate(sorted(weights)):
        weights[key] = weights[key].to((torch.bfloat16, torch.float16, torch.float32)[at % 3])
    save_file(weights, path, metadata={"format": "pt"})
    lvlm: Any = load_lvlm(folder)
    assert {p.dtype for p in lvlm._model.parameters()} == {torch.float32}
    assert np.isfinite(log_likelihood(lvlm))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_an_image_processor_of_another_family_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path / "one")
    other = save_random("llava", tmp_path / "other")
    shutil.copy(other / "preprocessor_config.json", folder)
    with pytest.raises(ValueError, match="image processor"):
        load_lvlm(folder).encode_images([PICTURE])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(name: str, dtype: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path)
    full, half = log_likelihood(load_lvlm(folder)), log_likelihood(load_lvlm(folder, dtype=dtype))
    assert abs(half - full) < 0.05 * abs(full)
    assert half != full


def test_the_head_is_the_models_own_weight_in_half_precision(tmp_path: Path) -> None:
    lvlm: Any = load_lvlm(save_random("llava", tmp_path), dtype="bfloat16")
    assert lvlm._language.head is lvlm._model.lm_head.weight


def test_logits_in_chunks_equal_those_of_a_float32_head(monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(1001, 64, generator=generator).bfloat16()
    states = torch.randn(7, 64, generator=generator).bfloat16()
    monkeypatch.setattr(decoder, "_HEAD_ELEMENTS", 64 * 100)
    found = decoder.logits(states, head)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, states.float() @ head.float().T, rtol=0, atol=1e-5)
    rounded = (states @ head.T).float()
    assert (rounded - found).abs().max() > 1e-3  # what bfloat16 logits would lose
