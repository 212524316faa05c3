import numpy as np
import pytest
import torch
from lvlm_fixtures import NUM_TOKENS, QUESTIONS, pictures, save_llava
from PIL import Image

from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.policy import PolicyPruner
from tprl_env.policy.autoencoder import AutoencoderConfig, TokenAutoencoder
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.reducers import PruneInputs, make_pruner, make_reducer
from tprl_env.reducers.layer import QuestionRows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inference")
    save_llava(root / "lvlm")
    lvlm = load_lvlm(str(root / "lvlm"))
    torch.manual_seed(0)
    TokenAutoencoder(AutoencoderConfig(lvlm.token_width, 8)).save_pretrained(root / "autoencoder")
    config = PolicyConfig.question_aware(8, lvlm.query_width)
    PruningPolicy(config).save_pretrained(root / "policy")
    return root


def test_three_lines_prune_and_answer(folders):
    model = PrunedLVLM.load(
        str(folders / "lvlm"), policy=folders / "policy", autoencoder=folders / "autoencoder"
    )
    answers = model.answer_batch(pictures(3), list(QUESTIONS), budget=5)
    assert [int(answer.keep.sum()) for answer in answers] == [5, 5, 5]
    single = model.answer(pictures(3)[1], QUESTIONS[1], budget=5)
    assert single.text == answers[1].text
    assert np.array_equal(single.keep, answers[1].keep)


def test_keeping_all_tokens_is_the_plain_model(folders):
    lvlm = load_lvlm(str(folders / "lvlm"))
    model = PrunedLVLM(lvlm, make_pruner("cls_attention"))
    picture = pictures(1)[0]
    pruned = model.answer(picture, QUESTIONS[0], budget=NUM_TOKENS)
    plain = lvlm.generate([lvlm.prompt(QUESTIONS[0])], [lvlm.encode_images([picture])[0].tokens])
    assert pruned.text == plain[0]
    assert pruned.keep.all()


def test_the_llm_s_own_attention_can_prune(folders):
    model = PrunedLVLM(load_lvlm(str(folders / "lvlm")), make_pruner("question_attention"))
    assert model.answer(pictures(1)[0], QUESTIONS[0], budget=3).keep.sum() == 3


def test_layer_0_s_rows_prune_as_the_reducer_before_layer_0(folders):
    lvlm = load_lvlm(str(folders / "lvlm"))
    model = PrunedLVLM(lvlm, make_pruner("question_rows"))
    answer = model.answer(pictures(1)[0], QUESTIONS[0], budget=3)
    prompts, tokens = [lvlm.prompt(QUESTIONS[0])], [lvlm.encode_images(pictures(1))[0].tokens]
    lives = lvlm.reduce(prompts, tokens, QuestionRows(layer=0), average=3)[0]
    assert answer.keep.tolist() == (lives > 0).tolist() and answer.keep.sum() == 3
    assert lvlm.generate(prompts, tokens, lives=[lives]) == [answer.text]


@pytest.mark.parametrize(
    ("name", "fields"), [("hiprune", {}), ("cdpruner", {"relevance": "query"})]
)
def test_pruners_that_look_into_the_tower_or_at_the_question(folders, name, fields):
    lvlm = load_lvlm(str(folders / "lvlm"))
    model = PrunedLVLM(lvlm, make_pruner(name, **fields))
    first, second = model.answer_batch(pictures(2), list(QUESTIONS[:2]), budget=5)
    assert first.keep.sum() == second.keep.sum() == 5
    assert np.array_equal(model.answer(pictures(2)[1], QUESTIONS[1], 5).keep, second.keep)


def test_a_threshold_keeps_a_varying_number(folders):
    model = PrunedLVLM.load(
        str(folders / "lvlm"),
        policy=folders / "policy",
        autoencoder=folders / "autoencoder",
        threshold=0.999999,
    )
    assert model.answer(pictures(1)[0], QUESTIONS[0], budget=5).keep.sum() == 1  # the arg-max


