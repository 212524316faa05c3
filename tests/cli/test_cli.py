"""Bad input: one sentence, exit status 2, nothing written, nothing lost."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import ray  # here, because its log handler keeps the stderr of the moment it is imported
import torch
from fake_lvlm import FakeLVLM
from lvlm_fixtures import save_llava
from small_run import files_under, make_small_run, write_dataset, write_jsonl, write_policy

import tprl_env
from tprl_env.cli.commands import build_parser, main
from tprl_env.cli.parsing import overrides
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm.encoding.encode import encode_dataset

ROW = {"id": "q0", "image": "0.png", "question": "what digit is at c1 ?", "answers": ["7"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must fail, and return its sentence."""

    def check(*words, folder=tmp_path):
        before = files_under(folder)
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("tprl: ")]
        assert len(lines) == 1, captured.err
        assert captured.err.splitlines()[-1] == lines[0]
        assert "Traceback" not in captured.err + captured.out
        assert len(lines[0]) < 500
        assert files_under(folder) == before
        return lines[0]

    return check


def encode_words(data, lvlm, out):
    return ["encode", "--data", data, "--lvlm", lvlm, "--out", out]


def evaluate_words(store, lvlm, out, *more):
    return ["evaluate", store, "--lvlm", lvlm, "--budgets", "4", "--out", out, *more]


# The command line itself ---------------------------------------------------------------------


def python(*words, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = os.path.dirname(os.path.dirname(tprl_env.__file__))
    environment["PYTHONPATH"] = root
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True, text=True, env=environment, cwd=cwd, timeout=120,
    )  # fmt: skip


