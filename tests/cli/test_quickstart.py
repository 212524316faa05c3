"""The whole chain at smoke size, through Ray actors, on the shipped LVLM."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tprl_env.cli.commands import main
from tprl_env.cli.quickstart import run_quickstart
from tprl_env.evaluation.builtin_stores import QuickstartSettings
from tprl_env.evaluation.compare_on_store import training_of
from tprl_env.evaluation.result_files import read_results

SMALL = {
    "limits.max_scores": "10240",
    "rollout.samples": "8",
    "rollout.draws": "4",
    "imitation.steps": "400",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    settings = QuickstartSettings(
        task="sparse",
        out=out,
        scale=0.05,
        train_questions=1920,
        calibration_questions=480,
        test_questions=960,
        code_width=16,
    )
    return settings, run_quickstart(settings, SMALL)


def test_everything_that_people_read_is_there(finished):
    settings, results = finished
    assert read_results(settings.out / "results.json") == json.loads(json.dumps(results))
    assert results["task"] == "sparse"
    assert results["full"]["questions"] == 48
    assert results["training"]["lvlm_scores"] >= 512
    assert results["training"]["preset"] == "recommended"
    assert results["training"] == training_of(settings.out / "train" / "policy")
    names = {row["name"] for row in results["methods"]}
    assert {"policy", "imitation only", "DivPrune", "VisPruner", "random", "uniform grid"} <= names
    page = (settings.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 10
    assert (settings.out / "train" / "policy" / "model.safetensors").is_file()


def test_its_report_is_drawn_again_and_the_curve_belongs_to_it(finished, capsys):
    settings, results = finished
    curve, page = settings.out / "learning_curve.jsonl", settings.out / "report.html"
    before, whole = page.read_text(), curve.read_bytes()
    page.unlink()
    assert main(["report", str(settings.out)]) == 0
    assert page.read_text() == before
    assert read_results(settings.out / "results.json")["files"].keys() == results["files"].keys()
    assert main(["verify", str(settings.out)]) == 0
    curve.write_bytes(whole + whole.splitlines(keepends=True)[-1])  # as a run killed after it does
    capsys.readouterr()
    assert main(["report", str(settings.out)]) == 2
    assert f"{curve} is not as it was written" in capsys.readouterr().err
    curve.write_bytes(whole)


def test_exact_methods_keep_exactly_the_budget(finished):
    _, results = finished
    for row in results["methods"]:
        if "threshold" not in row["name"]:
            assert row["mean_tokens"] == row["budget"]
            assert row["std_tokens"] == 0


def test_learning_curve_starts_at_imitation(finished):
    settings, _ = finished
    lines = (settings.out / "learning_curve.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    used = [point["lvlm_scores"] for point in points]
    assert used[0] == 0
    assert np.all(np.diff(used) > 0)


def test_without_scorer_actors_the_test_split_is_scored_here(finished, tmp_path):
    settings, _ = finished
    for made in ("stores", "autoencoder", "imitation"):
        shutil.copytree(settings.out / made, tmp_path / made)
    small = SMALL | {"resources.num_scorers": "0", "limits.max_scores": "5120"}
    results = run_quickstart(dataclasses.replace(settings, out=tmp_path), small)
    assert read_results(tmp_path / "results.json") == json.loads(json.dumps(results))
    assert results["training"]["lvlm_scores"] >= 256


def test_an_unknown_task_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="crowded"):
        run_quickstart(QuickstartSettings(task="crowdy", out=tmp_path / "q"))
    assert not (tmp_path / "q").exists()
