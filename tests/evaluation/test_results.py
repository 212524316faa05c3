import copy
import json
import math

import pytest

from tprl_env.cli.commands import main
from tprl_env.evaluation.result_files import read_results
from tprl_env.evaluation.results import check_results
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
    assert read_results(tmp_path / "results.json") == read_results(tmp_path) == GOOD
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


def leaves(value, path=()):
    """Paths of all values in a file, containers too."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, part in items:
        yield from leaves(part, (*path, key))


def changed(path, value):
    results = copy.deepcopy(GOOD)
    place = results
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return results


NUMBERS = [path for path in leaves(GOOD) if path and isinstance(path[-1], str | int)]
BAD = (float("nan"), float("inf"), -float("inf"), -1, -0.5, None, True, "x", [], {}, 10**400, 1e308)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:9])
def test_every_edit_of_every_value_is_refused_in_one_sentence_or_harmless(bad):
    accepted = []
    for path in NUMBERS:
        try:
            check_results(changed(path, bad))
        except ValueError as error:
            assert len(str(error)) < 400
        else:
            accepted.append(path)
    harmless = {"x": ("name", "task", "preset", "algorithm"), "{}": ("by_type", "training")}
    free = harmless.get(bad if bad == "x" else repr(bad), ())
    finite = not (isinstance(bad, float) and not math.isfinite(bad))
    for path in accepted:  # versions are for people to read
        assert path[-1] in free or (path[0] == "versions" and finite)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "1e400"])
def test_numbers_that_cannot_be_are_refused_by_the_command(text, tmp_path, capsys):
    fields = {
        '"accuracy": 0.97': "'accuracy'",
        '"seconds": 200.5': "'seconds'",
        '"mean_tokens": 14.0': "'mean_tokens'",
        "0.88": "'ci95'",
    }
    for name, field in fields.items():
        wrong = json.dumps(GOOD).replace(name, f"{name.rpartition(' ')[0]} {text}", 1)
        (tmp_path / "results.json").write_text(wrong)
        assert main(["check-results", str(tmp_path / "results.json")]) == 2
        sentence = capsys.readouterr().err
        assert sentence.startswith(f"tprl: {tmp_path / 'results.json'}: ")
        assert field.strip("'") in sentence and sentence.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{}", "{", "[" * 100_000, "\x00"])
def test_what_is_no_results_file_is_refused(text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    assert main(["check-results", str(tmp_path / "results.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    assert main(["check-results", str(tmp_path / "bytes.json")]) == 2
    assert main(["check-results", str(tmp_path)]) == 2


def test_a_method_measured_twice_and_more_tokens_than_there_are():
    for change, sentence in (
        ({"budget": 48}, "twice"),
        ({"budget": 145}, "within the 144 visual tokens"),
        ({"mean_tokens": 144.5}, "within the 144 visual tokens"),
    ):
        results = copy.deepcopy(GOOD)
        results["methods"][1].update(change)
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
