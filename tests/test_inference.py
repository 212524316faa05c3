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
from tprl_env.reducers import make_pruner
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
