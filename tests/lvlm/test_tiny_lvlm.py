import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from transformers import AutoProcessor, LlavaForConditionalGeneration  # noqa: E402

from tprl_env.data.scenes import SceneWorld, load_scenes  # noqa: E402
from tprl_env.lvlm.tiny import builtin_path, train  # noqa: E402
from tprl_env.lvlm.tiny.language import block_mask, draw_prefix  # noqa: E402
from tprl_env.lvlm.tiny.model import (  # noqa: E402
    build_model,
    build_tokenizer,
    to_pixels,
    tower_features,
    vision_parts,
)
from tprl_env.lvlm.tiny.recipe import RECIPES  # noqa: E402

TASKS = ("crowded", "sparse")


def load(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def measured(folder, task, scenes):
    """What the checkpoint answers cannot be asked for here; that it is loadable can."""
    assert load(folder).config.model_type == "llava" and not (folder / "training.json").exists()
    return {"task": task, "scenes": scenes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sparse"
    report = train.train_tiny_lvlm(
        "sparse", folder, measure=measured, seed=1, scale=0.001, log=lambda line: None
    )
    return folder, report


def test_a_smoke_run_writes_a_loadable_checkpoint(trained):
    folder, report = trained
    assert json.loads((folder / "training.json").read_text()) == report
    assert report["seed"] == 1 and (report["task"], report["scenes"]) == ("sparse", 4)
    assert list(report["seconds"]) == ["tower", "cls", "align", "language", "pruned", "evaluate"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["sparse"]
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    sample = load_scenes("sparse", "test", 1)[0]
    text = f"<s> USER: <image>\n{sample.question} ASSISTANT:"
    inputs = processor(images=Image.fromarray(sample.image), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == 4).sum() == 144
    assert not (inputs["input_ids"] == 3).any()
    pixels = to_pixels(sample.image[None])
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert model(**inputs).logits.shape[-1] == len(processor.tokenizer)


def test_the_same_seed_gives_the_same_bits(trained, tmp_path):
    folder, report = trained
    torch.manual_seed(5)  # the global random state has no influence, and is left alone
    before = torch.get_rng_state()
    again = train.train_tiny_lvlm("sparse", tmp_path / "b", seed=1, scale=0.001, log=lambda x: None)
    assert torch.equal(before, torch.get_rng_state())
    one, two = load(folder).state_dict(), load(tmp_path / "b").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "evaluate" not in again["seconds"] and report["recipe"] == again["recipe"]


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(train, "train_tower", lambda *a: 0.0)
    monkeypatch.setattr(train, "train_cls_head", lambda *a: None)
    monkeypatch.setattr(train, "align_projector", lambda *a: None)
    monkeypatch.setattr(train, "train_language", lambda *a: None)
    with pytest.raises(RuntimeError, match="disk full"):  # after the weights were written
        train.train_tiny_lvlm("crowded", tmp_path / "out", measure=fail, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "dense"}, "task must be one of 'crowded', 'sparse', got 'dense'"),
        ({"scale": 0}, "scale must be positive, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change, sentence, tmp_path):
    arguments = {"task": "crowded", "out": tmp_path / "x"} | change
    with pytest.raises(ValueError, match=sentence):
        train.train_tiny_lvlm(**arguments)


def test_a_full_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="new or empty folder"):
        train.train_tiny_lvlm("crowded", tmp_path)
    with pytest.raises(ValueError, match="task must be one of"):
        builtin_path("dense")


@pytest.mark.parametrize("task", TASKS)
def test_the_fast_tower_equals_the_stock_one(task):
    attend = RECIPES[task].attend
    model = build_model(build_tokenizer(), attend)
    pixels = to_pixels(SceneWorld(task, "calibration", warps=1).batch(2)[0])
    with torch.no_grad():
        fast = tower_features(model, pixels, attend)
        stock = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(fast, stock, atol=1e-5, rtol=1e-5)
    silent = [not layer.self_attn.out_proj.weight.any() for layer in _layers(model)[:-1]]
    assert silent == [i not in attend for i in range(4)]


def _layers(model):
    return vision_parts(model).encoder.layers


def test_questions_do_not_see_each_other():
    mask = block_mask(3, 2)[0, 0]
    assert mask.shape == (25, 25)
    assert mask[3:, :3].all() and not mask[:3, 3:].any()
    assert not mask[14:, 3:14].any() and mask[24, 14:].all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("short", [True, False])
def test_pruned_prefixes_hold_digits_only_where_cells_are_kept(task, short):
    _, classes, _ = SceneWorld(task, "calibration", warps=1).batch(8)
    rng = np.random.default_rng(0)
    for _ in range(10):
        keep, mask = draw_prefix(RECIPES[task], classes, rng, short)
        assert (keep[:, 1:] > keep[:, :-1]).all()
        cell = (keep // 24 * 6 + keep % 12 // 2).numpy()
        outside = ~np.take_along_axis(mask, cell, 1)
        assert (np.take_along_axis(classes.reshape(8, 36), cell, 1)[outside] >= 10).all()
        assert all(set(np.flatnonzero(mask[i])) <= set(cell[i]) for i in range(8))


def test_the_shipped_weights_are_small():
    size = sum(p.stat().st_size for t in TASKS for p in builtin_path(t).iterdir())
    assert size <= 10e6
