"""Crops: the box that is computed is where the processors really look."""

import numpy as np
import pytest
import torch
from lvlm_fixtures import IMAGE, PATCH, QUESTIONS, save_llava
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from tprl_env.data import load_dataset
from tprl_env.data.features.arrow import ArrowRows, write_arrow
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.loading.crop import _say_unknown, seen_box

PLAIN = {"do_normalize": False, "do_rescale": False, "do_convert_rgb": False, "resample": 2}
SQUARE = {"height": 96, "width": 96}
PROCESSORS = {
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=SQUARE, **PLAIN),
    "clip, zoomed": lambda: CLIPImageProcessor(
        size={"shortest_edge": 128}, crop_size={"height": 64, "width": 96}, **PLAIN
    ),
    "clip, no resize": lambda: CLIPImageProcessor(do_resize=False, crop_size=SQUARE, **PLAIN),
    "clip, stretched": lambda: CLIPImageProcessor(size=SQUARE, do_center_crop=False, **PLAIN),
    "clip, stretched and cropped": lambda: CLIPImageProcessor(
        size={"height": 120, "width": 100}, crop_size=SQUARE, **PLAIN
    ),
    "siglip": lambda: SiglipImageProcessor(size=SQUARE, **PLAIN),
    "llava, padded": lambda: LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": 96}, crop_size=SQUARE, **PLAIN
    ),
    "llava": lambda: LlavaImageProcessor(size={"shortest_edge": 96}, crop_size=SQUARE, **PLAIN),
}
SIZES = [(64, 192), (192, 64), (100, 100), (97, 131), (240, 33), (60, 50)]


def coordinates(height: int, width: int) -> np.ndarray:
    """A picture that says in red and green where a pixel is."""
    rows, columns = np.indices((height, width)).astype(np.float32)
    return np.stack([rows, columns, np.full_like(rows, 255)], -1).astype(np.uint8)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_every_token_is_where_the_box_says(name: str, size: tuple[int, int]):
    processor, patch = PROCESSORS[name](), 6
    picture = Image.fromarray(coordinates(*size))
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"][0].float()
    output = (int(pixels.shape[1]), int(pixels.shape[2]))
    rows, columns = output[0] // patch, output[1] // patch
    found = seen_box(processor, size, output, (rows * patch, columns * patch))
    top, left, bottom, right = found or (0, 0, *size)
    if name in ("siglip", "clip, stretched"):
        assert found is None
    # at the edges the resampling mixes in what is beside the picture
    margin_y = max((bottom - top) / rows, 3)
    margin_x = max((right - left) / columns, 3)
    compared = 0
    for row, column in np.ndindex(rows, columns):
        cell = pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        y = top + (row + 0.5) / rows * (bottom - top)
        x = left + (column + 0.5) / columns * (right - left)
        if margin_y < y < size[0] - margin_y and margin_x < x < size[1] - margin_x:
            seen = cell[:2].mean((1, 2)).tolist()
            assert seen == pytest.approx([y - 0.5, x - 0.5], abs=2.5)
            compared += 1
        above, beside = max(-y, y - size[0]), max(-x, x - size[1])
        if above > margin_y or beside > margin_x:
            assert cell[2].max() < 200  # padding
    assert compared > 0 or min(size) < 40


def test_an_unknown_processor_is_said_once(caplog):
    _say_unknown.cache_clear()
    processor = CLIPImageProcessor(size={"longest_edge": 96}, crop_size=SQUARE, **PLAIN)
    for _ in range(3):
        assert seen_box(processor, (64, 192), (96, 96), (96, 96)) is None
    clip = PROCESSORS["clip"]()
    assert seen_box(clip, (64, 192), (50, 50), (48, 48)) is None
    assert len(caplog.records) == 1 and "whole pictures" in caplog.text


def cropping_lvlm(folder):
    save_llava(folder)
    size = {"height": IMAGE, "width": IMAGE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size).save_pretrained(folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    return load_lvlm(str(folder))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("crop")
    lines = []
    for name, size in (("wide", (64, 192)), ("square", (64, 64)), ("high", (192, 64))):
        Image.fromarray(coordinates(*size)).save(folder / f"{name}.png")
        lines.append(
            f'{{"id": "{name}", "image": "{name}.png", "question": "{QUESTIONS[0]}", '
            f'"answers": "7"}}\n'
        )
    (folder / "d.jsonl").write_text("".join(lines))
    lvlm = cropping_lvlm(folder / "lvlm")
    assert IMAGE % PATCH == 0
    return encode_dataset(lvlm, load_dataset(folder / "d.jsonl"), folder / "s", progress=False)


def test_a_store_knows_what_was_cut_off(store):
    boxes = [store.picture_box(i) for i in range(3)]
    assert boxes[0] == pytest.approx((0, 64, 64, 128))
    assert boxes[1] is None
    assert boxes[2] == pytest.approx((64, 0, 128, 64))


def test_files_of_older_stores_have_no_box(store, monkeypatch, tmp_path):
    import pyarrow as pa

    old = pa.record_batch({"picture": pa.array([b"x"])})
    write_arrow(tmp_path / "old", old.schema, [old])
    assert ArrowRows([tmp_path / "old"], [1]).optional("box", 0) is None
    new = FeatureStore.open(store.path)
    monkeypatch.setattr(new._images, "optional", lambda name, row: [0.0, 5.0, 0.0, float("nan")])
    with pytest.raises(StoreError, match=r"picture box .* 'wide'; encode the store again"):
        new.picture_box(0)
