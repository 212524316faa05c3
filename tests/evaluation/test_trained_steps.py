"""A policy is used in as many steps as it was trained to take, whoever uses it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lvlm_fixtures import QUESTIONS, pictures
from small_run import make_small_run

pytest.importorskip("ray")

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.compare_on_store import evaluate_store
from tprl_env.evaluation.contenders import policy_entries, tune_penalty
from tprl_env.evaluation.learning_curve import LearningCurve
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.policy import PolicyPruner
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.reducers import prune_inputs
from tprl_env.rllib.experiments import trial
from tprl_env.rllib.experiments.places import TaskData
from tprl_env.scoring import local_scorer

BUDGET = 4
QUESTIONS_ASKED = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    run = make_small_run(tmp_path_factory.mktemp("steps"))
    store = FeatureStore.open(run.store)
    torch.manual_seed(3)
    config = PolicyConfig.question_aware(store.code_width, store.query_width, trained_steps=3)
    policy = PruningPolicy(config)
    torch.nn.init.normal_(policy.condition.weight, std=3.0)  # steps then differ from one pass
    policy.save_pretrained(run.policy)
    return run


@pytest.fixture
def masks(monkeypatch):
    """Rows that any exact policy pruner without a penalty keeps, as they come."""
    seen: list[np.ndarray] = []
    prune_batch = PolicyPruner.prune_batch

    def spy(pruner, inputs, budget):
        found = prune_batch(pruner, inputs, budget)
        if pruner.exact and not pruner.redundancy_penalty:
            seen.extend(mask.numpy() for mask in found)
        return found

    monkeypatch.setattr("tprl_env.evaluation.learning_curve.CURVE_BUDGETS", (BUDGET,))
    monkeypatch.setattr(PolicyPruner, "prune_batch", spy)

    def first(use):
        seen.clear()
        use()
        return np.stack(seen[:QUESTIONS_ASKED])

    return first


def test_every_path_keeps_the_same_tokens(run, masks, tmp_path):
    store, lvlm = FeatureStore.open(run.store), load_lvlm(run.lvlm)
    policy, scorer = PruningPolicy.from_pretrained(run.policy), local_scorer(lvlm, store)
    rows = [prune_inputs(store, sample) for sample in range(QUESTIONS_ASKED)]
    folders = TaskData(str(run.lvlm), *[str(run.store)] * 3)
    place = SimpleNamespace(task=lambda trial: folders, budgets=(BUDGET,))
    scoring = SimpleNamespace(device="cpu", dtype="float32")
    settings = SimpleNamespace(config=SimpleNamespace(scoring=scoring))
    model = PrunedLVLM.load(str(run.lvlm), policy=run.policy, autoencoder=run.autoencoder)
    paths = {
        "tprl compare": lambda: trial._measure(policy, place, settings),
        "tprl evaluate": lambda: evaluate_store(
            run.store, str(run.lvlm), tmp_path / "out", policy=run.policy, budgets=[BUDGET],
            pruners=["random"], trajectories=0,
        ),
        "quickstart, penalty": lambda: tune_penalty(policy, store, scorer, [BUDGET]),
        "quickstart, table": lambda: policy_entries(policy, None)["policy"].prune_batch(
            rows, BUDGET
        ),
        "learning curve": lambda: LearningCurve(
            tmp_path / "curve.jsonl", store, scorer, QUESTIONS_ASKED
        ).add(policy, 0),
        "a folder": lambda: PolicyPruner.from_pretrained(run.policy).prune_batch(rows, BUDGET),
        "PrunedLVLM": lambda: model.answer_batch(
            [pictures(6)[i // 2] for i in range(QUESTIONS_ASKED)],
            [QUESTIONS[i % len(QUESTIONS)] for i in range(QUESTIONS_ASKED)],
            BUDGET,
        ),
    }  # fmt: skip
    stepwise = PolicyPruner(policy, mode="multistep", steps=3).prune_batch(rows, BUDGET)
    wanted = np.stack([mask.numpy() for mask in stepwise])
    one_pass = PolicyPruner(policy).prune_batch(rows, BUDGET)
    assert any((mask.numpy() != row).any() for mask, row in zip(one_pass, wanted, strict=True))
    for name, use in paths.items():
        np.testing.assert_array_equal(masks(use), wanted, err_msg=name)
