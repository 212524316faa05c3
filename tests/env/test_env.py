"""Contracts over every registered id, the numbers of an episode, and every bad input."""

import copy
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import tprl_env
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.env.scorer import ScoringError
from tprl_env.env.single import TokenPruningEnv
from tprl_env.env.vector import TokenPruningVectorEnv

IDS = sorted(name for name in gymnasium.registry if name.startswith("tprl_env/"))
VARIANTS = [
    {},
    {"source": "toy:samples=12,tokens=17,vary=1"},
    {"source": "toy:samples=12,tokens=17,vary=1", "query": "tokens", "budget": (2, 9)},
    {"budget": 4, "score_steps": "final", "score_kind": "likelihood"},
]


def rollout(env, seed, steps=12):
    env.action_space.seed(seed)
    record = [env.reset(seed=seed)]
    for _ in range(steps):
        record.append(env.step(env.action_space.sample()))
        if record[-1][2]:
            record.append(env.reset())
    return record


def assert_same(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (tuple, list)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(first, second)


# --- contracts over every id -------------------------------------------------------------------


def test_the_ids_are_registered():
    assert IDS == ["tprl_env/TokenPruning-v0", "tprl_env/TokenPruningToy-v0"]


@pytest.mark.parametrize("env_id", IDS)
def test_both_forms_of_an_id_have_one_setting(env_id):
    single = gymnasium.make(env_id).unwrapped
    many = gymnasium.make_vec(env_id, num_envs=2).unwrapped
    assert isinstance(many, TokenPruningVectorEnv)
    assert single.rules == many.rules and single.source.location == many.source.location


def test_the_toy_setting_is_one_step_of_eight_tokens():
    env = gymnasium.make("tprl_env/TokenPruningToy-v0").unwrapped
    assert (env.rules.max_steps, env.rules.beta, env.source.max_tokens) == (1, 1.0, 8)
    assert gymnasium.make("tprl_env/TokenPruningToy-v0", beta=0.5).unwrapped.rules.beta == 0.5


def test_registering_twice_neither_warns_nor_replaces():
    specs = [gymnasium.spec(env_id) for env_id in IDS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tprl_env.register()
    assert all(gymnasium.spec(spec.id) is spec for spec in specs)


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("env_id", IDS)
def test_passes_the_checker_without_a_warning(env_id, arguments):
    env = gymnasium.make(env_id, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("env_id", IDS)
def test_rollouts_are_determined_by_the_seed(env_id, arguments):
    first, second = (gymnasium.make(env_id, **arguments) for _ in range(2))
    assert_same(rollout(first, 7), rollout(second, 7))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("env_id", IDS)
def test_a_copy_goes_on_as_the_original(env_id, clone):
    env = gymnasium.make(env_id, budget=(2, 8), max_steps=3).unwrapped
    env.reset(seed=3)
    env.step(np.ones(env.action_space.n, bool))
    other = clone(env)
    action = np.arange(env.action_space.n) % 2
    for _ in range(2):
        assert_same(env.step(action), other.step(action))
    assert_same(env.reset(), other.reset())


@pytest.mark.parametrize("env_id", IDS)
def test_rgb_frames_have_one_size(env_id):
    env = gymnasium.make(env_id, source="toy:samples=12,tokens=17,vary=1", render_mode="rgb_array")
    shapes = set()
    for seed in range(4):
        env.reset(seed=seed)
        shapes.add(env.render().shape)
        env.step(env.action_space.sample())
        frame = env.render()
        shapes.add(frame.shape)
    assert len(shapes) == 1 and frame.dtype == np.uint8


@pytest.mark.parametrize("env_id", IDS)
def test_ansi_shows_the_mask(env_id):
    env = gymnasium.make(env_id, source="toy", render_mode="ansi")
    env.reset(seed=0, options={"sample": 2})
    env.step(np.arange(16) < 5)
    text = env.render()
    assert text.endswith("####\n#...\n....\n....\n")
    assert "5 of 16 tokens (31.2 %)" in text and "step 1" in text


@pytest.mark.parametrize("env_id", IDS)
def test_frames_can_be_collected_by_a_wrapper(env_id):
    env = gymnasium.wrappers.RenderCollection(gymnasium.make(env_id, render_mode="rgb_array"))
    env.reset(seed=0)
    env.step(np.ones(env.action_space.n, int))
    assert len(env.render()) == 2


@pytest.mark.parametrize("env_id", IDS)
def test_runs_under_sync_vector_env(env_id):
    envs = gymnasium.make_vec(env_id, num_envs=3, vectorization_mode="sync")
    envs.reset(seed=0)
    for _ in range(5):
        observation, *_, infos = envs.step(envs.action_space.sample())
    count = envs.single_action_space.n
    assert observation["tokens"].shape == (3, count, 8)
    assert infos["id"].dtype == object and infos["mask"].shape == (3, count)


# --- the numbers of an episode -----------------------------------------------------------------


class FakeScorer:
    """Score = kept share of the padded width; remembers what it was asked."""

    def __init__(self):
        self.requests = []

    def __call__(self, samples, keep):
        self.requests.append((samples.copy(), keep.copy()))
        return keep.mean(axis=1)


def masks(*counts, width=16):
    return [np.arange(width) < count for count in counts]


def test_rewards_of_an_episode():
    env = TokenPruningEnv(scorer=FakeScorer(), beta=0.2)
    env.reset(seed=0)
    found = [env.step(action) for action in masks(8, 4, 1)]
    np.testing.assert_allclose(
        [step[1] for step in found],
        [8 / 16 - 1 + 0.1, -4 / 16 + 0.1, -3 / 16 + 0.15],
        atol=1e-6,
    )
    assert [step[2] for step in found] == [False, False, True]
    assert not any(step[3] for step in found)
    assert [step[0]["step"].tolist() for step in found] == [[1.0], [2.0], [3.0]]
    assert all(type(step[1]) is float for step in found)


def test_final_scoring_asks_once_and_telescopes():
    scorer = FakeScorer()
    env = TokenPruningEnv(scorer=scorer, score_steps="final")
    env.reset(seed=0)
    found = [env.step(action) for action in masks(8, 4, 2)]
    assert len(scorer.requests) == 1
    expected = [0.05, 0.05, 2 / 16 - 1 + 0.05]
    np.testing.assert_allclose([step[1] for step in found], expected, atol=1e-6)
    assert [step[4].get("score") for step in found] == [None, None, 2 / 16]


def test_ends_early_at_min_tokens():
    env = TokenPruningEnv(min_tokens=4)
    env.reset(seed=0)
    assert env.step(masks(5)[0])[2] is False
    assert env.step(masks(4)[0])[2] is True


def test_keeping_nothing_is_legal():
    env = TokenPruningEnv(scorer=FakeScorer(), min_tokens=0)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(np.zeros(16, int))
    assert terminated and info["kept"] == 0 and reward == pytest.approx(-0.9)


def test_entries_of_dead_tokens_are_ignored():
    env = TokenPruningEnv()
    env.reset(seed=0)
    env.step(masks(6)[0])
    observation, *_, info = env.step(np.ones(16, bool))
    assert info["kept"] == 6 and observation["alive"].tolist() == [1] * 6 + [0] * 10


def test_padding_is_never_alive():
    env = TokenPruningEnv(ToyStore(samples=12, tokens=17, vary=True))
    for sample in range(12):
        observation, info = env.reset(options={"sample": sample})
        existing = env.source.exists([sample])[0]
        np.testing.assert_array_equal(observation["alive"], existing)
        assert info["keep_ratio"] == 1.0 and info["kept"] == existing.sum()
        assert env.step(np.ones(17))[4]["kept"] == existing.sum()


def test_information():
    env = TokenPruningEnv(budget=5)
    _, info = env.reset(options={"sample": 9})
    expected = {"sample": 9, "id": "toy-9", "kept": 16, "keep_ratio": 1.0, "score": 1.0}
    expected |= {"full_score": 1.0, "budget": 5}
    assert {name: value for name, value in info.items() if name != "mask"} == expected
    assert info["mask"].dtype == bool and info["mask"].all()
    assert "budget" not in TokenPruningEnv().reset()[1]


def test_observation_of_a_sample():
    source = ToyStore(samples=4, tokens=8)
    for query in ("mean", "tokens"):
        env = TokenPruningEnv(source, query=query)
        observation, _ = env.reset(options={"sample": 3})
        np.testing.assert_array_equal(observation["tokens"], source.codes([3])[0])
        if query == "mean":
            np.testing.assert_array_equal(observation["query"], source.query([3])[0])
            assert "query_mask" not in observation
        else:
            assert observation["query"].shape == (3, 8)
            assert observation["query_mask"].tolist() == [1, 1, 1]


def test_observations_belong_to_the_caller():
    env = TokenPruningEnv()
    observation, info = env.reset(seed=0, options={"sample": 1})
    observation["tokens"][:] = 7
    info["mask"][:] = False
    following, *_ = env.step(np.ones(16))
    np.testing.assert_array_equal(following["tokens"], env.source.codes([1])[0])
    assert following["alive"].all()


def test_budgets_are_drawn_log_uniformly():
    env = TokenPruningEnv("toy:samples=4,tokens=64", budget=(4, 32))
    env.reset(seed=0)
    drawn = np.array([env.reset()[1]["budget"] for _ in range(4000)])
    assert drawn.min() == 4 and drawn.max() == 32
    # P(k < 12) = log(12 / 4) / log(33 / 4) = 0.5206
    assert np.mean(drawn < 12) == pytest.approx(0.5206, abs=0.03)


def test_budget_is_cut_to_the_sample_and_observed():
    env = TokenPruningEnv("toy:samples=12,tokens=17,vary=1", budget=17)
    for sample in range(12):
        observation, info = env.reset(options={"sample": sample})
        assert observation["budget"].tolist() == [info["kept"]] == [info["budget"]]
    observation, info = env.reset(options={"sample": 0, "budget": 3})
    assert observation["budget"].tolist() == [3.0] and info["budget"] == 3


def test_chosen_samples_leave_the_generator_alone():
    first, second = TokenPruningEnv(), TokenPruningEnv()
    first.reset(seed=5)
    second.reset(seed=5, options={"sample": 3})
    drawn = [env.np_random.bit_generator.state["state"]["state"] for env in (first, second)]
    assert drawn[0] != drawn[1]
    second.reset(seed=5)
    assert_same(first.reset(), second.reset())


def test_action_masks_have_two_places_per_token():
    env = TokenPruningEnv()
    env.reset(seed=0)
    env.step(masks(3)[0])
    allowed = env.action_masks()
    assert allowed.dtype == bool and allowed.shape == (32,)
    assert allowed[:8].tolist() == [True, True, True, True, True, True, True, False]
    assert allowed[0::2].all() and not allowed[7::2].any()


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.float32, np.float64])
def test_accepted_action_types(dtype):
    env = TokenPruningEnv()
    env.reset(seed=0)
    assert env.step(masks(6)[0].astype(dtype))[4]["kept"] == 6


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.ones(15), r"action must have shape \(16,\), got \(15,\)"),
        (np.ones((1, 16)), r"got \(1, 16\)"),
        (1, r"action must have shape \(16,\), got \(\)"),
        (np.full(16, 0.5), "only 0 .prune. and 1 .keep., got 0.5 at index 0"),
        (np.arange(16), "got 2 at index 2"),
        (-np.ones(16, int), "got -1 at index 0"),
        (np.full(16, np.nan), "got nan at index 0"),
        (np.array(["1"] * 16), "bool, int or float 0/1, got <U1"),
        (np.ones(16, complex), "got complex128"),
        (np.array([None] * 16), "got object"),
    ],
)
def test_refused_actions(action, message):
    env = TokenPruningEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.step(np.ones(16))[4]["kept"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"max_steps": 2.5}, "max_steps must be an integer"),
        ({"max_steps": True}, "max_steps must be an integer"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0, got -1"),
        ({"min_tokens": 16}, "min_tokens must be below the 16 tokens"),
        ({"alpha": np.nan}, "alpha must be a finite number, got nan"),
        ({"beta": "0.1"}, "beta must be a finite number, got '0.1'"),
        ({"score_steps": "finals"}, "did you mean 'final'"),
        ({"score_kind": "likelyhood"}, "did you mean 'likelihood'"),
        ({"query": "token"}, "did you mean 'tokens'"),
        ({"render_mode": "rgb"}, "did you mean 'rgb_array'"),
        ({"reward_batch_size": 0}, "reward_batch_size must be an integer of at least 1"),
        ({"reward_batch_size": 4}, "use TokenPruningVectorEnv"),
        ({"budget": 0}, "budget must be an integer of at least 1, got 0"),
        ({"budget": 1.5}, "budget must be an integer"),
        ({"budget": (0.5, 4)}, "budget must be an integer"),
        ({"budget": (0.5, 0.2)}, "low <= high"),
        ({"budget": (8, 4)}, "low <= high"),
        ({"budget": (1, 2, 3)}, "a count or a pair"),
        ({"budget": (2, 17)}, r"budget must be at most the 16 tokens .* got \(2, 17\)"),
        ({"source": "toy:tokenz=3"}, "tokenz"),
        ({"scorer": "likelihood"}, "scorer must be a callable"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenPruningEnv(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampel": 3}, "did you mean 'sample'"),
        ({"sample": 64}, "below the 64 samples of 'toy:.*, got 64"),
        ({"sample": -1}, "at least 0, got -1"),
        ({"sample": 1.0}, "must be an integer"),
        ({"budget": 0}, "at least 1, got 0"),
        ({"sample": 2, "budget": 17}, "at most the 16 tokens of sample 'toy-2', got 17"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        TokenPruningEnv(budget=4).reset(options=options)


def test_a_budget_option_needs_a_budget_environment():
    with pytest.raises(ValueError, match="made with budget=k"):
        TokenPruningEnv().reset(options={"budget": 3})


class Bare:
    """A source that is not the toy one."""

    def __init__(self, **changes):
        self._toy = ToyStore(samples=4, tokens=8)
        self._changes = changes

    def __getattr__(self, name):
        return self._changes[name] if name in self._changes else getattr(self._toy, name)

    def __len__(self):
        return self._changes.get("length", 4)


def test_only_the_toy_source_has_a_scorer():
    with pytest.raises(ValueError, match="scorer must be given for the source 'toy:samples=4"):
        TokenPruningEnv(Bare())


def test_refuses_an_empty_source_and_a_sample_without_tokens():
    with pytest.raises(ValueError, match="holds no samples"):
        TokenPruningEnv(Bare(length=0), FakeScorer())
    env = TokenPruningEnv(Bare(exists=lambda samples: np.zeros((1, 8), bool)), FakeScorer())
    with pytest.raises(ValueError, match=r"sample 'toy-2' of .* has no visual tokens"):
        env.reset(options={"sample": 2})


def test_refuses_a_scorer_of_another_metric():
    source = ToyStore()
    with pytest.raises(ValueError, match="measures 'likelihood' but the environment 'exact'"):
        TokenPruningEnv(source, ToyScorer(source, "likelihood"))


def test_needs_a_reset():
    env = TokenPruningEnv(max_steps=1, render_mode="ansi")
    with pytest.raises(gymnasium.error.ResetNeeded, match="no episode has begun"):
        env.step(np.ones(16))
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"before render\(\)"):
        env.render()
    env.reset(seed=0)
    env.step(np.ones(16))
    with pytest.raises(gymnasium.error.ResetNeeded, match="the episode has ended"):
        env.step(np.ones(16))


def test_rendering_without_a_mode_warns():
    env = TokenPruningEnv()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None


# --- failures of the scorer --------------------------------------------------------------------


@pytest.mark.parametrize("score", [np.nan, 1.5, -0.5, np.inf])
def test_a_bad_score_is_not_a_reward(score):
    env = TokenPruningEnv(scorer=lambda samples, keep: np.full(len(samples), score))
    env.reset(options={"sample": 6})
    with pytest.raises(ScoringError, match="toy-6"):
        env.step(np.ones(16))


def test_a_failing_scorer_raises_and_the_step_can_be_repeated():
    failures = iter([True, False])

    def scorer(samples, keep):
        if next(failures):
            raise OSError("connection lost")
        return np.full(len(samples), 0.5)

    env = TokenPruningEnv(scorer=scorer)
    env.reset(options={"sample": 6})
    with pytest.raises(ScoringError, match=r"scorer failed on .*toy-6.*connection lost") as caught:
        env.step(masks(8)[0])
    assert isinstance(caught.value.__cause__, OSError)
    observation, reward, *_, info = env.step(masks(12)[0])
    assert info["kept"] == 12 and observation["step"][0] == 1
    assert reward == pytest.approx(-0.5 + 0.1 * 0.25)


def test_an_interrupt_is_not_wrapped():
    def scorer(samples, keep):
        raise KeyboardInterrupt

    env = TokenPruningEnv(scorer=scorer)
    env.reset(seed=0)
    with pytest.raises(KeyboardInterrupt):
        env.step(np.ones(16))


def test_the_documentation_page_has_gymnasiums_order():
    lines = [line.strip() for line in (TokenPruningEnv.__doc__ or "").splitlines()]
    headings = [line[3:] for line in lines if line.startswith("## ")]
    assert headings == [
        "Description", "Action Space", "Observation Space", "Rewards", "Starting State",
        "Episode End", "Information", "Arguments", "Reference Returns", "Render", "References",
        "Version History",
    ]  # fmt: skip


def test_the_example_of_the_page_runs():
    import doctest

    import tprl_env.env.single

    result = doctest.testmod(tprl_env.env.single)
    assert result.attempted >= 5 and result.failed == 0
