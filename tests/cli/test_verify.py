"""`tprl verify`: every artefact that the package writes, whole and with one bad byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_lvlm import FakeLVLM, make_samples
from lvlm_fixtures import save_llava
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import write_dataset

from tprl_env.cli.commands import main
from tprl_env.cli.verify import verify_path
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore, open_source
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.tiny import builtin_path
from tprl_env.policy.autoencoder import AutoencoderConfig, TokenAutoencoder
from tprl_env.policy.network import PolicyConfig, PruningPolicy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user's runs/ is: all kinds of artefacts below each other."""
    root = tmp_path_factory.mktemp("runs")
    store = encode_dataset(FakeLVLM(), make_samples(), root / "store", progress=False)
    store.write_channel("codes", [np.ones((store.image_count(i), 4)) for i in range(7)])
    TokenAutoencoder(AutoencoderConfig(8, 4)).save_pretrained(root / "store" / "autoencoder")
    run = root / "run"
    policy = PruningPolicy(PolicyConfig(token_width=4, query_width=3))
    for folder in (run / "policy", run / "checkpoints" / "iteration_000002" / "policy"):
        policy.save_pretrained(folder)
    (run / "config.json").write_text("{}")
    (run / "run.json").write_text("[]")
    (run / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n')
    part = run / "checkpoints" / "iteration_000002" / "progress.json"
    part.write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    mark = {"files": {"progress.json": {"size": 2, "sha256": digest}}}
    part.parent.with_name("iteration_000002.whole.json").write_text(json.dumps(mark))
    write_dataset(root / "data")
    return root


def test_all_that_is_whole_is_counted(made: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(lines) - 1} artefacts are whole"
    for kind in ("feature store", "policy", "autoencoder", "run", "log", "dataset", "folder of"):
        assert any(f": {kind}" in line and line.startswith("ok ") for line in lines), kind


@pytest.mark.parametrize(
    "name",
    [
        *("store/images-00000.arrow", "store/samples-00000.arrow", "store/channel-codes.arrow"),
        *("store/manifest.json", "store/channel-codes.json"),
        *("store/autoencoder/model.safetensors", "run/policy/model.safetensors"),
        "run/checkpoints/iteration_000002/policy/model.safetensors",
        "run/checkpoints/iteration_000002/progress.json",
        *("run/metrics.jsonl", "run/run.json", "run/policy/config.json", "data/0.png"),
    ],
)
def test_one_bad_byte_is_found_and_everything_else_still_checked(
    made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    path = copy / name
    data = bytearray(path.read_bytes())
    place = {".jsonl": 0, ".json": min(200, len(data) // 2), ".png": 200}
    data[place.get(path.suffix, len(data) // 2)] ^= 0x80
    path.write_bytes(data)
    assert main(["verify", str(copy)]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("DAMAGED") >= 1 and captured.out.count("ok  ") >= 5
    assert captured.err.startswith("tprl: ") and "artefacts are damaged: " in captured.err
    assert "Traceback" not in captured.err


def test_results_and_lvlm_folders(tmp_path: Path):
    assert verify_path(builtin_path("crowded")) == 1
    lines: list[str] = []
    verify_path(builtin_path("crowded"), lines.append)
    assert "fingerprint sha256:" in lines[0]
    (tmp_path / "results.json").write_text('{"methods": NaN}')
    with pytest.raises(ValueError, match="1 of 1 artefacts are damaged"):
        verify_path(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_lvlm_whose_weights_are_not_finite_is_refused_when_loaded(tmp_path: Path, value: float):
    folder = save_llava(tmp_path / "lvlm", cls_attention_layer=-1)
    path = Path(folder) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    key = next(key for key in tensors if "q_proj.weight" in key)
    tensors[key].view(-1)[3] = value
    save_file(tensors, path, metadata=header)
    with pytest.raises(
        ValueError, match=r"the weights of .* are not finite in 1 tensors: .*q_proj"
    ):
        load_lvlm(folder, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"1 of 1 artefacts are damaged: .* not finite in 1 tens"):
        verify_path(Path(folder))


@pytest.mark.parametrize("shards", [5, [], {"a": 5}, {"a": "../lvlm/model.safetensors"}])
def test_an_index_names_files_of_its_folder(tmp_path: Path, shards: object):
    folder = Path(save_llava(tmp_path / "lvlm", cls_attention_layer=-1))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        ValueError, match=r"damaged: weight_map must give a file name in its folder"
    ):
        verify_path(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.whole.json", "[" * 100_000), ("results.json", "[" * 100_000), ("a.whole.json", "[5]")],
)
def test_any_json_ends_in_a_sentence(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="1 of 1 artefacts are damaged"):
        verify_path(tmp_path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch()])
def test_nothing_to_verify_is_a_sentence(tmp_path: Path, make):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=r"does not exist|holds nothing that can be verified"):
        verify_path(tmp_path / "x")


def test_trust_skips_checksums_of_a_command(made: Path, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(made / "store", tmp_path / "copy"))
    path = copy / "images-00000.arrow"
    data = path.read_bytes()
    tokens = FeatureStore.open(copy).tokens(0).tobytes()
    place = data.index(tokens)
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    words = ["autoencoder", str(copy), "--steps", "1", "--code-width", "2"]
    assert main(words) == 2
    assert "does not have its recorded checksum" in capsys.readouterr().err
    with pytest.raises(StoreError, match="recorded checksum"):
        open_source(copy)
    assert len(open_source(copy, trust=True)) == 21
    assert main([*words, "--trust"]) == 0
