"""A model over several GPUs: what is refused, and who asks for it (run: test_simulated_gpu.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processed import Checkpoint
from simulated_gpu import simulated_gpus

from tprl_env.cli import main
from tprl_env.inference import TokenPruner
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.loading import devices
from tprl_env.reducers import make_reducer
from tprl_env.rllib.config import load_config, scorer_spec
from tprl_env.scoring.spec import ScorerSpec

BUILTIN = "builtin:crowded"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the simulation knows one thread


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "auot"}, "device_map must be one of .*did you mean 'auto'"),
        ({"device_map": 3}, "device_map must be one of auto, .* got 3"),
        ({"device_map": {}}, r"got \{\}"),
        (
            {"device_map": "auto", "device": "cuda:1"},
            "'cuda:1' is one device and device_map='auto'",
        ),
        ({"device_map": {"": 7}}, "'cuda:7' is not there"),
        ({"device_map": {"lm_head": "cpu", "model": 0}}, "puts 'lm_head' on 'cpu', not on a GPU"),
    ],
)
def test_a_map_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with simulated_gpus(2), pytest.raises(ValueError, match=said):
        load_lvlm(BUILTIN, **options)


def test_a_map_needs_gpus_and_accelerate() -> None:
    with pytest.raises(ValueError, match="shows torch none; leave it out"):
        load_lvlm(BUILTIN, device_map="auto")
    with (
        mock.patch.object(devices, "find_spec", return_value=None),
        pytest.raises(ImportError, match=r"pip install 'tprl-env\[gpus\]'"),
    ):
        load_lvlm(BUILTIN, device_map="auto")


def test_a_model_that_the_gpus_cannot_hold_is_refused() -> None:
    from transformers import modeling_utils

    small = (1 << 20, 1 << 20)  # bytes; the model has 3 MB in float32
    with (
        simulated_gpus(2),
        mock.patch.object(torch.cuda, "mem_get_info", lambda *_: small),
        mock.patch.object(modeling_utils, "caching_allocator_warmup"),  # wants 1.2 GB of its own
    ):
        with pytest.raises(ValueError, match="not on a GPU; use more GPUs"):
            load_lvlm(BUILTIN, device_map="sequential", dtype="float32")


def test_the_command_says_it_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    words = ["--data", "scenes-crowded", "--limit", "4", "--lvlm", BUILTIN, "--out", str(out)]
    assert main(["encode", *words, "--device-map", "auot"]) == 2
    assert "--device-map must be one of" in capsys.readouterr().err
    assert not out.exists()


def test_scorers_of_several_gpus_spread_their_lvlm() -> None:
    settings = {"source": "store", "lvlm": BUILTIN, "scoring.scorer": "lvlm"}
    one = scorer_spec(load_config("recommended", settings))
    several = load_config("recommended", {**settings, "resources.scorer_gpus": 2.0})
    assert one.device_map is None and scorer_spec(several).device_map == "auto"
    spec = ScorerSpec(**json.loads(json.dumps(vars(scorer_spec(several)))))
    with mock.patch("tprl_env.lvlm.load_lvlm", side_effect=KeyError) as load:
        with pytest.raises(KeyError):
            spec.build()
    assert load.call_args.kwargs["device_map"] == "auto"


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_inputs_are_pruned_for_a_plain_model_over_two_gpus(family: str, tmp_path: Path) -> None:
    case, pruner = Checkpoint(family, tmp_path), TokenPruner(make_reducer("divprune"))
    inputs, options = case.inputs(), {"max_new_tokens": 4, "do_sample": False}
    wanted = case.model.generate(**pruner.prune(case.model, inputs, 0.4), **options)
    case.model.save_pretrained(tmp_path / "plain")
    with simulated_gpus(2):
        model = type(case.model).from_pretrained(tmp_path / "plain", device_map="auto")
        there = {n: v.to("cuda") if torch.is_tensor(v) else v for n, v in inputs.items()}
        found = model.generate(**pruner.prune(model, there, 0.4), **options)
        assert {p.device.index for p in model.parameters()} == {0, 1}
        assert torch.equal(found.cpu(), wanted)
