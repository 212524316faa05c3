"""Reference returns: literal values, whose MDP and scorer they come from, what they leave alone."""

from dataclasses import replace
from math import comb

import gymnasium
import numpy as np
import pytest
from fake_lvlm import FakeLVLM, make_samples

from tprl_env.data.features.store import FeatureStore
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.env.scorer import ScoringError
from tprl_env.env.single import TokenPruningEnv
from tprl_env.env.vector import TokenPruningVectorEnv
from tprl_env.lvlm.encoding.encode import encode_dataset

IDS = ("tprl_env/TokenPruning-v0", "tprl_env/TokenPruningToy-v0")
DEFAULT, TOY = IDS
FORMS = [TokenPruningEnv, lambda *args, **rest: TokenPruningVectorEnv(4, *args, **rest)]
forms = pytest.mark.parametrize("make", FORMS, ids=["single", "vector"])


def binomial(count, kept):
    return comb(count, kept) * 0.5**count


def expected_random(relevant, others, steps, alpha, beta, min_tokens=1):
    """Exact return of keeping each token with probability 1/2, by enumeration of the counts."""

    def later(r, o, steps_left):  # scores as shares of the relevant tokens
        if steps_left == 0 or r + o <= min_tokens:
            return 0.0
        total = 0.0
        for r2 in range(r + 1):
            for o2 in range(o + 1):
                gain = alpha * (r2 - r) / relevant + beta * (1 - (r2 + o2) / (r + o))
                chance = binomial(r, r2) * binomial(o, o2)
                total += chance * (gain + later(r2, o2, steps_left - 1))
        return total

    return later(relevant, others, steps)


# --- literal values ----------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [False, True])
def test_the_toy_setting(vector):
    made = gymnasium.make_vec(TOY, num_envs=3) if vector else gymnasium.make(TOY)
    found = made.unwrapped.reference_returns()
    # 256 episodes are four passes over 64 samples; half of these have one relevant token of 8,
    # half have two: (7/8 + 6/8) / 2
    assert found.keys() == {"keep_all", "random", "best_rule"}
    assert found["keep_all"] == 0.0
    assert found["best_rule"] == 0.8125
    assert abs(found["random"]) < 0.1


def test_random_keeping_is_worth_what_enumeration_says():
    assert expected_random(1, 7, 1, 1.0, 1.0) == pytest.approx(0.0)  # -1/2 + 1/2
    assert expected_random(2, 6, 1, 1.0, 1.0) == pytest.approx(0.0)
    toy = gymnasium.make(TOY).unwrapped.reference_returns(episodes=64 * 256, seed=1)
    assert toy["random"] == pytest.approx(0.0, abs=0.015)
    source = ToyStore()
    worth = {r: expected_random(r, 16 - r, 3, 1.0, 0.1) for r in (1, 2, 3, 4)}
    expected = np.mean([worth[int(source.relevance(s).sum())] for s in range(len(source))])
    default = gymnasium.make(DEFAULT).unwrapped.reference_returns(episodes=64 * 256, seed=1)
    assert expected == pytest.approx(-0.73, abs=0.005)
    assert default["random"] == pytest.approx(expected, abs=0.015)


@forms
def test_the_best_rule_keeps_the_relevant_tokens_over_all_steps(make):
    source = ToyStore(samples=10)
    relevant = [len(source.answers(s)[0].split()) for s in range(10)]
    found = make(source, max_steps=4, alpha=2.0, beta=0.5).reference_returns(episodes=10)
    # all is saved in the first step, and later steps save nothing
    assert found["best_rule"] == pytest.approx(np.mean([0.5 * (1 - r / 16) for r in relevant]))
    assert found["keep_all"] == 0.0


def test_no_mask_earns_more_than_the_best_rule_in_the_toy_setting():
    envs = gymnasium.make_vec(TOY, num_envs=256)
    masks = (np.arange(256)[:, None] >> np.arange(8)) & 1
    best = []
    for sample in range(64):
        envs.reset(options={"sample": sample})
        rewards = envs.step(masks)[1]
        best.append(rewards.max())
        winners = masks[rewards == rewards.max()]
        assert winners.tolist() == [envs.unwrapped.source.relevance(sample).tolist()]
    assert np.mean(best) == 0.8125


# --- whose MDP, whose scorer -------------------------------------------------------------------


class Fixed:
    """A scorer of one value, which remembers how much it was asked."""

    score_kind = "exact"

    def __init__(self, value=0.25):
        self.value, self.scores = value, 0

    def __call__(self, samples, keep):
        self.scores += len(samples)
        return np.full(len(samples), self.value)


@forms
def test_scores_come_from_the_environments_scorer(make):
    scorer = Fixed()
    found = make("toy:samples=6", scorer, max_steps=1, beta=0.0).reference_returns(episodes=12)
    assert found == pytest.approx(dict.fromkeys(("keep_all", "random", "best_rule"), -0.75))
    assert scorer.scores == 3 * 12


