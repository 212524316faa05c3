import re

import numpy as np
import pytest
from PIL import Image
from PIL.ImageFont import FreeTypeFont

from tprl_env.env import render
from tprl_env.evaluation.findings import FULL_PASS, differences, headline, headline_budget
from tprl_env.evaluation.intervals import paired_difference
from tprl_env.evaluation.measure import summarise
from tprl_env.evaluation.plots import COLORS, method_colors, plot_accuracy, plot_learning_curve
from tprl_env.evaluation.report import GLOSSARY, write_report
from tprl_env.evaluation.trajectories import COLUMNS, Examples, choose_with_failures

BUDGETS = (48, 29, 14, 7, 4)
METHODS = {  # name: knowledge, accuracy at 7 tokens
    "policy": ("policy", 0.8),
    "policy, calibrated threshold": ("policy", 0.81),
    "imitation only": ("policy", 0.75),
    "DivPrune <b>": ("heuristic", 0.3),
    "VisPruner": ("heuristic", 0.25),
    FULL_PASS: ("heuristic", 0.79),
    "question oracle": ("oracle", 0.9),
}


def method_row(name, knowledge, accuracy, budget):
    accuracy = min(accuracy + (budget - 7) / 400, 1.0)
    return {
        "name": name,
        "knowledge": knowledge,
        "budget": budget,
        "mean_tokens": budget + 0.25 if "threshold" in name else float(budget),
        "std_tokens": 0.0,
        "accuracy": accuracy,
        "ci95": [max(accuracy - 0.02, 0), min(accuracy + 0.02, 1)],
        "by_type": {"at": accuracy, "exists": accuracy / 2},
        "seconds": 1.25,
    }


