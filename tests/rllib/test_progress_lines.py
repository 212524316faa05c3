"""The lines that a training prints."""

import pytest

pytest.importorskip("ray")

from tprl_env.rllib.run.metrics_row import ProgressLines

ROW = {
    "seconds": 12.6, "scores": 512, "mean_return": 0.51239, "score": None, "kept": 14.26,
    "scores_per_second": 123.4, "busy_share": 0.876,
}  # fmt: skip


def iterations(capsys):
    """Numbers of the iterations that have a line below the head."""
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "iteration"
    return [int(row.split()[0]) for row in rows]


def test_a_head_and_a_line(capsys):
    lines = ProgressLines(5)
    lines.say("begins at [7]")
    lines.show({"iteration": 1, **ROW})
    assert capsys.readouterr().out == (
        "begins at [7]\n"
        "iteration    seconds     scores     return      score  tokens kept   scores/s"
        "  scorers busy\n"
        "        1         13        512      0.512          -         14.3        123"
        "           88%\n"
    )


def test_the_first_few_iterations_have_lines_then_one_in_a_few(capsys):
    lines = ProgressLines(5)
    for iteration in range(1, 19):
        lines.show({"iteration": iteration, **ROW})
    assert iterations(capsys) == [1, 2, 3, 4, 5, 6, 11, 16]


def test_the_last_iteration_always_has_a_line(capsys):
    lines = ProgressLines(5)
    for iteration in range(1, 10):
        lines.show({"iteration": iteration, **ROW}, last=iteration == 9)
    assert iterations(capsys) == [1, 2, 3, 4, 5, 6, 9]


def test_zero_prints_nothing(capsys):
    lines = ProgressLines(0)
    lines.say("begins")
    lines.show({"iteration": 1, **ROW})
    assert capsys.readouterr().out == ""
