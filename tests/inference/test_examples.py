"""The examples, on checkpoints with random weights in the published formats."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

import transformers

from tprl_env.lvlm.tiny.families import PATCH, save_random

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = [str(place / name) for name in ("a.png", "b.png")]
    for path, size in zip(found, ((60, 40), (30, 80)), strict=True):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return found


def test_llava_1_5(paths: list[str], tmp_path: Path, capsys: Any) -> None:
    save_random("llava", tmp_path)
    transformers.LlavaProcessor(
        transformers.AutoImageProcessor.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    answers = load("llava_1_5").main([str(tmp_path), *paths, "--budget", "0.25"])
    assert len(answers) == 2
    assert capsys.readouterr().out.count("4 of 16 visual tokens: ") == 2
    beams = load("llava_1_5").main([str(tmp_path), *paths, "--budget", "3", "--beams", "2"])
    assert len(beams) == 2 and capsys.readouterr().out.count("3 of 16 visual tokens: ") == 2


def test_qwen2_5_vl(paths: list[str], tmp_path: Path, capsys: Any) -> None:
    save_random("qwen2_5_vl", tmp_path)
    answer = load("qwen2_5_vl").main([str(tmp_path), *paths, "--share", "0.5"])
    kept, rest = capsys.readouterr().out.split(" of ", 1)
    total = int(rest.split()[0])
    assert int(kept) == (total + 1) // 2 and answer.strip() in rest


def test_vlmevalkit(paths: list[str]) -> None:
    names = ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base")
    made: Any = {name: ModuleType(name) for name in names}
    made["vlmeval.vlm.base"].BaseModel = type("BaseModel", (), {})
    with mock.patch.dict(sys.modules, made):
        example = load("vlmevalkit")
    model = example.PrunedModel("builtin:crowded", "question_rows", 0.5, layer=1)
    text, picture = {"type": "text", "value": "what color is the 7 ?"}, {"type": "image"}
    message = [picture | {"value": paths[0]}, text]
    assert model.generate_inner(message) == model.pruned.answer(paths[0], text["value"], 72).text
    with pytest.raises(ValueError, match=r"MMMU: a message of \['image', 'text', 'image'\]"):
        model.generate_inner([*message, picture | {"value": paths[1]}], "MMMU")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_short_and_says_what_was_not_run(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 80
    assert "it has not been run on them" in " ".join(text.split())
