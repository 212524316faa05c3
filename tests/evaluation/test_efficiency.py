"""Memory, operations and time of reducers: numbers by hand, and every kind of reducer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from simulated_gpu import simulated_gpus

pytest.importorskip("transformers")

from tprl_env.cli import main
from tprl_env.evaluation.efficiency import Bench, Protocol, model_sizes, random_prompt
from tprl_env.lvlm.flops import COUNTED, language_flops, projector_flops, tower_flops
from tprl_env.lvlm.shapes import SHAPES, random_lvlm
from tprl_env.reducers import REDUCERS, Merger, Pruner, make_reducer
from tprl_env.reducers.layer import LAYER_PRUNERS
from tprl_env.reducers.layer_pruner import LayerPruner

QUICK = Protocol(text_tokens=35, new_tokens=2, warmup=0, samples=2)


@pytest.fixture(scope="module")
def lvlm() -> Any:
    return random_lvlm("tiny", device="cpu")


@pytest.fixture(scope="module")
def bench(lvlm: Any) -> Bench:
    picture = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    return Bench(lvlm, picture, QUICK)


def test_the_shapes_are_the_published_ones() -> None:
    text = {name: shape.sizes.text for name, shape in SHAPES.items() if shape.sizes.text}
    seven = text["llava-1.5-7b"]
    assert (seven["num_hidden_layers"], seven["hidden_size"], seven["intermediate_size"]) == (
        32, 4096, 11008,
    )  # fmt: skip
    assert text["llava-1.5-13b"]["num_hidden_layers"] == 40
    assert text["llava-next-7b"]["num_key_value_heads"] == 8
    assert text["qwen2.5-vl-3b"]["hidden_size"] == 2048 and len(SHAPES) == 7
    for name in ("qwen2.5-vl-3b", "qwen2.5-vl-7b"):
        sizes = SHAPES[name].sizes
        assert sizes.tower["out_hidden_size"] == sizes.text["hidden_size"]
    with pytest.raises(ValueError, match=r"did you mean 'llava-1\.5-7b'"):
        random_lvlm("llava-1.5-7")


def test_the_whole_model_by_hand(lvlm: Any, bench: Bench) -> None:
    row = bench.measure("all tokens", None, bench.count)
    assert row["tokens_per_layer"] == [16] * 4 and row["average_tokens"] == 16
    # keys and values, 2 heads of 16 numbers in 4 bytes
    assert row["kv_bytes"]["per_token_and_layer"] == 2 * 2 * 16 * 4
    assert row["kv_bytes"]["visual"] == 256 * 16 * 4
    assert row["kv_bytes"]["all"] == 256 * (16 + 35) * 4
    sizes = model_sizes(lvlm)
    assert sizes is not None and sizes.tower is not None and sizes.tower_blocks == 2
    closed = language_flops(sizes.language, [51] * 4, head_rows=1)
    assert row["flops"]["counted_prefill"] == pytest.approx(closed, rel=1e-6)
    assert row["flops"]["counted_reducer"] == 0 and row["flops"]["counted_tower"] > 0
    assert set(row["ms"]) == {"tower", "prefill", "decode_per_token"}
    total = row["ms"]["tower"]["median"] + row["ms"]["prefill"]["median"]
    assert row["ms_to_first_token"] == pytest.approx(total, abs=1e-3)
    assert row["peak_bytes"] is None and bench.largest_batch(None, 16) is None


@pytest.mark.parametrize(
    ("name", "budget", "layers"),
    [
        *(("divprune", 6, [6] * 4), ("vispruner", 6, [6] * 4), ("question_attention", 6, [6] * 4)),
        *(("visionzip", 6, [6] * 4), ("tome", 6, [6] * 4), ("pooled", 4, [4] * 4)),
        *(("fastv", 9, [16, 7, 7, 7]), ("question_rows", 7, [16, 4, 4, 4])),
    ],
)
def test_every_kind_of_reducer(bench: Bench, name: str, budget: int, layers: list[int]) -> None:
    row = bench.measure(name, make_reducer(name), budget)
    assert row["tokens_per_layer"] == layers
    full = bench.measure("all tokens", None, bench.count)
    assert row["flops"]["counted_prefill"] < full["flops"]["counted_prefill"]
    assert row["kv_bytes"]["visual"] == 256 * sum(layers)
    assert row["ms"]["reducer"]["median"] >= 0 and len(row["ms"]) == 4
    shares = [row["flops"]["conventions"][key] / value
              for key, value in full["flops"]["conventions"].items()]  # fmt: skip
    assert all(0 < share < 1 for share in shares)


def test_batches_and_prompts(lvlm: Any) -> None:
    picture = np.zeros((28, 28, 3), np.uint8)
    both = Bench(lvlm, picture, Protocol(107, 3, 2, 0, 1))
    alone = Bench(lvlm, picture, Protocol(107, 1, 2, 0, 1))
    rows = [one.measure("fastv", make_reducer("fastv"), 9) for one in (both, alone)]
    assert rows[0]["flops"]["counted_prefill"] == rows[1]["flops"]["counted_prefill"]
    assert rows[0]["batch"] == 3
    prompt = random_prompt(lvlm, both.visual, 107)
    assert len(prompt.ids) == 108 and len(prompt.visual_at) == 1
    assert prompt.ids == random_prompt(lvlm, both.visual, 107).ids


def test_families_with_placements_are_measured(tmp_path: Path) -> None:
    from tprl_env.lvlm import load_lvlm
    from tprl_env.lvlm.tiny.families import save_random

    lvlm = load_lvlm(save_random("llava_next", tmp_path))
    bench = Bench(lvlm, np.zeros((40, 70, 3), np.uint8), QUICK)
    assert bench.fixed > 0
    full = bench.measure("all tokens", None, bench.count)["flops"]
    sizes = model_sizes(lvlm, 5)  # the picture and four tiles of it
    assert sizes is not None and sizes.tower is not None
    assert full["counted_tower"] == projector_flops(80, 32, 64) + tower_flops(sizes.tower, tiles=5)
    # LLaVA leaves the last block out of the closed form; here it runs
    needed = projector_flops(80, 32, 64) + tower_flops(sizes.tower, 2, tiles=5)
    assert full["conventions"][COUNTED.name] == full["counted_prefill"] + needed
    for name in ("divprune", "fastv"):
        row = bench.measure(name, make_reducer(name), bench.count // 2)
        assert row["average_tokens"] == pytest.approx(bench.count // 2, abs=1)
    assert row["kv_bytes"]["all"] > row["kv_bytes"]["visual"]


@pytest.mark.parametrize("kind", [Pruner, Merger, LayerPruner])
def test_reducers_are_measured_on_a_gpu_as_on_the_cpu(kind: type, lvlm: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    every = {**REDUCERS, **LAYER_PRUNERS}
    names = [name for name, cls in every.items() if issubclass(cls, kind) and name != "oracle"]
    more = {name: {"relevance": "query"} for name in ("cdpruner", "trim")}

    def rows(on: Any) -> list[Any]:
        bench, found = Bench(on, picture, Protocol(35, 1, 1, 0, 1)), []
        for name in names:
            reducer = make_reducer(name, **more.get(name, {}))
            found.append(bench.measure(name, reducer, 4 if name == "pooled" else 9))
        return [(row["reducer"], row["tokens_per_layer"], row["flops"]) for row in found]

    wanted = rows(lvlm)
    with simulated_gpus(), mock.patch("torch.cuda.synchronize"), mock.patch.object(Bench, "_peak"):
        assert rows(random_lvlm("tiny", device="cuda", dtype="float32")) == wanted


def test_what_cannot_be_measured_is_said(bench: Bench) -> None:
    with pytest.raises(ValueError, match="reads relevance"):
        bench.measure("oracle", make_reducer("oracle"), 4)
    with pytest.raises(ValueError, match="fastv can have an average"):
        bench.measure("fastv", make_reducer("fastv"), 1)
    for bad in ({"text_tokens": 3}, {"batch": 0}, {"samples": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            Protocol(**bad)


def test_the_command_writes_the_tables(tmp_path: Path, capsys: Any) -> None:
    line = ["efficiency", "tiny", "--reducers=divprune,fastv", "--budgets=0.5,12", "--text=35",
            "--samples=1", "--warmup=0", "--new-tokens=1", f"--out={tmp_path}"]  # fmt: skip
    assert main(line) == 0
    content = json.loads((tmp_path / "efficiency.json").read_text())
    rows = [(row["reducer"], row["budget"]) for row in content["rows"]]
    assert rows == [("all tokens", 16), ("divprune", 8), ("fastv", 8), ("divprune", 12),
                    ("fastv", 12)]  # fmt: skip
    assert content["weights"] == "random" and content["command"].startswith("tprl efficiency tiny")
    page = (tmp_path / "efficiency.md").read_text()
    assert page in capsys.readouterr().out and page.count("\n| ") == 7
    assert main(["efficiency", "tinny", f"--out={tmp_path}"]) == 2
    assert "tinny" in capsys.readouterr().err
