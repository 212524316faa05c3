"""Learning curves go on after a crash, without the points of work that it has undone."""

from types import SimpleNamespace

import pytest

from tprl_env.evaluation.learning_curve import LearningCurve, curve_hook
from tprl_env.policy.network import PolicyConfig, PruningPolicy


@pytest.fixture
def curve(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tprl_env.evaluation.learning_curve.evaluate_method",
        lambda *args: SimpleNamespace(accuracy=0.5, ci95=(0.25, 0.75)),
    )

    class Store:
        max_tokens = 16

        def __len__(self):
            return 8

    return LearningCurve(tmp_path / "learning_curve.jsonl", Store(), None, 8)


POLICY = PruningPolicy(PolicyConfig(token_width=8, query_width=5))


def used(curve):
    return [point["lvlm_scores"] for point in curve.points()]


def test_a_torn_last_point_does_not_stop_a_resume(curve):
    hook = curve_hook(curve, POLICY, 800)
    for scores in (100, 150, 200):
        hook({"scores": scores}, POLICY)
    assert used(curve) == [0, 100, 200]
    with curve.log.path.open("a") as file:
        file.write('{"lvlm_scores": 300, "accu')
    hook = curve_hook(curve, POLICY, 800)
    hook({"scores": 300}, POLICY)
    assert used(curve) == [0, 100, 200, 300]


def test_points_after_the_restored_checkpoint_are_measured_again(curve):
    hook = curve_hook(curve, POLICY, 800)
    for scores in range(50, 501, 50):
        hook({"scores": scores}, POLICY)
    assert used(curve) == [0, 100, 200, 300, 400, 500]
    hook = curve_hook(curve, POLICY, 800)  # resumed after the 5th iteration
    hook({"scores": 300}, POLICY)
    assert used(curve) == [0, 100, 200, 300]
    hook({"scores": 350}, POLICY)
    hook({"scores": 400}, POLICY)
    assert used(curve) == [0, 100, 200, 300, 400]