HEAVY = ("torch", "ray", "transformers", "datasets", "matplotlib", "pandas")
LIGHT = f"""
import sys
from tprl_env.cli.commands import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("word", "said"), [("--help", "quickstart"), ("--version", tprl_env.__version__)]
)
def test_help_and_version_load_nothing_heavy(word, said):
    done = python("-c", LIGHT, word)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stdout.rstrip().endswith("loaded: []")


def test_a_real_process_says_one_sentence_and_ends_with_2(run, tmp_path):
    words = ["-m", "tprl_env.cli", *evaluate_words(tmp_path / "no", run.lvlm, tmp_path / "out")]
    done = python(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tprl: no feature store at ")
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help(capsys):
    for command in ("quickstart", "encode", "autoencoder", "train", "evaluate", "tiny-lvlm"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert command in capsys.readouterr().out


def train_help(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_train_shows_every_setting_with_its_meaning(capsys):
    from tprl_env.rllib.config import TrainConfig
    from tprl_env.rllib.config.algorithm import SETTINGS

    text = train_help(capsys)
    names = set().union(*(TrainConfig().replace(algorithm=name).flat() for name in SETTINGS))
    assert len(names) == 89 and "--resume [auto]" in text
    for name in names:
        _, found, rest = text.partition(f"  --{name.replace('_', '-')} ")
        assert found, name
        meaning = " ".join(rest.partition("\n")[2].partition("\n  --")[0].split())
        assert re.match(r"\S.{5,} \(default: .+\)", meaning), (name, meaning)
    assert "--rules.budget INT|FLOAT|LOW,HIGH|none" in text
    assert "--policy.query-norm none|rms|layer" in text
    assert "--policy.token-norm true|false" in text


def test_the_help_of_a_preset_shows_its_values(capsys, refused):
    text = " ".join(train_help(capsys, "budget_conditioned").split())
    assert "are shares of the sample's tokens. (default: 3,72)" in text
    assert "KL(policy || initial policy) (GRPO). (default: 0.04)" in text
    assert "--algorithm.memory-size" not in text and "--algorithm.gae-lambda" not in text
    assert "did you mean 'recommended'" in refused("train", "recomended", "--help")


def test_the_help_of_train_loads_neither_ray_nor_torch():
    script = (
        "import sys\nfrom tprl_env.cli.commands import main\n"
        "try:\n    main(['train', 'mapo', '--help'])\nfinally:\n"
        "    print([n for n in ('ray', 'torch', 'transformers') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "required: command; see `tprl --help`"),
        (["encod"], "invalid choice: 'encod'"),
        (["encode", "--data", "x.jsonl"], "required: --lvlm, --out; see `tprl encode --help`"),
        (["evaluate", "s", "--lvlm", "l", "--budgets", "4,x"], "separated by commas"),
        (["evaluate", "s", "--lvlm", "l", "--pruners", "random,"], "names separated by commas"),
        (["evaluate", "s", "--lvlm", "l", "--polcy", "p"], "unknown arguments --polcy p"),
        (["autoencoder", "s", "--code-width", "0"], "at least 1, got '0'"),
        (["train", "smoke", "--algorithm.lr"], "--algorithm.lr has no value; write --algorithm.lr"),
        (["train", "smoke", "--algorithm.lr", "--seed", "2"], "--algorithm.lr has no value"),
        (["train", "smoke", "lr", "2"], "expected --field value, got 'lr'"),
        # an abbreviation is a field of the config, never an option of the command
        (["train", "smoke", "--re", "1"], "TrainConfig has no field 're'"),
    ],
)
def test_a_command_line_that_cannot_be_read(refused, words, sentence):
    assert sentence in refused(*words)


def test_fields_are_read_from_the_rest_of_the_line():
    words = ["--algorithm.lr", "1e-3", "--seed=2", "--policy.budget-input", "no"]
    words += ["--imitation.batch_size", "5", "--rules.alpha", "-1"]
    assert overrides(words) == {
        "algorithm.lr": "1e-3",
        "seed": "2",
        "policy.budget_input": "no",
        "imitation.batch_size": "5",
        "rules.alpha": "-1",
    }


def test_an_error_of_several_lines_is_told_in_one(monkeypatch, capsys):
    def fail(args):
        raise ValueError("the real\nreason")

    monkeypatch.setattr("tprl_env.cli.commands.check_results", fail)
    assert main(["check-results", "x.json"]) == 2
    assert capsys.readouterr().err == "tprl: the real reason\n"


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tprl_env.cli.commands.check_results", interrupt)
    assert main(["check-results", "x.json"]) == 130
    assert "interrupted" in capsys.readouterr().err


# Encode --------------------------------------------------------------------------------------


def test_encode_says_what_it_made(run, tmp_path, capsys):
    assert main([str(w) for w in encode_words(run.data, run.lvlm, tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"12 questions about 6 images in .*store; accuracy with all tokens 0\.25", said
    )
    assert "left out" not in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"question": "  "}, "sample 'q0' has an empty question"),
        ({"answers": []}, "sample 'q0' has no answer"),
        ({"answers": [""]}, "sample 'q0' has no answer"),
        ({"image": "none.png"}, "cannot read the image"),
        ({"answers": {"a": "7"}}, "line 2: the field 'answers' must be a string or a number"),
        ({"image": "../0.png"}, "--allow-outside"),
        ({"color": "red"}, "unknown fields ['color']"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_is_encoded(run, tmp_path, refused, change, sentence):
    write_dataset(tmp_path, images=1)
    data = write_jsonl(tmp_path / "bad.jsonl", [{**ROW, "id": "q9"}, {**ROW, **change}])
    assert sentence in refused(*encode_words(data, run.lvlm, tmp_path / "store"))


def test_an_unreadable_image_is_named_or_skipped_and_counted(run, tmp_path, refused, capsys):
    data = write_dataset(tmp_path, images=3)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    words = encode_words(data, run.lvlm, tmp_path / "store")
    sentence = refused(*words)
    assert "1.png" in sentence
    assert "'q2'" in sentence
    assert "--skip-bad" in sentence
    assert main([str(word) for word in [*words, "--skip-bad"]]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("4 questions about 2 images")
    assert said.endswith("; 2 bad samples left out")


def test_a_grader_that_is_not_computed_is_refused_or_skipped_and_counted(
    run, tmp_path, refused, capsys
):
    write_dataset(tmp_path, images=1)
    rows = [{**ROW, "grader": "exact"}, {**ROW, "id": "q1", "grader": "vqa"}]
    data = write_jsonl(tmp_path / "graded.jsonl", rows)
    words = encode_words(data, run.lvlm, tmp_path / "store")
    sentence = refused(*words)
    assert "sample 'q1' asks for the grader 'vqa'" in sentence
    assert 'set "grader": "exact"' in sentence and "--skip-bad" in sentence
    assert main([str(word) for word in [*words, "--skip-bad"]]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("1 questions about 1 images")
    assert said.endswith("; 1 bad samples left out")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "has no samples"), ("{", "is not JSON"), (None, "cannot read the dataset")],
)
def test_a_dataset_without_samples(run, tmp_path, refused, text, sentence):
    data = tmp_path / "questions.jsonl"
    if text is not None:
        data.write_text(text)
    assert sentence in refused(*encode_words(data, run.lvlm, tmp_path / "store"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data", "scenes-crowdet"], "did you mean 'scenes-crowded'?"),
        (["--data", "scenes-sparse", "--split", "tests"], "'tests'"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--lvlm", "no/such/folder"], "does not exist"),
        (["--lvlm", "builtin:crowdet"], "no LVLM 'builtin:crowdet'"),
        (["--lvlm", "builtin:spare"], "did you mean 'builtin:sparse'?"),
        (["--dtype", "float63"], "float63"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_unknown_names_and_sizes(run, tmp_path, refused, more, sentence):
    words = encode_words(run.data, run.lvlm, tmp_path / "store")
    assert sentence in refused(*words, *more)


def test_an_lvlm_with_truncated_weights(run, tmp_path, refused):
    shutil.copytree(run.lvlm, tmp_path / "lvlm")
    (weights,) = (tmp_path / "lvlm").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    words = encode_words(run.data, tmp_path / "lvlm", tmp_path / "store")
    assert "are damaged" in refused(*words)


def test_a_missing_lvlm_is_refused_before_ray_starts(run, tmp_path, refused):
    words = encode_words(run.data, "no/such/folder", tmp_path / "store")
    assert "does not exist" in refused(*words, "--engine", "ray")
    assert not ray.is_initialized()


def test_a_folder_that_holds_something_else_is_not_touched(run, tmp_path, refused):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("all my work")
    sentence = refused(*encode_words(run.data, run.lvlm, tmp_path / "store"))
    assert "'thesis.txt'" in sentence
    (tmp_path / "file").write_text("x")
    refused(*encode_words(run.data, run.lvlm, tmp_path / "file"))


@pytest.mark.parametrize("poison", ["tokens", "tower", "query", "score"])
def test_features_that_are_not_finite_are_refused(tmp_path, refused, monkeypatch, poison):
    lvlm = FakeLVLM(poison=poison)
    monkeypatch.setattr("tprl_env.lvlm.load_lvlm", lambda *args, **kwargs: lvlm)
    data = write_dataset(tmp_path, images=2)
    sentence = refused(*encode_words(data, "fake", tmp_path / "store"))
    assert "not finite" in sentence or "got nan" in sentence
    assert "'q" in sentence or ".png" in sentence  # names the sample or its image


def test_what_was_encoded_before_the_failure_is_kept(run, tmp_path, monkeypatch, capsys):
    small_files = partial(encode_dataset, shard_images=2)
    monkeypatch.setattr("tprl_env.lvlm.encoding.encode.encode_dataset", small_files)
    data = write_dataset(tmp_path, images=6)
    good = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(b"not a picture")
    words = [str(word) for word in encode_words(data, run.lvlm, tmp_path / "store")]
    assert main(words) == 2
    kept = files_under(tmp_path / "store")
    assert [name for name in kept if name.startswith("images-")]  # the first units
    (tmp_path / "5.png").write_bytes(good)
    assert main(words) == 0
    finished = files_under(tmp_path / "store")
    assert all(finished[name] == kept[name] for name in kept if name.endswith(".arrow"))
    assert "12 questions about 6 images" in capsys.readouterr().out


def test_another_lvlm_or_dataset_does_not_continue_a_store(run, tmp_path, refused):
    store = tmp_path / "store"
    shutil.copytree(run.store, store)
    other = save_llava(tmp_path / "other", seed=1)
    assert main([str(w) for w in encode_words(run.data, run.lvlm, tmp_path / "mine")]) == 0
    assert "was started with the LVLM" in refused(*encode_words(run.data, other, tmp_path / "mine"))
    words = encode_words(write_dataset(tmp_path / "d", images=2), run.lvlm, tmp_path / "mine")
    assert "--restart" in refused(*words)
    assert main([str(word) for word in [*words, "--restart"]]) == 0
    assert len(FeatureStore.open(tmp_path / "mine")) == 4


def test_the_same_data_by_another_path_and_with_more_lines_goes_on(run, tmp_path, capsys):
    data = write_dataset(tmp_path / "d", images=3)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:4]))
    assert main([str(w) for w in encode_words(data, run.lvlm, tmp_path / "store")]) == 0
    before = files_under(tmp_path / "store")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    again = encode_words(tmp_path / "link" / data.name, run.lvlm, tmp_path / "store")
    assert main([str(w) for w in again]) == 0
    assert files_under(tmp_path / "store") == before
    data.write_text("".join(lines))
    assert main([str(w) for w in again]) == 0
    after = files_under(tmp_path / "store")
    assert all(after[name] == before[name] for name in before if name.endswith(".arrow"))
    assert "6 questions about 3 images" in capsys.readouterr().out


def test_tilde_is_the_home_folder_in_every_option(run, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    data = write_dataset(home / "d", images=1)
    (home / "lvlm").symlink_to(run.lvlm)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    data = f"~/d/{data.name}"
    assert main(["encode", f"--data={data}", "--lvlm=~/lvlm", "--out=~/store"]) == 0
    assert main(["autoencoder", "~/store", "--steps=1", "--out=~/a", "--also", "~/store"]) == 0
    assert (home / "a" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert overrides(["--store=~/s", "--lvlm", "~/m"]) == {
        "store": f"{home}/s",
        "lvlm": f"{home}/m",
    }


PLACES = {
    "encode": ("--data", "--lvlm", "--out"),
    "autoencoder": ("store", "--also", "--out", "--load"),
    "train": ("config", "--out", "--init-policy"),
    "evaluate": ("store", "--lvlm", "--policy", "--calibration", "--out"),
    "compare": ("config", "--out", "--shared", "--lvlm", "--train", "--calibration", "--test"),
    "quickstart": ("--out",),
    "submit": ("config", "--storage", "--working-dir"),
    "token": ("path",),
    "check-results": ("file",),
    "report": ("out",),
}


@pytest.mark.parametrize(("command", "options"), PLACES.items())
def test_every_option_that_names_a_place_expands_and_refuses_nothing(refused, command, options):
    (commands,) = [a for a in build_parser()._actions if isinstance(a.choices, dict)]
    actions = {
        name: action
        for action in commands.choices[command]._actions
        for name in (action.option_strings or [action.dest])
    }
    for option in options:
        assert str(actions[option].type("~/x")) == os.path.expanduser("~/x")
        with pytest.raises(argparse.ArgumentTypeError, match="expected a path or a name, got ''"):
            actions[option].type("")


def test_an_unknown_home_folder_is_refused(refused):
    assert "no home folder for '~nobody-here/x'" in refused(
        *encode_words("scenes-sparse", "builtin:sparse", "~nobody-here/x")
    )


# Stores --------------------------------------------------------------------------------------


@pytest.fixture
def damaged(run, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(run.store, folder)
    return folder


def commands_on(store, run, out):
    return (
        evaluate_words(store, run.lvlm, out, "--pruners", "random"),
        ["autoencoder", store, "--steps", "1"],
        ["autoencoder", run.store, "--steps", "1", "--also", store],
    )


def test_a_missing_store(run, tmp_path, refused):
    for words in commands_on(tmp_path / "nothing", run, tmp_path / "out"):
        before = files_under(run.root)
        assert "no feature store at" in refused(*words)
        assert files_under(run.root) == before


def test_a_truncated_store(run, damaged, tmp_path, refused):
    (file,) = damaged.glob("samples-*.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    for words in commands_on(damaged, run, tmp_path / "out"):
        sentence = refused(*words)
        assert file.name in sentence
        assert "truncated" in sentence


def test_an_unfinished_store_and_a_foreign_folder(run, damaged, tmp_path, refused):
    (damaged / "manifest.json").unlink()
    for words in commands_on(damaged, run, tmp_path / "out"):
        assert "is unfinished" in refused(*words)
    for words in commands_on(run.lvlm, run, tmp_path / "out"):
        assert "is not a feature store" in refused(*words)


def test_a_store_of_another_model(run, tmp_path, refused):
    other = save_llava(tmp_path / "other", seed=1)
    sentence = refused(*evaluate_words(run.store, other, tmp_path / "out"))
    assert "was encoded by the LVLM" in sentence


def test_an_autoencoder_of_another_model_or_shape(run, tmp_path, refused):
    assert "not a folder" in refused("autoencoder", run.store, "--load", tmp_path / "none")
    assert "config.json must describe" in refused("autoencoder", run.store, "--load", run.policy)
    other = make_small_run(tmp_path / "other")
    lvlm = save_llava(tmp_path / "lvlm", seed=1)
    assert main([str(w) for w in encode_words(other.data, lvlm, tmp_path / "store")]) == 0
    sentence = refused("autoencoder", tmp_path / "store", "--load", run.autoencoder)
    assert "the autoencoder belongs to" in sentence


def test_the_autoencoder_command_writes_codes_into_all_stores(run, tmp_path, capsys):
    for name in ("one", "two"):
        assert main([str(w) for w in encode_words(run.data, run.lvlm, tmp_path / name)]) == 0
    words = ["autoencoder", tmp_path / "one", "--also", tmp_path / "two", "--code-width", "6"]
    assert main([str(word) for word in [*words, "--steps", "20"]]) == 0
    assert "explained variance" in capsys.readouterr().out
    stores = [FeatureStore.open(tmp_path / name) for name in ("one", "two")]
    assert [store.code_width for store in stores] == [6, 6]
    assert np.array_equal(stores[0].codes([3]), stores[1].codes([3]))
    assert (tmp_path / "one" / "autoencoder" / "config.json").is_file()


# Evaluate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budgets", "17"], "budgets must be one or more counts in [1, 16]"),
        (["--budgets", "4,0"], "budgets must be one or more counts in [1, 16]"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--pruners", "divprun"], "did you mean 'divprune'"),
        (["--pruners", "oracle"], "needs relevance, which this store does not hold"),
        (["--pruners", "random,policy"], "give its folder as policy (--policy)"),
        (["--threshold", "0.5"], "belong to a policy"),
        (["--policy", "POLICY", "--threshold", "1.5"], "threshold must lie in (0, 1), got 1.5"),
        (["--policy", "POLICY", "--threshold", "0"], "threshold must lie in (0, 1), got 0"),
        (["--policy", "POLICY", "--calibration", "none"], "no feature store at"),
        (["--policy", "none"], "none is not a folder"),
        (["--policy", "AUTOENCODER"], "must describe a pruning-policy"),
        (["--lvlm", "no/such/folder"], "LVLM folder 'no/such/folder' does not exist"),
    ],
)
def test_evaluate_refuses(run, tmp_path, refused, more, sentence):
    folders = {"POLICY": run.policy, "AUTOENCODER": run.autoencoder}
    words = [folders.get(word, word) for word in more]
    assert sentence in refused(*evaluate_words(run.store, run.lvlm, tmp_path / "out", *words))


@pytest.mark.parametrize("change", [{"token_width": 12}, {"query_width": 20}])
def test_a_policy_of_another_shape(run, tmp_path, refused, change):
    policy = write_policy(tmp_path / "policy", FeatureStore.open(run.store), **change)
    words = evaluate_words(run.store, run.lvlm, tmp_path / "out", "--policy", policy)
    assert "take the policy that was trained with this store" in refused(*words)


def test_a_policy_on_a_store_without_codes(run, tmp_path, refused):
    assert main([str(w) for w in encode_words(run.data, run.lvlm, tmp_path / "store")]) == 0
    words = evaluate_words(tmp_path / "store", run.lvlm, tmp_path / "out", "--policy", run.policy)
    assert "tprl autoencoder" in refused(*words)


def test_a_damaged_policy(run, tmp_path, refused):
    policy = tmp_path / "policy"
    shutil.copytree(run.policy, policy)
    weights = next(policy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-50])
    words = evaluate_words(run.store, run.lvlm, tmp_path / "out", "--policy", policy)
    assert "is damaged" in refused(*words)


def test_results_that_cannot_be_written_are_refused_before_the_work(run, tmp_path, refused):
    (tmp_path / "out").write_text("a file")
    sentence = refused(*evaluate_words(run.store, run.lvlm, tmp_path / "out"))
    assert str(tmp_path / "out") in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "no results file"), ("{", "not valid JSON"), ("[]", "must hold a JSON object"),
     ("{}", "'task' must be a str")],
)  # fmt: skip
def test_results_that_are_none(tmp_path, refused, text, sentence):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert sentence in refused("check-results", tmp_path / "results.json")


# Train ---------------------------------------------------------------------------------------


def train_words(run, out, *more):
    words = ["train", "recommended", "--source", run.store, "--lvlm", run.lvlm, "--out", out]
    return [*words, "--limits.iterations", "1", "--rules.budget", "4,8", *more]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recomended"], "recommended"),
        (["none.py"], "there is no config file"),
        (["smoke", "--learning_rate", "1"], "TrainConfig has no field 'learning_rate'"),
        (["smoke", "--algorithm.entropi", "1"], "did you mean 'algorithm.entropy'"),
        (["smoke", "--entropy", "1"], "no field 'entropy'; it is now 'algorithm.entropy'"),
        (["smoke", "--one-budget", "1"], "it is now 'rollout.shared_budget'"),
        (["smoke", "--algorithm.memory-size", "1"], "applies to algorithm='mapo' only"),
        (["smoke", "--algorithm.lr", "fast"], "algorithm.lr must be float, got 'fast'"),
        (["smoke", "--algorithm.lr", "-1"], "algorithm.lr must be positive"),
        (["smoke", "--rules.max-steps", "0"], "rules.max_steps must be"),
        (["smoke", "--rules.budget", "0"], "rules.budget must be"),
        (["smoke", "--rules.budget", "9,3"], "rules.budget (low, high)"),
        (["smoke", "--limits.iterations", "none"], "this run would never end"),
        (["recommended", "--limits.iterations", "1"], "source is empty; pass --source"),
    ],
)
def test_train_refuses_a_config(tmp_path, refused, words, sentence):
    assert sentence in refused("train", *words, "--out", tmp_path / "out")


def test_train_refuses_a_missing_store(run, tmp_path, refused):
    words = train_words(run, tmp_path / "out", "--source", tmp_path / "none")
    assert "no feature store at" in refused(*words)


def test_train_refuses_a_missing_lvlm(run, tmp_path, refused):
    words = train_words(run, tmp_path / "out", "--lvlm", "no/such/folder")
    assert "does not exist" in refused(*words)


def test_train_refuses_a_budget_that_the_store_cannot_meet(run, tmp_path, refused):
    words = train_words(run, tmp_path / "out", "--rules.budget", "17")
    assert "must be at most the 16 tokens of the source" in refused(*words)


def test_train_refuses_a_policy_of_another_shape(run, tmp_path, refused):
    policy = write_policy(tmp_path / "policy", FeatureStore.open(run.store), token_width=12)
    sentence = refused(*train_words(run, tmp_path / "out", "--init-policy", policy))
    assert "token_width" in sentence


def test_quickstart_refuses_an_unknown_task(tmp_path, refused):
    assert "'crowdet'" in refused("quickstart", "--task", "crowdet", "--out", tmp_path / "out")


def test_the_tiny_lvlm_of_an_unknown_task(tmp_path, refused):
    assert "'crowdet'" in refused(
        "tiny-lvlm", "train", "--task", "crowdet", "--out", tmp_path / "out"
    )
