"""What the tree before the rooms wrote still opens, and says the same numbers.

Every literal was computed at revision 9e7c3bb, see tests/artifacts/before_rooms/README.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tprl_env.data.features.store import FeatureStore
from tprl_env.policy import PolicyPruner, PruningPolicy
from tprl_env.reducers.interfaces import prune_inputs

OLD = Path(__file__).parent / "artifacts" / "before_rooms"
KEPT = [36, 37, 124, 125, 136, 137]  # of six tokens, whatever the question: it hardly trained


@pytest.fixture(scope="module")
def store() -> FeatureStore:
    return FeatureStore.open(OLD / "store", verify="checksums")


def test_the_store_holds_what_was_written(store: FeatureStore):
    every = np.arange(4)
    assert (len(store), store.num_images, store.max_tokens) == (4, 1, 144)
    assert (store.token_width, store.query_width, store.code_width) == (128, 128, 8)
    assert [store.id(i) for i in every] == [f"sparse-train-00000-{i}" for i in every]
    assert store.question(2) == "what digit is yellow in column w ?"
    assert [store.answers(i) for i in every] == [("3",), ("orange",), ("2",), ("yes",)]
    assert [int(store.prompt_ids(i).sum()) for i in every] == [143, 146, 175, 184]
    assert store.grid(0) == (12, 12) and int(store.picture(0).sum()) == 1_032_422
    arrays = [store.tokens(0), store.tower(0), store.cls_attention(0), store.codes(every)]
    sums = [float(array.astype(np.float64).sum()) for array in arrays]
    assert sums == pytest.approx([11240.5864148, 21629.4143325, 0.9959876597, -0.0406494141])
    found = store.query(every).astype(np.float64).sum(axis=1)
    assert found == pytest.approx([2.26944667, 1.48199739, 1.97473463, -3.35224661])
    looks = [store.channel("question_attention", i) for i in every]
    assert [int(look.argmax()) for look in looks] == [51, 51, 51, 137]
    assert float(looks[3].max()) == pytest.approx(0.4164053798)
    assert store.full_scores("exact").tolist() == [1.0, 1.0, 1.0, 1.0]
    likely = [0.9997416139, 0.9999227524, 0.9998617172, 0.9994222522]
    assert store.full_scores("likelihood") == pytest.approx(likely)


@pytest.mark.parametrize(
    ("folder", "width", "expected", "value"),
    [
        ("policy", 128, [-0.6186177, -0.5689058, -1e9, -0.6335870, -0.6178180, -0.5300910],
         -0.4718468),
        ("run/policy", 8, [-0.6855931, -0.5144894, -1e9, -0.6421500, -0.6530390, -0.4851733],
         None),
    ],
)  # fmt: skip
def test_the_policies_give_the_same_logits(folder, width, expected, value):
    policy = PruningPolicy.from_pretrained(OLD / folder).eval()
    query = torch.cos(torch.arange(3 * 128.0)).reshape(1, 3, 128)
    obs = {
        "tokens": torch.sin(torch.arange(6 * 8.0)).reshape(1, 6, 8),
        "query": query[:, :, :width],
        "query_mask": torch.ones(1, 3),
        "alive": torch.tensor([[1, 1, 0, 1, 1, 1]]),
        "budget": torch.tensor([[2.0]]),
    }
    with torch.no_grad():
        output = policy(obs)
    assert output.logits[0].tolist() == pytest.approx(expected, abs=1e-5)
    if value is not None:
        assert float(output.value) == pytest.approx(value, abs=1e-5)


def test_the_policy_prunes_the_store_as_it_did(store: FeatureStore):
    pruner = PolicyPruner.from_pretrained(OLD / "policy")
    for number in range(4):
        keep = pruner.prune(prune_inputs(store, number), 6)
        assert keep.nonzero().flatten().tolist() == KEPT


def test_policy_and_autoencoder_answer_as_they_did(store: FeatureStore):
    pytest.importorskip("transformers")
    from tprl_env.inference import PrunedLVLM

    model = PrunedLVLM.load(
        "builtin:sparse", policy=OLD / "policy", autoencoder=OLD / "store" / "autoencoder"
    )
    questions = [store.question(i) for i in range(4)]
    answers = model.answer_batch([store.picture(0)] * 4, questions, budget=6)
    assert [answer.text for answer in answers] == ["2", "yellow", "2", "yes"]
    assert all(np.flatnonzero(answer.keep).tolist() == KEPT for answer in answers)


def test_evaluate_takes_the_store_the_policy_and_the_record_of_its_training(tmp_path: Path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from tprl_env.evaluation import evaluate_store

    results = evaluate_store(
        OLD / "store", "builtin:sparse", tmp_path, policy=OLD / "policy",
        pruners=["question_attention"], budgets=(24, 6), trajectories=0,
    )  # fmt: skip
    assert [row["accuracy"] for row in results["methods"]] == [0.5, 0.5, 1.0, 1.0]
    assert results["training"].items() >= {"algorithm": "GRPO", "lvlm_scores": 32}.items()


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def old_config():
    from tprl_env.rllib.config import TrainConfig

    return TrainConfig.from_dict(json.loads((OLD / "run" / "config.json").read_text()))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pickle_of(module: str, name: str) -> bytes:
    """A pickle that holds a class by its path, as protocol 4 writes it."""
    path = [bytes([len(part)]) + part.encode() for part in (module, name)]
    return b"\x80\x04\x8c" + path[0] + b"\x8c" + path[1] + b"\x93."


@pytest.fixture(scope="module")
def repeated(cluster, tmp_path_factory) -> Path:
    """The old run, run again here: the tree holds no pickles, so no checkpoint of it either."""
    from tprl_env.rllib.run.train import train

    folder = tmp_path_factory.mktemp("old") / "run"
    train(old_config(), folder, progress=False)
    return folder


def test_the_run_folder_is_read(tmp_path: Path):
    pytest.importorskip("ray")
    from tprl_env.rllib.run.folder import RunFolder

    folder = RunFolder(shutil.copytree(OLD / "run", tmp_path / "run"))
    folder.begin(old_config(), resume=True)  # compares with config.json
    starts = json.loads((folder.path / "run.json").read_text())
    assert [start["resume"] for start in starts] == [False, True]
    with folder.metrics_writer(after=2) as write:
        write({"iteration": 3, "score": 0.25})
    assert [row["score"] for row in rows(folder.path)] == [0.5, 0.5, 0.25]


def test_the_config_of_the_run_gives_its_metrics_and_its_policy(repeated: Path):
    old, new = rows(OLD / "run")[-1], rows(repeated)[2]
    for name in ("scores", "score", "kept", "mean_return", "policy_loss", "value_loss", "entropy"):
        assert new[name] == pytest.approx(old[name], rel=1e-3, abs=1e-6), name
    before = PruningPolicy.from_pretrained(OLD / "run" / "policy").state_dict()
    after = PruningPolicy.from_pretrained(repeated / "policy").state_dict()
    for name, weights in before.items():
        # Processors differ by up to 6e-4; without the entropy term it is 1.3e-3, with lr .0033 .01.
        torch.testing.assert_close(after[name], weights, atol=1e-3, rtol=0)


def test_a_checkpoint_with_old_class_paths_goes_on(repeated: Path, tmp_path: Path):
    """RLlib does not read them: it gives the state to an algorithm that is built already."""
    from tprl_env.rllib.run.train import train

    folder = shutil.copytree(repeated, tmp_path / "run")
    for name in ("whole.json", "generators.json"):  # which checkpoints of before do not have
        (folder / "checkpoints" / "iteration_000003" / name).unlink()
    pickles = list((folder / "checkpoints").rglob("class_and_ctor_args.pkl"))
    assert len(pickles) >= 5
    for path in pickles:
        path.write_bytes(pickle_of("tprl_env.rllib.runner", "TokenPruningRunner"))
    train(old_config(), folder, resume=True, iterations=4, progress=False)
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3, 4]
    last = rows(folder)[3]
    assert (last["scores"], last["score"]) == (64, 0.40625)
    assert last["value_loss"] == pytest.approx(0.216844, rel=1e-3)


@pytest.mark.parametrize("gone", [("tprl_env.rllib.runner", "X"), ("tprl_env.files", "Gone")])
def test_a_checkpoint_whose_state_names_what_is_gone_says_so(repeated, tmp_path: Path, gone):
    from tprl_env.rllib.run.train import train

    folder = shutil.copytree(repeated, tmp_path / "run")
    for name in ("whole.json", "generators.json"):  # which checkpoints of before do not have
        (folder / "checkpoints" / "iteration_000003" / name).unlink()
    checkpoint = folder / "checkpoints" / "iteration_000003"
    (checkpoint / "rllib" / "algorithm_state.pkl").write_bytes(pickle_of(*gone))
    with pytest.raises(ValueError, match=r"other module paths \(.*\) and cannot be") as caught:
        train(old_config(), folder, resume=True, iterations=4, progress=False)
    assert f"--init-policy {checkpoint}/policy --out NEW" in str(caught.value)
    assert PruningPolicy.from_pretrained(checkpoint / "policy").config.width == 8  # the cure
