"""Odd pictures, prompts and folders, on every family: the right value, or a clear error."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tprl_env.data.pictures import PictureError, read_picture
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.tiny.families import RANDOM_FAMILIES, build_random, save_random

QUESTION = "what color is the 7 ?"
ANSWER = [(40, 41, 2)]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_random(name, root / name) for name in RANDOM_FAMILIES}


@pytest.fixture(scope="module", params=list(RANDOM_FAMILIES))
def named(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Any]:
    return request.param, load_lvlm(folders[request.param])


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (rows, columns, 3), dtype=np.uint8)


def score(lvlm: Any, *pictures: np.ndarray) -> float:
    visuals = lvlm.encode_images(list(pictures))
    tokens = torch.cat([visual.tokens for visual in visuals])
    return float(lvlm.score([lvlm.prompt(QUESTION, visuals)], [ANSWER], [tokens]).likelihood[0])


def file_of(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def odd_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of unusual kinds, and the RGB picture that each shows."""
    rgb = noise(40, 70)
    grey = rgb[..., :1].repeat(3, 2)
    clear = np.dstack([rgb, np.where(np.arange(70) < 30, 0, 255)[None].repeat(40, 0)])
    white = rgb.copy()
    white[:, :30] = 255
    turned = Image.Exif()
    turned[274] = 6  # shown after a quarter turn to the right
    ink = Image.fromarray(rgb).convert("CMYK")
    flat = [Image.new("RGB", (70, 40), colour) for colour in ("red", "blue")]
    return {
        "CMYK": (file_of(ink, "TIFF"), np.asarray(ink.convert("RGB"))),
        "alpha": (file_of(Image.fromarray(clear.astype(np.uint8)), "PNG"), white),
        "16 bit": (
            file_of(Image.fromarray(grey[..., 0].astype(np.uint16) * 257), "PNG"),
            grey,
        ),
        "animated": (
            file_of(flat[0], "GIF", save_all=True, append_images=flat[1:]),
            np.asarray(flat[0]),
        ),
        "EXIF": (file_of(Image.fromarray(rgb), "PNG", exif=turned), np.rot90(rgb, -1).copy()),
    }


@pytest.mark.parametrize("kind", list(odd_files()))
def test_odd_files_give_the_tokens_of_the_picture_they_show(
    named: tuple[str, Any], kind: str
) -> None:
    data, shown = odd_files()[kind]
    found, wanted, other = named[1].encode_images([read_picture(data), shown, noise(40, 70, 1)])
    torch.testing.assert_close(found.tokens, wanted.tokens, atol=0, rtol=0)
    assert found.tokens.shape != other.tokens.shape or not found.tokens.equal(other.tokens)


