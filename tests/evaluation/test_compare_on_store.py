import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_run import full_accuracy, make_small_run, write_policy

from tprl_env.cli.commands import main
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.compare_on_store import evaluate_store, training_of
from tprl_env.evaluation.contenders import (
    COMPARED,
    available_pruners,
    load_policy,
    open_calibration,
    policy_entries,
)
from tprl_env.evaluation.result_files import read_results
from tprl_env.evaluation.results import check_results
from tprl_env.evaluation.trajectories import choose_examples
from tprl_env.files import write_json

BUDGETS = (16, 7, 4)
TRAINING = {
    "algorithm": "PPO",
    "preset": "smoke",
    "seconds": 1.5,
    "lvlm_scores": 64,
    "env_steps": 64,
    "seed": 3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def out(run):
    """What one ``tprl evaluate`` with a policy leaves behind."""
    folder = run.root / "evaluation"
    words = ["evaluate", str(run.store), "--lvlm", str(run.lvlm), "--policy", str(run.policy)]
    words += ["--calibration", str(run.store), "--budgets", "16,7,4", "--trajectories", "3"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


def test_every_method_is_measured_at_every_budget(out, results):
    check_results(results, BUDGETS)
    assert read_results(out / "results.json", BUDGETS) == results
    names = {row["name"] for row in results["methods"]}
    # COMPARED without the oracle, whose relevance this dataset lacks; the policy and its threshold;
    # plain top-k stands beside the policy where a redundancy penalty was chosen
    assert len(names - {"policy, plain top-k"}) == len(COMPARED) - 1 + 2
    assert results["visual_tokens"] == 16
    assert results["task"] == "store"
    assert results["training"] == {}
    assert results["full"]["questions"] == 12


def test_the_budgets_are_matched(results):
    for row in results["methods"]:
        if "threshold" not in row["name"]:
            assert row["mean_tokens"] == row["budget"]
            assert row["std_tokens"] == 0


def test_keeping_all_tokens_costs_nothing(run, results):
    full = full_accuracy(run)
    assert 0 < full < 1  # otherwise the next line shows nothing
    assert results["full"]["accuracy"] == pytest.approx(full, abs=1e-5)
    everything = [row for row in results["methods"] if row["budget"] == 16]
    assert {row["accuracy"] for row in everything} == {results["full"]["accuracy"]}
    assert {row["mean_tokens"] for row in everything} == {16.0}
    assert all(row["by_type"] == results["full"]["by_type"] for row in everything)


def test_single_questions_add_up_to_the_table(run, out, results):
    table = pq.read_table(out / "per_question.parquet").to_pylist()
    store = FeatureStore.open(run.store)
    assert {row["sample"] for row in table} == {store.id(i) for i in range(12)}
    for method in results["methods"]:
        rows = [
            row
            for row in table
            if (row["method"], row["budget"]) == (method["name"], method["budget"])
        ]
        assert len(rows) == 12
        assert np.mean([row["score"] for row in rows]) == pytest.approx(
            method["accuracy"], abs=1e-5
        )
        assert np.mean([row["kept"] for row in rows]) == pytest.approx(
            method["mean_tokens"], abs=1e-3
        )
        for name, accuracy in method["by_type"].items():
            scores = [row["score"] for row in rows if row["question_type"] == name]
            assert np.mean(scores) == pytest.approx(accuracy, abs=1e-5)


def test_the_page_stands_alone_and_shows_what_was_drawn(out, results):
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 3
    assert set(re.findall(r'(?:src|href)=["\']?(\w+:|.)', page)) == {"data:"}
    assert "DivPrune" in page
    assert "Policy: " not in page  # nothing is known about its training
    drawn = sorted((out / "trajectories").iterdir())
    assert [path.name for path in drawn] == [f"trajectory-{i:02d}.png" for i in range(3)]
    for path in (*drawn, out / "accuracy.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert (pixels < 200).mean() > 0.01
    assert not list(out.rglob("*.tmp"))


def without_seconds(results):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in results["methods"]]
    one_time = ("run", "made_by", "files", "checksum")
    return {**{k: v for k, v in results.items() if k not in one_time}, "methods": rows}


def test_the_same_run_twice_gives_the_same_numbers(run, out, results, tmp_path):
    again = evaluate_store(
        run.store,
        str(run.lvlm),
        tmp_path,
        policy=run.policy,
        calibration=run.store,
        budgets=BUDGETS,
        trajectories=3,
    )
    assert without_seconds(again) == without_seconds(results)
    first, second = (pq.read_table(p / "per_question.parquet") for p in (out, tmp_path))
    assert first.equals(second)


def test_without_a_policy_there_is_no_training_and_nothing_to_draw(run, tmp_path, capsys):
    words = ["evaluate", str(run.store), "--lvlm", str(run.lvlm), "--pruners", "random,uniform"]
    assert main([*words, "--budgets", "7", "--limit", "5", "--out", str(tmp_path)]) == 0
    results = read_results(tmp_path / "results.json", [7])
    assert results["training"] == {}
    assert [row["name"] for row in results["methods"]] == ["random", "uniform grid"]
    assert results["full"]["questions"] == 5
    assert not (tmp_path / "trajectories").exists()
    assert "<h2>Trajectories" not in (tmp_path / "report.html").read_text()
    assert "uniform grid" in capsys.readouterr().out
    assert main(["check-results", str(tmp_path / "results.json"), "--budgets", "7"]) == 0
    assert main(["check-results", str(tmp_path / "results.json")]) == 0  # any budgets are a result
    words = ["check-results", str(tmp_path / "results.json"), "--budgets", "7,14"]
    assert main(words) == 2
    assert "not measured at [14] tokens" in capsys.readouterr().err


def test_the_record_of_a_training_is_passed_on_and_checked(run, tmp_path):
    policy = write_policy(tmp_path / "policy", FeatureStore.open(run.store))
    write_json(policy / "training.json", TRAINING)
    arguments = {"budgets": [4], "pruners": ["random"], "trajectories": 0, "policy": policy}
    results = evaluate_store(run.store, str(run.lvlm), tmp_path / "out", **arguments)
    assert results["training"] == TRAINING
    assert "preset <code>smoke</code>, seed 3" in (tmp_path / "out" / "report.html").read_text()
    write_json(policy / "training.json", {k: v for k, v in TRAINING.items() if k != "seed"})
    with pytest.raises(ValueError, match=r"training\.json has no 'seed'"):
        evaluate_store(run.store, str(run.lvlm), tmp_path / "other", **arguments)
    assert not (tmp_path / "other").exists()
    (policy / "training.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        training_of(policy)


def test_a_fixed_threshold_keeps_a_varying_number(run, tmp_path):
    results = evaluate_store(
        run.store,
        str(run.lvlm),
        tmp_path,
        policy=run.policy,
        threshold=0.5,
        pruners=["random"],
        budgets=[4],
        trajectories=0,
    )
    (row,) = (row for row in results["methods"] if row["name"] == "policy, threshold 0.5")
    assert row["std_tokens"] > 0
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\)"):
        policy_entries(load_policy(run.policy, FeatureStore.open(run.store)), None, threshold=1.5)


def test_pruners_whose_inputs_are_missing_are_left_out_or_refused(run):
    store = FeatureStore.open(run.store)
    assert "question oracle" not in available_pruners(store)
    with pytest.raises(ValueError, match="'oracle' needs relevance"):
        available_pruners(store, ["oracle"])
    with pytest.raises(ValueError, match="needs weights"):
        available_pruners(store, ["random", "policy"])


def test_a_calibration_store_must_have_the_same_codes(run, tmp_path):
    other = make_small_run(tmp_path)
    store = FeatureStore.open(other.store)
    assert open_calibration(run.store, store).path == run.store.resolve()
    codes = [np.zeros((16, 8), np.float32)] * store.num_images
    store.write_channel("codes", codes, meta={"fingerprint": "another"})
    with pytest.raises(ValueError, match="another autoencoder"):
        open_calibration(run.store, FeatureStore.open(other.store))


def test_examples_are_spread_over_question_types_and_pictures(run):
    store = FeatureStore.open(run.store)
    chosen = choose_examples(store, np.arange(12), 3)
    assert len({store.question_type(int(i)) for i in chosen}) == 3
    assert len({store.image_number(int(i)) for i in chosen}) == 3
    # six pictures: all of them come first, then second questions about the same ones
    everything = choose_examples(store, np.arange(12), 50)
    assert sorted(everything) == list(range(12))
    assert len({store.image_number(int(i)) for i in everything[:6]}) == 6


def test_examples_do_not_all_ask_what_every_picture_is_asked_first():
    class Scenes:
        """Six pictures with the same three questions each."""

        def question_type(self, sample: int) -> str:
            return ("at", "color", "exists")[sample % 3]

        def image_number(self, sample: int) -> int:
            return sample // 3

    chosen = choose_examples(Scenes(), np.arange(18), 6)
    assert [int(sample) % 3 for sample in chosen] == [0, 1, 2, 0, 1, 2]
    assert [int(sample) // 3 for sample in chosen] == [0, 1, 2, 3, 4, 5]


def evaluation_words(run, out):
    words = ["evaluate", str(run.store), "--lvlm", str(run.lvlm), "--policy", str(run.policy)]
    return [*words, "--budgets", "7,4", "--pruners", "random", "--trajectories", "1", "--out", out]


@pytest.fixture
def evaluation(run, tmp_path):
    """A folder of ``tprl evaluate``, and the words that made it."""
    words = evaluation_words(run, str(tmp_path / "out"))
    assert main(words) == 0
    return tmp_path / "out", words


def test_all_files_of_a_result_name_one_run(evaluation, capsys):
    out, _ = evaluation
    run = json.loads((out / "results.json").read_text())["run"]
    assert re.fullmatch(r"\w{16}", run)
    assert pq.read_schema(out / "per_question.parquet").metadata[b"tprl_run"].decode() == run
    assert f"<meta name=run content={run}>" in (out / "report.html").read_text()
    for picture in (out / "accuracy.png", out / "trajectories" / "trajectory-00.png"):
        assert Image.open(picture).info["tprl_run"] == run
    assert main(["check-results", str(out / "results.json")]) == 0


@pytest.mark.parametrize(
    "name",
    ["per_question.parquet", "report.html", "accuracy.png", "trajectories/trajectory-00.png"],
)
def test_files_of_two_runs_are_refused(evaluation, tmp_path, capsys, name):
    out, words = evaluation
    older = (out / name).read_bytes()
    assert main(words) == 0
    (out / name).write_bytes(older)
    assert main(["check-results", str(out / "results.json")]) == 2
    assert f"{name} belongs to the run" in capsys.readouterr().err
    (out / name).write_bytes(older[: len(older) // 2] if name != "report.html" else b"")
    assert main(["check-results", str(out / "results.json")]) == 2


def test_a_kill_between_scores_and_results_leaves_no_mixture_that_passes(
    evaluation, monkeypatch, capsys
):
    out, words = evaluation

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tprl_env.evaluation.compare_on_store.write_results", killed)
    assert main(words) == 130
    assert not list(out.rglob("*.png"))
    assert not (out / "report.html").exists()
    assert main(["check-results", str(out / "results.json")]) == 2
    assert "per_question.parquet belongs to the run" in capsys.readouterr().err


FILES = ("per_question.parquet", "report.html", "accuracy.png", "trajectories/trajectory-00.png")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_missing_file_is_noticed(evaluation, capsys, name):
    out, _ = evaluation
    results = json.loads((out / "results.json").read_text())
    assert set(results["files"]) == set(FILES)
    file, whole = out / name, (out / name).read_bytes()
    for place in (len(whole) // 2, len(whole) - 9):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        assert main(["check-results", str(out / "results.json")]) == 2
        sentence = capsys.readouterr().err
        assert name in sentence and sentence.count("\n") == 1
        assert main(["verify", str(out)]) == 2
        capsys.readouterr()
    file.unlink()
    assert main(["check-results", str(out / "results.json")]) == 2
    assert f"{file} is missing, but results.json names it" in capsys.readouterr().err
    file.write_bytes(whole)
    assert main(["verify", str(out)]) == 0


def test_a_flipped_bit_in_results_json_itself_is_noticed(evaluation, capsys):
    out, _ = evaluation
    file, text = out / "results.json", (out / "results.json").read_text()
    for number, char in enumerate(text):
        if char.isdigit() and text[number - 1] == "." and number % 7 == 0:
            other = "1" if char != "1" else "2"
            file.write_text(text[:number] + other + text[number + 1 :])
            assert main(["check-results", str(file)]) == 2, number
    assert "checksum" in capsys.readouterr().err


def test_a_copy_under_another_name_is_checked_alone(evaluation, tmp_path):
    out, _ = evaluation
    copy = tmp_path / "evaluation-small.json"
    copy.write_bytes((out / "results.json").read_bytes())
    (tmp_path / "report.html").write_text("another page")
    assert main(["check-results", str(copy)]) == 0


@pytest.mark.parametrize("task", ["crowded", "sparse"])
def test_the_results_behind_the_readme_are_accepted(task):
    file = Path(__file__).parents[2] / "benchmarks" / "results" / f"quickstart-{task}.json"
    assert main(["check-results", str(file)]) == 0


def test_a_report_is_drawn_again_from_the_stored_numbers(evaluation, capsys):
    out, _ = evaluation
    page = (out / "report.html").read_text()
    for name in ("report.html", "accuracy.png"):
        (out / name).unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert "trajectory" in "".join(json.loads((out / "results.json").read_text())["files"])
    assert main(["check-results", str(out / "results.json")]) == 0
    (out / "per_question.parquet").unlink()
    assert main(["report", str(out)]) == 2
    assert "per_question.parquet is missing" in capsys.readouterr().err
    assert main(["report", str(out / "elsewhere")]) == 2


def test_a_process_killed_over_an_older_result_leaves_no_mixture_that_passes(evaluation):
    out, words = evaluation
    script = (
        "import os, signal, sys\n"
        "import tprl_env.evaluation.compare_on_store as module\n"
        "module.write_results = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from tprl_env.cli.commands import main\n"
        "main(sys.argv[1:])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert main(["check-results", str(out / "results.json")]) == 2
    assert main(["report", str(out)]) == 2
    assert main(words) == 0
    assert main(["check-results", str(out / "results.json")]) == 0


def test_scores_that_do_not_add_up_are_refused(evaluation, capsys):
    out, _ = evaluation
    results = json.loads((out / "results.json").read_text())
    row = results["methods"][0]
    row["accuracy"], row["ci95"] = 0.125, [0.0, 1.0]
    damage.rewrite(out / "results.json", results)
    assert main(["check-results", str(out / "results.json")]) == 2
    assert "has the accuracy 0.125" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("drawn", "kind"),
    [("plot_accuracy", OSError), ("draw_examples", RuntimeError), ("write_report", OSError)],
)
def test_a_failed_picture_costs_no_data(run, tmp_path, monkeypatch, caplog, drawn, kind):
    def fails(*args, **options):
        raise kind("no font")

    module = "compare_on_store" if drawn == "draw_examples" else "report_files"
    monkeypatch.setattr(f"tprl_env.evaluation.{module}.{drawn}", fails)
    assert main(evaluation_words(run, str(tmp_path))) == 0
    name = {"plot_accuracy": "accuracy.png", "draw_examples": "trajectories"}
    place = tmp_path / name.get(drawn, "report.html")
    assert f"{place} could not be drawn ({kind.__name__}: no font)" in caplog.text
    assert main(["check-results", str(tmp_path / "results.json")]) == 0
    assert len(read_results(tmp_path / "results.json")["methods"]) == 4
    assert (tmp_path / "report.html").exists() == (drawn != "write_report")
    pictures = {path.name for path in tmp_path.rglob("*.png")}
    wanted = {"accuracy.png", "trajectory-00.png"}
    if drawn == "plot_accuracy":
        wanted.remove("accuracy.png")
    if drawn == "draw_examples":
        wanted.remove("trajectory-00.png")
    assert pictures == wanted


def test_an_evaluation_under_a_backend_that_is_not_there_has_its_pictures(run, tmp_path):
    words = evaluation_words(run, str(tmp_path))
    command = [sys.executable, "-m", "tprl_env.cli", *words]
    environment = {**os.environ, "MPLBACKEND": "module://garbage"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, "could not be drawn" in ended.stderr) == (0, False), ended.stderr
    assert (tmp_path / "accuracy.png").is_file() and (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.no_such", "qtagg", "nonsense"])
def test_the_backend_of_a_notebook_has_no_effect(tmp_path, backend):
    script = (
        "import sys; from pathlib import Path; from tprl_env.evaluation.plots import *; "
        "figure, axes = new_figure(); axes.plot([1, 2]); save_figure(figure, Path(sys.argv[1]))"
    )
    path = tmp_path / "a.png"
    environment = {**os.environ, "MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True)
    assert Image.open(path).size == (960, 600)
