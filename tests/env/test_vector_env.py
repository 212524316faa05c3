"""The vector environment against single environments, its requests, groups and shared rewards."""

import copy
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.env.scorer import ScoringError
from tprl_env.env.single import TokenPruningEnv
from tprl_env.env.vector import TokenPruningVectorEnv

ID = "tprl_env/TokenPruning-v0"
IDS = sorted(name for name in gymnasium.registry if name.startswith("tprl_env/"))
VARYING = "toy:samples=24,tokens=17,vary=1"


class CountingScorer:
    """The toy's scorer, remembering the samples of each request."""

    def __init__(self, source):
        self._scorer = ToyScorer(source, "exact")
        self.requests = []

    def __call__(self, samples, keep):
        self.requests.append(samples.tolist())
        return self._scorer(samples, keep)


def make(num_envs=4, source=VARYING, **arguments):
    return TokenPruningVectorEnv(num_envs, source, **arguments)


def draw(env, generator, share=0.6):
    return generator.random((env.num_envs, env.source.max_tokens)) < share


def assert_slot_equals(result, slot, expected):
    observation, rewards, ended, cut, infos = result
    assert observation.keys() == expected[0].keys()
    for name, value in expected[0].items():
        np.testing.assert_array_equal(observation[name][slot], value)
    assert (rewards[slot], ended[slot], cut[slot]) == (np.float32(expected[1]), *expected[2:4])
    known = {name for name in infos if name[0] != "_" and infos[f"_{name}"][slot]}
    assert known == set(expected[4])
    for name, value in expected[4].items():
        np.testing.assert_array_equal(infos[name][slot], value)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"score_steps": "final", "alpha": 2.0},
        {"query": "tokens", "budget": (2, 8), "min_tokens": 6},
        {"max_steps": 1, "beta": 0.5},
    ],
)
def test_steps_equal_those_of_single_environments(arguments):
    env = make(5, **arguments)
    singles = [TokenPruningEnv(VARYING, **arguments) for _ in range(5)]
    generator = np.random.default_rng(0)
    never = np.zeros(5, bool)
    observation, infos = env.reset(seed=1)
    result = observation, np.zeros(5, np.float32), never, never, infos
    actions, restart = draw(env, generator), ~never
    for _ in range(12):
        for slot, single in enumerate(singles):
            if restart[slot]:
                names = [name for name in ("sample", "budget") if name in result[4]]
                options = {name: int(result[4][name][slot]) for name in names}
                expected = single.reset(options=options)
                expected = (expected[0], 0.0, False, False, expected[1])
            else:
                expected = single.step(actions[slot])
            assert_slot_equals(result, slot, expected)
        restart, actions = result[2], draw(env, generator)
        result = env.step(actions)


def test_one_request_per_step_for_live_slots_only():
    source = ToyStore()
    scorer = CountingScorer(source)
    env = make(3, source, scorer=scorer, min_tokens=2)
    _, infos = env.reset(seed=0)
    samples = infos["sample"].tolist()
    keep = np.ones((3, 16), bool)
    keep[1, 1:] = False  # the second episode ends at once
    *_, ended, _, _ = env.step(keep)
    assert ended.tolist() == [False, True, False]
    _, rewards, ended, _, infos = env.step(np.ones((3, 16)))
    assert rewards[1] == 0.0 and not ended[1] and infos["kept"][1] == 16
    assert scorer.requests == [samples, [samples[0], samples[2]]]


def test_a_step_of_resets_alone_asks_nothing():
    source = ToyStore()
    scorer = CountingScorer(source)
    env = make(2, source, scorer=scorer, max_steps=1)
    env.reset(seed=0)
    env.step(np.ones((2, 16)))
    _, rewards, ended, _, infos = env.step(np.ones((2, 16)))
    assert len(scorer.requests) == 1 and not rewards.any() and not ended.any()
    assert infos["score"].tolist() == [1.0, 1.0]


def test_final_scoring_asks_for_ended_episodes_only():
    source = ToyStore()
    scorer = CountingScorer(source)
    env = make(2, source, scorer=scorer, score_steps="final", min_tokens=2)
    env.reset(seed=0)
    keep = np.ones((2, 16), bool)
    keep[1, 2:] = False
    *_, infos = env.step(keep)
    assert len(scorer.requests) == 1 and len(scorer.requests[0]) == 1
    assert infos["_score"].tolist() == [False, True]


