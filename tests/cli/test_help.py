"""Help that is complete, names that can be listed, scenes that can be written."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from tprl_env.cli.commands import build_parser, main
from tprl_env.cli.help import EXAMPLES, sub_commands
from tprl_env.cli.listing import KINDS, entries
from tprl_env.data import DATASETS, load_dataset
from tprl_env.data.benchmarks import BENCHMARKS
from tprl_env.lvlm import FAMILIES
from tprl_env.reducers import PRUNERS, REDUCERS
from tprl_env.reducers.layer import LAYER_PRUNERS
from tprl_env.rllib.config import presets_folder

COMMANDS = dict(sub_commands(build_parser()))
STEMS = {
    "presets": sorted(p.stem for p in presets_folder().glob("[!_]*.py")),
    "experiments": sorted(p.stem for p in presets_folder().glob("experiments/[!_]*.py")),
    "pruners": [*PRUNERS, "policy"],
    "reducers": list(REDUCERS),
    "layer-pruners": list(LAYER_PRUNERS),
    "datasets": [*DATASETS, "FILE.jsonl"],
    "benchmarks": list(BENCHMARKS),
    "lvlms": ["builtin:crowded", "builtin:sparse", "FOLDER or HUB/ID"],
}


@pytest.mark.parametrize("words", COMMANDS)
def test_every_help_tells_the_form_and_default_of_every_option_and_an_example(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in COMMANDS[words]._actions:
        assert action.help and len(action.help) > 5, action.dest
        shown = " ".join(action.help.replace("%(default)s", str(action.default)).split())
        assert shown in text, action.dest
        if action.option_strings and action.nargs != 0:
            form = next(f for f in action.option_strings)
            assert f"{form} " in text and "TRUE" not in text
            rest = text[text.index(shown) :][: len(shown) + 60]
            assert "default" in rest or "(required)" in rest, action.dest
    assert f"example: {EXAMPLES[words]}" in text


@pytest.mark.parametrize("words", EXAMPLES)
def test_every_example_is_a_line_that_the_command_reads(words):
    line = shlex.split(EXAMPLES[words])
    assert line[0] == "tprl" and line[1 : 1 + len(words.split())] == words.split()
    args, rest = build_parser().parse_known_args(line[1:])
    assert rest == [] or args.takes_fields


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_has_every_name_with_what_it_is(kind, capsys):
    assert main(["list", kind, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == STEMS[kind]
    assert all(len(one["about"]) > 20 and "\n" not in one["about"] for one in found)
    assert main(["list", kind]) == 0
    text = capsys.readouterr().out
    for one in found:
        assert f"\n{one['name']}\n    {one['about']}\n" in text


def test_lists_have_the_defaults():
    pruners = {one.name: one.defaults for one in entries("pruners")}
    assert pruners["vispruner"] == {"important_ratio": 0.5, "drop_per_round": 8}
    presets = {one.name: one.defaults for one in entries("presets")}
    assert presets["budget_conditioned"]["rules.budget"] == (3, 72)
    experiments = {one.name: one.defaults for one in entries("experiments")}
    assert experiments["compare_optimizers"]["arms"] == ("ppo", "grpo", "mapo")
    assert all(name in entries("lvlms")[-1].about for name in FAMILIES)


def test_scenes_are_written_as_a_dataset_that_reads_back(tmp_path, capsys):
    out = tmp_path / "mine"
    words = ["scenes", "--data", "scenes-sparse", "--limit", "8", "--out", str(out)]
    assert main(words) == 0
    assert f"8 questions about 2 pictures in {out / 'questions.jsonl'}" in capsys.readouterr().out
    read = list(load_dataset(out / "questions.jsonl"))
    own = list(load_dataset("scenes-sparse", "test", limit=8))
    for one, two in zip(read, own, strict=True):
        assert (one.id, one.question, one.answers) == (two.id, two.question, two.answers)
        assert one.question_type == two.question_type
        assert np.array_equal(one.image, two.image)
    with Image.open(next(out.glob("*.png"))) as picture:
        assert picture.format == "PNG"
    assert main(words) == 2  # what is there is not overwritten
    assert "is not an empty folder; choose another --out" in capsys.readouterr().err