RESULTS = {
    "run": "0123456789abcdef",
    "task": "crowded",
    "visual_tokens": 144,
    "full": {"accuracy": 0.96, "questions": 1000, "by_type": {"at": 0.98, "exists": 0.94}},
    "methods": [
        method_row(name, *told, budget) for name, told in METHODS.items() for budget in BUDGETS
    ],
    "differences": [
        {"method": "policy", "to": to, "budget": 7, "difference": 0.5, "ci95": bounds}
        for to, bounds in (("DivPrune <b>", [0.45, 0.55]), ("imitation only", [-0.01, 0.02]))
    ],
    "training": {
        "algorithm": "PPO",
        "preset": "recommended",
        "seconds": 200.5,
        "lvlm_scores": 51_000,
        "env_steps": 1000,
        "seed": 3,
    },
    "stages": {"encode": 30.2},
    "made_by": {"command": "tprl quickstart --seed 3 --out 'a & b'", "config": {"seed": 3}},
    "versions": {"python": "3.11"},
}
CURVE = [
    {
        "lvlm_scores": scores,
        "accuracy": {"48": 0.9, "14": 0.5 + scores / 1e5},
        "ci95": {"48": [0.8, 0.95], "14": [0.4 + scores / 1e5, 0.6 + scores / 1e5]},
    }
    for scores in (0, 10_000, 20_000)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    plot = plot_accuracy(RESULTS, folder / "accuracy.png")
    examples = Examples([(plot, "one & two")], "chosen so that failures are among them")
    path = write_report(RESULTS, [(plot, "accuracy")], examples, folder / "r.html")
    return path.read_text().replace("&nbsp;", " ")


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


def test_the_page_stands_alone_and_escapes_names(page):
    assert "DivPrune &lt;b&gt;" in page
    assert "<b>" not in page
    assert "one &amp; two" in page
    assert page.count("data:image/png;base64,") == 2
    assert 'src="/' not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_first_thing_told_is_the_outcome(page):
    # 7 is the budget nearest to 5 % of 144; the full pass prunes nothing and is no rival
    sentence = (
        "With 7 of 144 visual tokens (4.9 %) the policy answers 80.0 % of the questions right, "
        "83.3 % of the accuracy with all tokens (96.0 %); +50.0 points (95 % interval +45.0 to "
        "+55.0) against the best heuristic, DivPrune <b> (30.0 %); imitation alone 75.0 %."
    )
    assert headline_budget(RESULTS) == 7
    assert headline(RESULTS) == sentence
    assert sentence.replace("<b>", "&lt;b&gt;") in page
    assert page.index("With 7 of 144") < page.index("<table") < page.index("<img")
    assert f"Not counted as a heuristic in it: {FULL_PASS}, 79.0 %" in page


def test_a_headline_without_policy_or_without_methods():
    heuristics = [row for row in RESULTS["methods"] if row["knowledge"] != "policy"]
    assert headline({**RESULTS, "methods": heuristics}) == (
        "With 7 of 144 visual tokens (4.9 %) the best heuristic, DivPrune <b>, answers 30.0 % of "
        "the questions right, 31.2 % of the accuracy with all tokens (96.0 %)."
    )
    oracles = [row for row in heuristics if row["knowledge"] == "oracle"]
    assert headline({**RESULTS, "methods": oracles}) == (
        "All 144 visual tokens answer 96.0 % of the questions right."
    )


def test_shares_intervals_and_mean_tokens_stand_in_the_table(page):
    table = page[page.index("<h2>Accuracy") : page.index("<img")]
    policy, threshold = (
        next(line for line in table.splitlines() if f"</span>{name}</td>" in line)
        for name in ("policy", "policy, calibrated threshold")
    )
    # .8 of .96 is 83 %
    assert "0.800 <span class=ci>83 %</span><br><span class=ci>[0.780, 0.820]" in policy
    assert "mean" not in policy
    assert [f"mean {budget}.25 tokens" in threshold for budget in BUDGETS] == [True] * 5


def test_differences_are_paired_and_say_what_they_tell(page):
    assert "policy - DivPrune &lt;b&gt;</td><td>7</td><td>+0.5000" in page
    assert "[+0.4500, +0.5500]</span></td><td>higher" in page
    assert "[-0.0100, +0.0200]</span></td><td>not told apart" in page


def test_differences_are_those_of_the_same_questions():
    rng = np.random.default_rng(0)
    types = np.array(["at"] * 40)
    scores = {
        name: (rng.random(40) < share).astype(np.float32) for name, (_, share) in METHODS.items()
    }
    rows = [
        summarise(name, METHODS[name][0], 7, one, np.full(40, 7), types, 0.0)
        for name, one in scores.items()
    ]
    best = max(("DivPrune <b>", "VisPruner"), key=lambda name: scores[name].mean())
    found = differences(rows)
    assert [row["to"] for row in found] == [best, "imitation only"]
    for row in found:
        wanted = paired_difference(scores["policy"], scores[row["to"]])
        assert (row["difference"], *row["ci95"]) == pytest.approx(wanted, abs=1e-5)
    assert differences([row for row in rows if row.knowledge != "policy"]) == []


def test_question_types_cost_origin_and_glossary(page):
    types = page[page.index("<h2>By question type, at 7 tokens") : page.index("<h2>Trajectories")]
    assert "<th>at</th><th>exists</th>" in types
    assert "</span>policy</td><td>0.800</td><td>0.400</td>" in types
    assert "all tokens</td><td>0.980</td><td>0.940</td>" in types
    assert "chosen so that failures are among them" in page
    cost = page[page.index("<h2>Cost") : page.index("<h2>Glossary")]
    assert "51,000 LVLM scores" in cost
    assert "</span>policy</td><td>6.2</td><td>5,000</td>" in cost  # 5 budgets of 1.25 s
    assert "encode 30 s" in cost
    assert len(GLOSSARY) == 5
    assert page.count("<dt>") == 5
    assert "tprl quickstart --seed 3 --out &#x27;a &amp; b&#x27;" in page
    assert "&quot;seed&quot;: 3" in page


def test_nothing_wider_than_a_telephone_stands_outside_of_what_scrolls(page):
    assert '<meta name=viewport content="width=device-width,initial-scale=1">' in page
    for tag in ("<table", "<img"):
        for match in re.finditer(tag, page):
            assert re.search(r'<div class="?wide[^>]*>$', page[: match.start()])
    assert ".wide{overflow-x:auto}" in page
    assert "overflow-wrap:anywhere" in page  # long commands


def test_a_method_has_one_colour_and_no_two_share_it(page):
    colors = method_colors(METHODS)
    assert len(set(colors.values())) == len(METHODS)
    assert len(set(COLORS.values())) == len(COLORS)
    assert colors["policy"] == COLORS["policy"]
    assert method_colors(["VisPruner", "policy"])["policy"] == COLORS["policy"]
    found = re.findall(r'background:(#\w+)"></span>([^<]+)</td>', page)
    assert {name.replace("&lt;", "<").replace("&gt;", ">"): color for color, name in found} == {
        name: colors[name] for name in METHODS
    }


def lines_of(monkeypatch, draw):
    """The axes that a plot was drawn on."""
    found = []
    keep = "tprl_env.evaluation.plots.save_figure"
    monkeypatch.setattr(keep, lambda figure, path, *_: found.append(figure.axes[0]))
    draw()
    return found[0]


def test_plots_use_the_method_s_colour_and_show_intervals(monkeypatch, tmp_path):
    axes = lines_of(monkeypatch, lambda: plot_accuracy(RESULTS, tmp_path / "a.png"))
    drawn = {line.get_label(): line.get_color() for line in axes.lines[1:]}
    assert drawn == method_colors(METHODS)
    assert len(axes.collections) == len(METHODS)
    axes = lines_of(monkeypatch, lambda: plot_learning_curve(CURVE, 0.97, tmp_path / "c.png"))
    curves = [line for line in axes.lines if "tokens" in line.get_label()][:2]
    assert {line.get_color() for line in curves} == {COLORS["policy"]}
    assert len({line.get_linestyle() for line in curves}) == 2
    assert len(axes.collections) == 2
    ends = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((0.4, 0.8))
    bare = [{k: v for k, v in point.items() if k != "ci95"} for point in CURVE]  # of older runs
    axes = lines_of(monkeypatch, lambda: plot_learning_curve(bare, 0.97, tmp_path / "c.png"))
    assert not axes.collections


class Questions:
    """A hundred pictures with one question each, of two types."""

    def question_type(self, sample):
        return ("at", "exists")[sample % 2]

    def image_number(self, sample):
        return sample


@pytest.mark.parametrize(
    ("wrong", "shown"), [(0, 0), (1, 1), (13, 2), (50, 5), (95, 10), (100, 10)]
)
def test_examples_hold_at_least_the_share_of_failures(wrong, shown):
    scores = np.ones(100, np.float32)
    scores[:wrong] = 0.0
    chosen = choose_with_failures(Questions(), np.arange(100), scores, 10)
    assert len(set(chosen.tolist())) == 10
    assert (scores[chosen] == 0).tolist() == [True] * shown + [False] * (10 - shown)


def test_examples_whose_strip_ends_as_the_table_says_come_first():
    scores = np.ones(100, np.float32)
    scores[:20] = 0.0
    ends = np.where(np.arange(100) == 0, 1.0, scores)  # the first failure is right in steps
    pick = choose_with_failures(Questions(), np.arange(100), scores, 10, lambda s: float(ends[s]))
    assert len(pick) == 10
    assert 0 not in pick
    assert (scores[pick] == 0).sum() == 2
    always_right = choose_with_failures(Questions(), np.arange(100), scores, 10, lambda s: 1.0)
    assert (scores[always_right] == 0).sum() == 2  # failures of the table where no strip fails


@pytest.mark.parametrize("panels", [1, 3, COLUMNS])
def test_text_of_trajectories_is_at_least_11_pixels_high_on_the_page(monkeypatch, panels):
    fonts = []
    make = render._font
    monkeypatch.setattr(render, "_font", lambda size: fonts.append(make(size)) or fonts[-1])
    steps = [render.TrajectoryStep(np.ones(16, bool), 1.0, "yes")] * panels
    strip = render.draw_trajectory(
        np.zeros((96, 96, 3), np.uint8), (4, 4), steps, question="is it ?", answer="yes"
    )
    scale = min(1040 / strip.shape[1], 1.0)
    assert all(isinstance(font, FreeTypeFont) for font in fonts)
    assert min(font.size for font in fonts) * scale >= 11


def test_many_steps_go_on_in_a_second_row():
    steps = [render.TrajectoryStep(np.ones(16, bool), 1.0)] * 7
    picture = np.zeros((96, 96, 3), np.uint8)
    one, two = (
        render.draw_trajectory(picture, (4, 4), steps, question="?", columns=columns)
        for columns in (None, 4)
    )
    assert two.shape[1] < one.shape[1] * 0.6
    assert two.shape[0] > one.shape[0] * 1.8
