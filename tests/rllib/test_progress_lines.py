"""The lines that a training prints."""

import pytest

pytest.importorskip("ray")

from tprl_env.rllib.run.metrics_row import ProgressLines

ROW = {
    "seconds": 12.6, "scores": 512, "mean_return": 0.51239, "score": None, "kept": 14.26,
    "scores_per_second": 123.4, "busy_share": 0.876,
}  # fmt: skip


def test_a_head_and_a_line_every_few_iterations(capsys):
    lines = ProgressLines(5)
    lines.say("begins at [7]")
    for iteration in range(1, 8):
        lines.show({"iteration": iteration, **ROW})
    assert capsys.readouterr().out == (
        "begins at [7]\n"
        "iteration    seconds     scores     return      score  tokens kept   scores/s"
        "  scorers busy\n"
        "        1         13        512      0.512          -         14.3        123"
        "           88%\n"
        "        6         13        512      0.512          -         14.3        123"
        "           88%\n"
    )


def test_zero_prints_nothing(capsys):
    lines = ProgressLines(0)
    lines.say("begins")
    lines.show({"iteration": 1, **ROW})
    assert capsys.readouterr().out == ""
