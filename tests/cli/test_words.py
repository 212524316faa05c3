"""Sentences in the shell's words: flags, not keywords; a suggestion only where one is near."""

import logging

import pytest

from tprl_env.checks import did_you_mean
from tprl_env.cli.commands import main
from tprl_env.cli.words import ShellWords, shell_words


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("repair it or pass skip_bad=True", "repair it or pass --skip-bad"),
        ("pass allow_outside=True", "pass --allow-outside"),
        ("start over with resume=False, or", "start over with --restart, or"),
        ("resume it with resume=True, or choose another out", "resume it with --resume, or choose "
         "another --out"),
        ("continue with that one (dtype=float32)", "continue with that one (--dtype float32)"),
        ("pass rules.budget=3,16", "pass --rules.budget 3,16"),
        ("pass source=STORE, a folder", "pass --source STORE, a folder"),
        ("batch_size must be at least 1, got 0", "--batch-size must be at least 1, got 0"),
        ("steps must be at least 1", "steps must be at least 1"),  # no option of this command
        ("encode x.py with a=b;", "encode x.py with --a b;"),
        ("the file skip_bad=Truee.png", "the file skip_bad=Truee.png"),
    ],
)  # fmt: skip
def test_keywords_become_flags(python, shell):
    assert shell_words(python, ["batch_size", "limit"]) == shell


def test_log_lines_too():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "give %s", ("skip_bad=True",), None)
    assert ShellWords("%(levelname)s: %(message)s").format(record) == "WARNING: give --skip-bad"


@pytest.mark.parametrize(
    ("value", "known", "meant"),
    [
        ("recomended", ("recommended", "ppo"), "recommended"),
        ("Batch-Size", ("batch_size", "limit"), "batch_size"),
        ("builtin:spare", ("builtin:crowded", "builtin:sparse"), "builtin:sparse"),
        ("divprun", ("divprune", "vispruner"), "divprune"),
        ("top", ("tome", "trim"), None),
        ("rgb", ("rgb_array", "ansi"), "rgb_array"),
        ("spare", ("crowded", "task"), None),
        ("nonsense", ("ablation_query", "sparse_anchor"), None),
        ("", ("a", "b"), None),
        (None, ("tone",), None),
    ],
)
def test_only_what_is_near_is_suggested_and_one_only(value, known, meant):
    expected = f"; did you mean {meant!r}?" if meant else ""
    assert did_you_mean(value, known) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("encod --data x", "did you mean 'encode'?; see `tprl --help`"),
        ("list pruner", "did you mean 'pruners'?; see `tprl list --help`"),
        ("evaluate s --lvlm l --polcy p", "did you mean '--policy'?; see `tprl evaluate --help`"),
        ("verify x --frobnicate", "unknown arguments --frobnicate; see `tprl verify --help`"),
        ("evaluate s --lvlm builtin:spare", "there is no LVLM 'builtin:spare'; built in are "
         "builtin:crowded, builtin:sparse; did you mean 'builtin:sparse'?"),
        ("cliff s --lvlm builtin:spare", "did you mean 'builtin:sparse'?"),
    ],
)  # fmt: skip
def test_the_nearest_word_of_a_command_line(line, said, capsys):
    assert main(line.split()) == 2
    assert said in capsys.readouterr().err
