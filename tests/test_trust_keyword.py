"""``trust=True`` of the functions that read stores is ``--trust`` of the commands."""

import shutil

import pytest
import torch
from small_run import make_small_run

from tprl_env.data import load_dataset
from tprl_env.data.features.manifest import StoreError, default_verify
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.compare_on_store import evaluate_store
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.rllib.config import load_config
from tprl_env.rllib.run.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("trust"))


@pytest.fixture
def flipped(run, tmp_path):
    """A store with one changed bit that only its checksum shows."""
    folder = tmp_path / "store"
    shutil.copytree(run.store, folder)
    path = folder / "images-00000.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(FeatureStore.open(run.store).tokens(0).tobytes())] ^= 1
    path.write_bytes(data)
    return folder


def test_evaluate_store(run, flipped, tmp_path):
    def evaluate(**trust):
        words = (flipped, str(run.lvlm), tmp_path / "out")
        return evaluate_store(*words, pruners=["uniform"], budgets=[4], limit=4, **trust)

    with pytest.raises(StoreError, match="recorded checksum"):
        evaluate()
    assert evaluate(trust=True)["methods"]
    assert default_verify() == "once"


def test_encode_dataset(run, flipped, monkeypatch):
    lvlm = load_lvlm(run.lvlm, device="cpu")

    def encode(**trust):
        return encode_dataset(lvlm, load_dataset(run.data), flipped, progress=False, **trust)

    with pytest.raises(StoreError, match="recorded checksum"):
        encode()
    assert len(encode(trust=True)) == len(FeatureStore.open(run.store))


def test_train(run, flipped, tmp_path):
    changes = {
        "source": str(flipped), "lvlm": str(run.lvlm), "rules.budget": (4, 8),
        "limits.iterations": 1, "resources.num_scorers": 0, "imitation.demonstrator": "none",
        "rollout.samples": 4, "rollout.draws": 2,
    }  # fmt: skip
    config = load_config("ppo", changes)
    with pytest.raises(StoreError, match="recorded checksum"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run", progress=False, trust=True).progress.iteration == 1