@pytest.mark.parametrize(("name", "sentence"), [("oracle", "labels"), ("policy", "autoencoder")])
def test_pruners_that_cannot_see_their_inputs_are_refused(folders, name, sentence):
    lvlm = load_lvlm(str(folders / "lvlm"))
    learned = PolicyPruner.from_pretrained(folders / "policy")
    pruner = learned if name == "policy" else make_pruner(name)
    with pytest.raises(ValueError, match=sentence):
        PrunedLVLM(lvlm, pruner)


def test_one_question_per_picture(folders):
    model = PrunedLVLM(load_lvlm(str(folders / "lvlm")), make_pruner("uniform"))
    with pytest.raises(ValueError, match="1 pictures and 2 questions"):
        model.answer_batch(pictures(1), list(QUESTIONS[:2]), budget=3)


def test_a_picture_may_be_a_path_a_pil_image_an_array_or_a_tensor(folders, tmp_path):
    model = PrunedLVLM(load_lvlm(str(folders / "lvlm")), make_pruner("cls_attention"))
    picture = pictures(1)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    tensor = torch.from_numpy(picture.copy())
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), data, Image.fromarray(picture), tensor,
             tensor.permute(2, 0, 1) / 255, Image.open(tmp_path / "a.png")]  # fmt: skip
    first, *others = model.answer_batch([picture, *forms], [QUESTIONS[0]] * 8, budget=5)
    for other in others:
        assert other.text == first.text
        assert np.array_equal(other.keep, first.keep)
    assert model.answer(tmp_path / "a.png", QUESTIONS[0], budget=5).text == first.text


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.zeros((0, 8, 3), np.uint8), "picture 0: .* has no pixels"),
        (np.zeros((8, 0, 3), np.uint8), "has no pixels"),
        (np.zeros((8, 8, 3), np.float32) - 1, r"floats must lie in 0\.\.1"),
        (np.zeros((2, 8, 8, 3), np.uint8), "give one picture"),
        ("nowhere.png", "nowhere.png: No such file"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(folders, picture, reason):
    model = PrunedLVLM(load_lvlm(str(folders / "lvlm")), make_pruner("uniform"))
    with pytest.raises(ValueError, match=reason):
        model.answer(picture, QUESTIONS[0], budget=3)


def test_a_batch_is_a_list(folders):
    model = PrunedLVLM(load_lvlm(str(folders / "lvlm")), make_pruner("uniform"))
    for words in (("a.png", [QUESTIONS[0]]), (pictures(1), QUESTIONS[0])):
        with pytest.raises(ValueError, match=r"must be lists; for one of each use answer\(\)"):
            model.answer_batch(*words, budget=3)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "question_rows"])
def test_a_layer_pruner_answers_as_the_lvlm_with_it(folders, name):
    lvlm = load_lvlm(str(folders / "lvlm"))
    reducer = make_reducer(name)
    answers = PrunedLVLM(lvlm, reducer=reducer).answer_batch(pictures(3), list(QUESTIONS), 12)
    prompts = [lvlm.prompt(question) for question in QUESTIONS]
    tokens = [visual.tokens for visual in lvlm.encode_images(pictures(3))]
    assert [a.text for a in answers] == lvlm.generate(
        prompts, tokens, reducer=reducer, average=12.0
    )
    for answer, lives in zip(answers, lvlm.reduce(prompts, tokens, reducer, 12.0), strict=True):
        assert np.array_equal(answer.lives, lives)
        assert np.array_equal(answer.keep, lives > 0)
        assert answer.average_tokens == pytest.approx(lives.sum() / lvlm.num_layers)
        assert abs(answer.average_tokens - 12) <= 0.5