@pytest.mark.parametrize("env_id", IDS)
def test_infos_have_the_form_of_gymnasiums_own_vector_env(env_id):
    arguments = {"source": VARYING, "budget": (2, 6)}
    native, sync = (
        gymnasium.make_vec(env_id, num_envs=3, vectorization_mode=mode, **arguments)
        for mode in ("vector_entry_point", "sync")
    )
    infos = [env.reset(seed=0)[1] for env in (native, sync)]
    stepped = [env.step(np.ones((3, 17), np.int8))[4] for env in (native, sync)]
    for found, expected in (infos, stepped):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].shape == expected[name].shape, name
            assert found[name].dtype == expected[name].dtype, name


@pytest.mark.parametrize("env_id", IDS)
def test_make_vec_gives_it_without_a_warning(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make_vec(env_id, num_envs=4, vectorization_mode="vector_entry_point")
        observation, _ = env.reset(seed=0)
        assert isinstance(env, TokenPruningVectorEnv)
        assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        for _ in range(8):
            assert observation in env.observation_space
            observation, rewards, ended, cut, _ = env.step(env.action_space.sample())
            assert rewards.shape == ended.shape == cut.shape == (4,) and not cut.any()
        env.close()


def test_the_seed_determines_everything():
    first, second = make(4, budget=(2, 6)), make(4, budget=(2, 6))
    np.testing.assert_array_equal(first.reset(seed=4)[1]["id"], second.reset(seed=4)[1]["id"])
    generator = np.random.default_rng(1)
    for _ in range(9):
        actions = draw(first, generator)
        for a, b in zip(first.step(actions)[:4], second.step(actions)[:4], strict=True):
            if isinstance(a, dict):
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name])
            else:
                np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.reset(seed=5)[1]["sample"], first.reset(seed=6)[1]["sample"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_on_as_the_original(clone):
    env = make(4, group_size=2)
    env.reset(seed=0)
    other = clone(env)
    generator = np.random.default_rng(0)
    for _ in range(6):
        actions = draw(env, generator)
        found, expected = other.step(actions), env.step(actions)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[4]["sample"], expected[4]["sample"])


def test_observations_belong_to_the_caller():
    env = make(2, "toy")
    observation, infos = env.reset(seed=0)
    kept_copy = observation["tokens"].copy()
    observation["tokens"][:] = 9
    infos["mask"][:] = False
    following, *_ = env.step(np.ones((2, 16)))
    np.testing.assert_array_equal(following["tokens"], kept_copy)
    assert following["alive"].all()


# --- groups ------------------------------------------------------------------------------------


def test_groups_share_samples_and_budgets_also_after_early_ends():
    env = make(6, "toy:samples=1000,tokens=16", group_size=3, budget=(2, 16), min_tokens=1)
    generator = np.random.default_rng(0)
    _, infos = env.reset(seed=0)
    episodes = [[(s, b)] for s, b in zip(infos["sample"], infos["budget"], strict=True)]
    ended = np.zeros(6, bool)
    for _ in range(60):
        before = ended
        keep = draw(env, generator, 0.8)
        keep[generator.random(6) < 0.3] = False  # some episodes end early
        *_, ended, _, infos = env.step(keep)
        for slot in np.flatnonzero(before):
            episodes[slot].append((infos["sample"][slot], infos["budget"][slot]))
    lengths = [len(chosen) for chosen in episodes]
    assert len(set(lengths[:3])) > 1, "the test needs members that are out of step"
    for members in (episodes[:3], episodes[3:]):
        shared = min(len(chosen) for chosen in members)
        assert shared > 10
        assert members[0][:shared] == members[1][:shared] == members[2][:shared]
    assert episodes[0][:10] != episodes[3][:10]
    assert all(len(plan) < 60 for plan in env._plans)


def test_groups_of_one_draw_independently():
    _, infos = make(8, "toy:samples=1000,tokens=16").reset(seed=0)
    assert len(set(infos["sample"])) > 4


