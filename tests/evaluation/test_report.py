import numpy as np
import pytest
from PIL import Image

from tprl_env.evaluation.report import plot_accuracy, plot_learning_curve, write_report

METHODS = [("policy", "policy"), ("DivPrune <b>", "heuristic"), ("oracle", "oracle")]
RESULTS = {
    "task": "crowded",
    "visual_tokens": 144,
    "full": {"accuracy": 0.97, "questions": 1000, "by_type": {"at": 0.98}},
    "methods": [
        {
            "name": name,
            "knowledge": knowledge,
            "budget": budget,
            "mean_tokens": float(budget),
            "accuracy": 0.5 + budget / 200,
            "ci95": [0.45 + budget / 200, 0.55 + budget / 200],
        }
        for name, knowledge in METHODS
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
CURVE = [
    {"lvlm_scores": scores, "accuracy": {"48": 0.9, "14": 0.5 + scores / 1e5}}
    for scores in (0, 10_000, 20_000)
]


def test_plots_are_pictures_with_something_on_them(tmp_path):
    for path in (
        plot_accuracy(RESULTS, tmp_path / "accuracy.png"),
        plot_learning_curve(CURVE, 0.97, tmp_path / "curve.png"),
    ):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[0] >= 400
        assert (pixels < 200).mean() > 0.01


def test_an_empty_learning_curve_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one point"):
        plot_learning_curve([], 0.9, tmp_path / "curve.png")


def test_the_page_stands_alone_and_escapes_names(tmp_path):
    plot = plot_accuracy(RESULTS, tmp_path / "accuracy.png")
    page = write_report(RESULTS, [(plot, "accuracy")], [(plot, "one & two")], tmp_path / "r.html")
    text = page.read_text()
    assert "DivPrune &lt;b&gt;" in text
    assert "one &amp; two" in text
    assert text.count("data:image/png;base64,") == 2
    assert 'src="/' not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "0.740" in text  # .5 + 48 / 200