@pytest.mark.parametrize("name", ["tome", "visionzip", "pooled"])
def test_a_merger_answers_from_its_tokens(folders, name):
    lvlm = load_lvlm(str(folders / "lvlm"))
    merger = make_reducer(name)
    answer = PrunedLVLM(lvlm, reducer=merger).answer(pictures(1)[0], QUESTIONS[0], 4)
    visual = lvlm.encode_images(pictures(1))[0]
    inputs = PruneInputs(tokens=visual.tokens, grid=visual.grid)
    inputs.vision = lvlm.vision_signals(pictures(1)[0])
    merged = merger.merge(inputs, 4)
    places = merged.places.numpy()
    text = lvlm.generate(
        [lvlm.prompt(QUESTIONS[0])], [merged.tokens], None, 20, merger.positions,
        places=[places], sizes=[NUM_TOKENS],
    )  # fmt: skip
    assert [answer.text] == text
    assert answer.average_tokens == len(places) == 4
    assert np.flatnonzero(answer.keep).tolist() == sorted(set(places.tolist()))


def test_all_kinds_use_all_tokens_alike(folders):
    lvlm = load_lvlm(str(folders / "lvlm"))
    texts = {
        PrunedLVLM(lvlm, reducer=make_reducer(name)).answer(
            pictures(1)[0], QUESTIONS[0], NUM_TOKENS
        ).text
        for name in ("uniform", "pooled", "fastv")
    }  # fmt: skip
    assert len(texts) == 1


def test_an_impossible_average_and_no_reducer_are_refused(folders):
    lvlm = load_lvlm(str(folders / "lvlm"))
    with pytest.raises(ValueError, match="fastv can have an average of"):
        PrunedLVLM(lvlm, make_reducer("fastv")).answer(pictures(1)[0], QUESTIONS[0], 1)
    with pytest.raises(ValueError, match="a pruner, a merger or a layer pruner, got str"):
        PrunedLVLM(lvlm, "fastv")


@pytest.mark.parametrize("name", ["divprune", "visionzip", "question_rows"])
def test_an_answer_is_scored_as_it_is_written(folders, name):
    model = PrunedLVLM(load_lvlm(str(folders / "lvlm")), make_reducer(name))
    rows = pictures(2), list(QUESTIONS[:2])
    written = model.answer_batch(*rows, 6, max_new_tokens=6)
    first = "yes"
    scores = model.score_batch(*rows, [[first], [first, "no"]], 6)
    for one, other in zip(scores, written, strict=True):
        assert np.array_equal(one.lives, other.lives)
        assert one.average_tokens == other.average_tokens and 0 < one.likelihood < 1
    alone = model.score_batch(*rows, [[first], [first]], 6)
    assert alone[0].likelihood == pytest.approx(scores[0].likelihood)
    assert alone[1].likelihood < scores[1].likelihood
    with pytest.raises(ValueError, match="1 lists for 2 questions"):
        model.score_batch(*rows, [[first]], 6)


def test_a_share_is_of_each_picture(tmp_path):
    from tprl_env.lvlm.tiny.families import save_random

    model = PrunedLVLM(load_lvlm(save_random("qwen2_vl", tmp_path)), make_reducer("uniform"))
    sizes = [(56, 56), (112, 56), (56, 56)]
    rows = [np.full((*size, 3), 90, np.uint8) for size in sizes], ["yes or no"] * 3
    answers = model.answer_batch(*rows, 0.5, max_new_tokens=2)
    shown = [len(answer.keep) for answer in answers]
    assert shown[0] == shown[2] != shown[1]
    assert [int(a.keep.sum()) for a in answers] == [int(n / 2 + 0.5) for n in shown]
    single = [model.answer(*row, 0.5, 2).text for row in zip(*rows, strict=True)]
    assert [a.text for a in answers] == single
    assert [a.keep.all() for a in model.answer_batch(*rows, 1.0, 1)] == [True] * 3
    for bad in (0.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="budget must be"):
            model.answer_batch(*rows, bad)
