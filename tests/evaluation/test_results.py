import copy
import json

import pytest

from tprl_env.evaluation.results import check_results, read_results
from tprl_env.files import versions, write_json

GOOD = {
    "task": "crowded",
    "visual_tokens": 144,
    "full": {"accuracy": 0.97, "questions": 1000, "by_type": {"at": 0.98}},
    "methods": [
        {
            "name": "policy",
            "knowledge": "policy",
            "budget": budget,
            "mean_tokens": float(budget),
            "accuracy": 0.9,
            "ci95": [0.88, 0.92],
        }
        for budget in (48, 29, 14, 7, 4)
    ],
    "training": {
        "algorithm": "PPO",
        "preset": "recommended",
        "seconds": 200.5,
        "lvlm_scores": 1000,
        "env_steps": 1000,
        "seed": 0,
    },
    "versions": {"python": "3.11"},
}


def test_a_complete_file_passes_and_reads_back(tmp_path):
    check_results(GOOD)
    write_json(tmp_path / "results.json", GOOD)
    assert read_results(tmp_path / "results.json") == GOOD
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.pop("task"), "'task' must be a str"),
        (lambda r: r["full"].pop("questions"), "'full' has no 'questions'"),
        (lambda r: r["training"].update(seconds="long"), "'seconds' must be"),
        (lambda r: r["training"].update(seed=True), "'seed' must be"),
        (lambda r: r["methods"][0].update(knowledge="magic"), "knowledge must be one of"),
        (lambda r: r["methods"][0].update(ci95=[0.95, 0.99]), "expected 0 <= ci95"),
        (lambda r: r["methods"].append({**r["methods"][0], "name": "x"}), "'x' was not measured"),
        (lambda r: r["methods"].clear(), "'methods' is empty"),
    ],
)
def test_a_broken_file_is_refused(change, sentence):
    results = copy.deepcopy(GOOD)
    change(results)
    with pytest.raises(ValueError, match=sentence):
        check_results(results)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(ValueError, match="no results file"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(GOOD)[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        read_results(tmp_path / "results.json")


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"accuracy": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_versions_name_what_is_installed():
    assert {"python", "numpy", "gymnasium"} <= set(versions())