def test_truncated_files_are_refused_before_any_lvlm() -> None:
    data = file_of(Image.fromarray(noise(40, 70)), "PNG")
    with pytest.raises(PictureError):
        read_picture(data[: len(data) // 2])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 50), (50, 1), (400, 600)])
def test_pictures_of_any_size_are_taken(named: tuple[str, Any], shape: tuple[int, int]) -> None:
    assert 0 < score(named[1], noise(*shape), noise(30, 30)) < 1


def test_extreme_ratios_are_taken_or_refused_by_number_and_size(named: tuple[str, Any]) -> None:
    name, lvlm = named
    pictures = [noise(30, 30), noise(1, 2000)]
    if name in QWEN:
        why = f"picture 1 of 2000 x 1 pixels cannot be prepared for {name} .*ratio.*; crop or pad"
        with pytest.raises(PictureError, match=why):
            lvlm.encode_images(pictures)
    else:
        assert 0 < score(lvlm, *pictures) < 1


def test_special_tokens_in_a_question_are_refused(named: tuple[str, Any]) -> None:
    lvlm = named[1]
    visuals = lvlm.encode_images([noise(40, 70)])
    words = lvlm._prompter._tokenizer
    special = [str(token) for token in words.added_tokens_decoder.values() if token.special]
    assert words.convert_ids_to_tokens(lvlm.image_token_id) in special and len(special) > 4
    for token in set(special) - {words.unk_token}:
        with pytest.raises(ValueError, match=r"contains the (special token|image placeholder)"):
            lvlm.prompt(f"what {token} is it", visuals)


def test_prompts_fit_their_pictures_or_are_refused(named: tuple[str, Any]) -> None:
    lvlm = named[1]
    one, two = lvlm.encode_images([noise(40, 70), noise(60, 40)])
    both = torch.cat([one.tokens, two.tokens])
    with pytest.raises(ValueError, match="needs a picture, got none"):
        lvlm.prompt(QUESTION, [])
    alone, joined = lvlm.prompt(QUESTION, [one]), lvlm.prompt(QUESTION, [one, two])
    assert len(joined.visual_at) > len(alone.visual_at)
    if lvlm.placed:  # one run of llava's stands for any number of tokens
        with pytest.raises(ValueError, match=f"row 0: the prompt has places for {len(one.tokens)}"):
            lvlm.score([alone], [ANSWER], [both])
    with pytest.raises(ValueError, match=f"row 0: the prompt has places for {len(both)}"):
        lvlm.generate([joined], [one.tokens])


def test_an_overflowing_context_is_refused_with_both_numbers(named: tuple[str, Any]) -> None:
    lvlm = named[1]
    visuals = lvlm.encode_images([noise(40, 70)])
    prompts = [lvlm.prompt(QUESTION, visuals), lvlm.prompt("what color " * 1500, visuals)]
    tokens = [visuals[0].tokens] * 2
    why = r"row 1: .* need \d+ places, the language model has 2048 .*fewer or smaller pictures"
    with pytest.raises(ValueError, match=why):
        lvlm.score(prompts, [ANSWER] * 2, tokens)
    with pytest.raises(ValueError, match=why):
        lvlm.generate(prompts, tokens)


def test_tokens_of_another_number_type_are_taken(
    named: tuple[str, Any], folders: dict[str, Path]
) -> None:
    name, lvlm = named
    visual = lvlm.encode_images([noise(40, 70)])[0]
    prompt = lvlm.prompt(QUESTION, [visual])
    exact = np.log(lvlm.score([prompt], [ANSWER], [visual.tokens]).likelihood)
    half = visual.tokens.half().numpy()
    stored = np.log(lvlm.score([prompt], [ANSWER], [half]).likelihood)
    np.testing.assert_allclose(stored, exact, atol=0.05)
    small = load_lvlm(folders[name], dtype="bfloat16")
    own = small.encode_images([noise(40, 70)])[0]
    assert own.tokens.dtype == small.dtype == torch.bfloat16
    both = small.score([prompt] * 2, [ANSWER] * 2, [own.tokens, half]).likelihood
    assert np.isfinite(np.log(both)).all()
    assert small.generate([prompt], [half], max_new_tokens=3)


@pytest.mark.parametrize("name", list(RANDOM_FAMILIES))
def test_missing_shards_and_pickles_are_refused(name: str, tmp_path: Path) -> None:
    model, words, images = build_random(name)
    for part in (words, images):
        part.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and load_lvlm(tmp_path).num_layers == 4
    shards[1].unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=shards[1].name):
        load_lvlm(tmp_path)
    for path in (*shards, tmp_path / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="pickle"):
        load_lvlm(tmp_path)


def fits(model: str, processor: str) -> bool:
    """Whether two families share the image processor's format."""
    alike = (QWEN, ("llava_next", "llava_onevision"))
    plain = model.startswith("llava") and processor.startswith("llava")
    tiles = alike[1]
    return any(model in group and processor in group for group in alike) or (
        plain and model not in tiles and processor not in tiles
    )


@pytest.mark.parametrize("model", list(RANDOM_FAMILIES))
def test_another_familys_image_processor_is_refused(
    model: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(folders[model], folder)
    for processor in RANDOM_FAMILIES:
        shutil.copy(folders[processor] / "preprocessor_config.json", folder)
        if fits(model, processor) or model == processor:
            assert load_lvlm(folder).encode_images([noise(40, 70)])
        else:
            with pytest.raises(ValueError, match=r"its image processor, \w+, (gives|does not fit)"):
                load_lvlm(folder)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("qwen2_5_vl", {"patch_size": 14}),
        ("qwen3_vl", {"merge_size": 1}),
        ("llava_onevision", {"size": {"height": 56, "width": 56}}),
        ("llava_next", {"image_grid_pinpoints": [[28, 28]]}),
        ("internvl", {"size": {"height": 56, "width": 56}}),
        ("smolvlm", {"max_image_size": {"longest_edge": 56}}),
    ],
)
def test_an_image_processor_of_another_size_is_refused(
    name: str, changed: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(folders[name], folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=r"image processor.*of (one|the same) checkpoint"):
        load_lvlm(folder)