@forms
def test_score_steps_leave_returns_unchanged(make):
    every, final = (
        make("toy", score_steps=steps).reference_returns() for steps in ("all", "final")
    )
    assert every == pytest.approx(final, abs=1e-6)


def test_padding_and_budgets_are_the_environments():
    env = TokenPruningEnv("toy:samples=12,tokens=17,vary=1", budget=(2, 6), max_steps=1, beta=1.0)
    found = env.reference_returns(episodes=12)
    source = env.source
    shares = [source.relevance(s).sum() / source.exists([s]).sum() for s in range(12)]
    assert found["best_rule"] == pytest.approx(1 - np.mean(shares))
    assert found["keep_all"] == 0.0


def test_shared_rewards_have_the_same_mean():
    shared = TokenPruningVectorEnv(4, reward_batch_size=4).reference_returns()
    assert shared == TokenPruningEnv().reference_returns()


class Told(ToyStore):
    """A toy whose relevance is graded, or not known for the last sample."""

    last_known = True

    def relevance(self, sample):
        known = self.last_known or sample < len(self) - 1
        return super().relevance(sample) * 10.0 if known else None


def test_positive_relevance_is_relevant():
    arguments = {"samples": 8, "tokens": 8}
    scorer = ToyScorer(ToyStore(**arguments), "exact")
    found = TokenPruningEnv(Told(**arguments), scorer).reference_returns(episodes=8)
    assert found == TokenPruningEnv(ToyStore(**arguments)).reference_returns(episodes=8)


@forms
@pytest.mark.parametrize("episodes", [8, 200])
def test_without_relevance_there_is_no_best_rule(make, episodes):
    source = Told(samples=150)
    source.last_known = False
    # 200 episodes see every one of the 150 samples; these 8 do not see the last
    found = make(source, Fixed()).reference_returns(episodes=episodes, seed=0)
    assert ("best_rule" in found) == (episodes == 8)
    assert {"keep_all", "random"} <= found.keys()


@pytest.mark.parametrize("known", [True, False])
def test_a_feature_store_is_asked_for_its_relevance(tmp_path, known):
    samples = make_samples(images=4, questions=1)
    if known:
        samples = [
            replace(s, relevance=(np.arange(s.image.size // 48) < 1).astype(np.float32))
            for s in samples
        ]
    store = encode_dataset(FakeLVLM(), samples, tmp_path / "store", progress=False)
    store.write_channel(
        "codes", [store.tokens(i) for i in range(4)], meta={"fingerprint": "x"}, dtype="float16"
    )
    store = FeatureStore.open(tmp_path / "store")
    env = TokenPruningEnv(store, Fixed(1.0), alpha=0.0, beta=1.0, max_steps=1)
    found = env.reference_returns(episodes=4)
    if known:  # one token of 4, 6, 8 and 10 is kept
        assert found["best_rule"] == pytest.approx(1 - (1 / 4 + 1 / 6 + 1 / 8 + 1 / 10) / 4)
    else:
        assert found.keys() == {"keep_all", "random"}


# --- what it leaves alone ----------------------------------------------------------------------


@forms
def test_a_running_episode_and_its_draws_go_on_as_without_it(make):
    def play(asked):
        env = make("toy", budget=(2, 9))
        found = [env.reset(seed=5)]
        action = np.ones(env.action_space.shape, np.int8)
        action[..., 3:9] = 0
        for _ in range(9):
            if asked:
                env.reference_returns(episodes=5)
            step = env.step(action)
            found.append(step)
            if np.all(step[2]) and isinstance(env, TokenPruningEnv):
                found.append(env.reset())
        return found

    for with_it, without in zip(play(True), play(False), strict=True):
        for name, values in without[0].items():
            np.testing.assert_array_equal(with_it[0][name], values)
        np.testing.assert_array_equal(with_it[-1]["sample"], without[-1]["sample"])
        if len(without) == 5:  # a step: its reward
            np.testing.assert_array_equal(with_it[1], without[1])


@forms
def test_it_works_before_the_first_reset_and_equal_seeds_give_equal_numbers(make):
    env = make()
    first = env.reference_returns(episodes=40, seed=3)
    assert env.reference_returns(episodes=40, seed=3) == first
    assert env.reference_returns(episodes=40, seed=4) != first


@forms
def test_a_failing_scorer_is_an_error_not_a_number(make):
    with pytest.raises(ScoringError, match="nan"):
        make("toy", Fixed(np.nan)).reference_returns()


@forms
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "episodes must be an integer of at least 1, got 0"),
        ({"episodes": 2.5}, "episodes must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make().reference_returns(**arguments)