# --- shared rewards ----------------------------------------------------------------------------


def test_batches_share_the_mean_of_their_live_members():
    shared = make(4, "toy", reward_batch_size=2, min_tokens=1)
    single = make(4, "toy", min_tokens=1)
    for env in (shared, single):
        env.reset(seed=3)
    keep = np.random.default_rng(0).random((4, 16)) < 0.5
    keep[0, 1:] = False  # ends at once
    found, expected = shared.step(keep)[1], single.step(keep)[1]
    np.testing.assert_allclose(found, np.repeat(expected.reshape(2, 2).mean(1), 2), atol=1e-6)
    found, expected = shared.step(keep)[1], single.step(keep)[1]
    pair = expected[2:].mean()
    np.testing.assert_allclose(found, [0.0, expected[1], pair, pair], atol=1e-6)


# --- options, errors, rendering ----------------------------------------------------------------


def test_options_choose_samples_and_budgets():
    env = make(4, "toy", group_size=2, budget=(2, 8))
    _, infos = env.reset(options={"sample": [3, 3, 9, 9], "budget": np.array([2, 2, 5, 5])})
    assert infos["sample"].tolist() == [3, 3, 9, 9] and infos["budget"].tolist() == [2, 2, 5, 5]
    _, infos = env.reset(options={"sample": 7})
    assert infos["sample"].tolist() == [7] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": [1, 2, 3]}, r"one integer or 4 of them, got shape \(3,\)"),
        ({"sample": [1, 2, 3, 3]}, "equal inside each group of 2"),
        ({"sample": [1.0, 1.0, 2.0, 2.0]}, "must be an integer"),
        ({"sample": 64}, "below the 64 samples"),
        ({"budget": 3}, "made with budget=k"),
        ({"samples": 3}, "did you mean 'sample'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(4, "toy", group_size=2).reset(options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ({"group_size": 3}, "group_size must divide num_envs=4, got 3"),
        ({"group_size": 0}, "group_size must be an integer of at least 1"),
        ({"reward_batch_size": 3}, "reward_batch_size must divide num_envs=4, got 3"),
        ({"max_steps": -1}, "max_steps must be an integer"),
        ({"render_mode": "human"}, "render_mode must be one of 'rgb_array', 'ansi'"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.ones(16), r"action must have shape \(4, 16\), got \(16,\)"),
        (np.full((4, 16), 0.25), r"got 0.25 at index \(0, 0\)"),
    ],
)
def test_refused_actions(actions, message):
    env = make(4, "toy")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)


def test_a_seed_must_be_one_integer():
    with pytest.raises(ValueError, match="seed must be an integer"):
        make().reset(seed=[1, 2, 3, 4])


def test_needs_a_reset():
    env = make(render_mode="ansi")
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"before step\(\)"):
        env.step(np.ones((4, 17)))
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"before render\(\)"):
        env.render()


def test_a_failing_scorer_leaves_the_state_alone():
    failures = iter([True, False])

    def scorer(samples, keep):
        if next(failures):
            raise TimeoutError("too slow")
        return np.ones(len(samples))

    env = make(2, "toy", scorer=scorer)
    env.reset(seed=0, options={"sample": 5})
    with pytest.raises(ScoringError, match=r"toy-5.*too slow"):
        env.step(np.zeros((2, 16)))
    observation, *_ = env.step(np.ones((2, 16)))
    assert observation["alive"].all() and observation["step"].tolist() == [[1.0], [1.0]]


def test_action_masks_per_slot():
    env = make(2, "toy")
    env.reset(seed=0)
    keep = np.ones((2, 16), bool)
    keep[1, 0] = False
    env.step(keep)
    masks = env.action_masks()
    assert masks.shape == (2, 32) and masks[0].all() and masks[1, :2].tolist() == [True, False]


@pytest.mark.parametrize(("mode", "kind"), [("rgb_array", np.ndarray), ("ansi", str)])
def test_render_gives_a_frame_per_slot(mode, kind):
    env = make(3, render_mode=mode)
    env.reset(seed=0)
    frames = env.render()
    assert len(frames) == 3 and all(isinstance(frame, kind) for frame in frames)
