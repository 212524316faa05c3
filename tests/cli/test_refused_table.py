"""What once ended in a traceback: each is one sentence, status 2, and nothing is written."""

import copy
import json
import os
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from mutations import ODD_VALUES
from small_run import files_under, make_small_run

from tprl_env.cli.commands import main
from tprl_env.env.single import TokenPruningEnv

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "quickstart-crowded.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("table"))


@pytest.fixture(autouse=True)
def environment():
    """Commands that talk to clusters set Ray's variables, which later tests must not see."""
    with mock.patch.dict(os.environ):
        yield


LINES = [
    ("compare --report", "--report needs the folder of a finished experiment: --out FOLDER"),
    ("compare --report --out none", "there is no experiment in none"),
    ("compare --report --out ''", "expected a path or a name, got ''"),
    ("compare", "needs the name of an experiment or a .py file"),
    ("compare ablation_quary", "did you mean 'ablation_query'?"),
    ("compare ablation_query --lvlm builtin:sparse", "needs --train, --calibration, --test too"),
    ("compare ablation_query --lvlm builtin:spare --train S --calibration S --test S",
     "did you mean 'builtin:sparse'?"),
    ("compare ablation_query --lvlm LVLM --train none --calibration S --test S",
     "no feature store at"),
    ("compare ablation_query --log tensorbord", "unknown logger 'tensorbord'"),
    ("encode --data DATA --lvlm LVLM --out x --device cuda", "use 'cpu', or install torch for"),
    ("encode --data DATA --lvlm LVLM --out x --device cuda:7", "device 'cuda:7' is not there"),
    ("autoencoder S --code-width 99999999999999999999", "--code-width must lie between 1 and"),
    ("autoencoder S --code-width 1000000000", "--code-width must lie between 1 and"),
    ("autoencoder S --code-width -1", "expected a whole number of at least 1, got '-1'"),
    ("autoencoder S --code-width 2.5", "expected a whole number of at least 1, got '2.5'"),
    ("autoencoder S --code-width ''", "expected a whole number of at least 1, got ''"),
    ("train smoke --out ''", "expected a path or a name, got ''"),
    ("train smoke --out=", "expected a path or a name, got ''"),
    ("train smoke --out ' '", "expected a path or a name, got ' '"),
    ("train '' --out x", "expected a path or a name, got ''"),
    ("train smoke --out x --policy.width 99999999999999999999", "width must be at most 1048576"),
    ("train smoke --out x --limits.iterations -5", "limits.iterations"),
    ("train smoke --out x --resources.num_scorers -1", "resources.num_scorers"),
    ("evaluate S --lvlm LVLM --out ''", "expected a path or a name, got ''"),
    ("evaluate S --lvlm LVLM --out x --budgets 99999999999999999999", "counts in [1, 16]"),
    ("evaluate S --lvlm LVLM --out x --limit -3", "--limit must be at least 1, got -3"),
    ("scenes --out x --data scenes-spare", "did you mean 'scenes-sparse'?"),
    ("scenes --out x --limit 0", "expected a whole number of at least 1, got '0'"),
    ("scenes --out x --split tset", "did you mean 'test'?"),
    ("scenes --out x --seed -1", "seed must be an integer of at least 0, got -1"),
    ("list", "required: kind"),
    ("quickstart --task spare --out x", "did you mean 'sparse'?"),
    ("quickstart --scale 0 --out x", "scale must be a finite number above 0, got 0.0"),
    ("quickstart --scale nan --out x", "scale must be a finite number above 0, got nan"),
    ("quickstart --scale -1 --out x", "scale"),
    ("verify none", "none does not exist"),
    ("report none", "no results file at"),
    ("check-results none", "no results file at"),
    ("tiny-lvlm train --task spare --out x", "did you mean 'sparse'?"),
    ("tiny-lvlm train --scale 0 --out x", "scale"),
    ("cliff S --lvlm LVLM --out x --rules fastvv", "did you mean 'fastv'?"),
    ("cliff S --lvlm LVLM --out x --counts 0", "counts"),
    ("token ''", "expected a path or a name, got ''"),
    ("submit smoke", "--storage is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), LINES, ids=[line for line, _ in LINES])
def test_one_sentence_and_nothing_written(run, tmp_path, monkeypatch, capsys, line, sentence):
    import shlex

    places = {"S": run.store, "LVLM": run.lvlm, "DATA": run.data}
    monkeypatch.chdir(tmp_path)
    shared = files_under(run.root)
    words = [str(places.get(word, word)) for word in shlex.split(line)]
    assert main(words) == 2
    captured = capsys.readouterr()
    said = [text for text in captured.err.splitlines() if text.startswith("tprl: ")]
    assert len(said) == 1 and sentence in said[0], captured.err
    assert "Traceback" not in captured.err + captured.out and len(said[0]) < 600
    assert list(tmp_path.iterdir()) == [] and files_under(run.root) == shared


def test_the_records_that_the_docs_name_are_accepted(capsys):
    for path in sorted(RECORD.parent.glob("quickstart-*.json")):
        assert main(["check-results", str(path)]) == 0
        assert f"{path}: 55 rows" in capsys.readouterr().out


ROW = ("methods", 0)
FIELDS = [
    (), ("task",), ("visual_tokens",), ("full",), ("full", "accuracy"), ("full", "questions"),
    ("full", "by_type"), ("methods",), ROW, (*ROW, "name"), (*ROW, "knowledge"), (*ROW, "budget"),
    (*ROW, "mean_tokens"), (*ROW, "accuracy"), (*ROW, "ci95"), (*ROW, "ci95", 0), ("training",),
    ("training", "seconds"), ("training", "seed"), ("versions",),
]  # fmt: skip
EDITS = [(), {}, None, True, "x", -1, [None], [[]], float("nan"), float("inf"), 10**30, "DROP"]


@pytest.mark.parametrize("field", FIELDS, ids=[".".join(map(str, f)) or "all" for f in FIELDS])
def test_every_edit_of_a_results_file_is_accepted_or_one_sentence(field, tmp_path, capsys):
    whole, refused = json.loads(RECORD.read_text()), 0
    path = tmp_path / "results.json"
    for value in EDITS:
        edited = {"": copy.deepcopy(whole)}
        holder, place = edited, ""
        for part in field:
            holder, place = holder[place], part
        if value == "DROP":
            del holder[place]
        else:
            holder[place] = list(value) if value == () else value
        path.write_text(json.dumps(edited.get("")))
        code = main(["check-results", str(path)])
        said = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in said, (field, value)
        assert said.count("\n") == (code == 2) and len(said) < 600, (field, value)
        refused += code == 2
    assert refused >= 6, f"{field}: of {len(EDITS)} edits only {refused} are refused"


@pytest.mark.parametrize("odd", [5, None, 2.5, True, b"x", [], {}, object(), np.zeros(3), "toys"])
def test_an_environment_of_no_source(odd):
    with pytest.raises(ValueError, match=r"source|no feature store at") as caught:
        TokenPruningEnv(odd)
    assert len(str(caught.value).split()) > 5


@pytest.mark.parametrize("odd", [5, 2.5, True, "x", [1], {"smaple": 1}, {"sample": "a"}, b"x"])
def test_reset_with_no_options(odd):
    env = TokenPruningEnv("toy:samples=6,tokens=8")
    with pytest.raises(ValueError, match=r"options|sample") as caught:
        env.reset(options=odd)
    assert len(str(caught.value).split()) > 5
    env.reset(seed=0)


def test_any_value_of_any_option_is_refused_in_a_sentence(run, tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    monkeypatch.chdir(tmp_path)
    odd = [str(v) for v in ODD_VALUES if v is not None and "\x00" not in str(v) and v is not True]
    for option in ("--device", "--dtype", "--batch-size", "--revision", "--concurrency"):
        for value in rng.sample(odd, 8):
            words = ["encode", "--data", "none.jsonl", "--lvlm", "none", "--out", "x"]
            assert main([*words, f"{option}={value}"]) == 2
            assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
