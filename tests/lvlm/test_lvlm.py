"""The LVLM against the library's own forward pass, which never sees our code path."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from lvlm_fixtures import (
    LLAVA15_CHAT_TEMPLATE,
    NUM_TOKENS,
    QUESTIONS,
    byte_tokenizer,
    pictures,
    save_llava,
)
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.execution.decoder import logits
from tprl_env.lvlm.protocol import Prompt

torch.set_num_threads(1)
EOS = 2


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("word"), cls_attention_layer=-1)


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    """Like LLaVA-1.5's folder: chat template, byte-level words, layer -2 for everything."""
    folder = tmp_path_factory.mktemp("byte")
    return save_llava(
        folder, tokenizer=byte_tokenizer(), chat_template=LLAVA15_CHAT_TEMPLATE, seed=1
    )


@pytest.fixture(scope="module", params=["word", "byte"])
def folder(request, word_folder, byte_folder):
    return {"word": word_folder, "byte": byte_folder}[request.param]


@pytest.fixture(scope="module")
def lvlm(folder):
    return load_lvlm(folder, device="cpu")


@pytest.fixture(scope="module")
def plain(folder):
    """The library's model, eager attention, untouched by this package."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def word_lvlm(word_folder):
    return load_lvlm(word_folder, device="cpu")


def expanded(prompt, count=NUM_TOKENS):
    """The prompt's ids with one placeholder per visual token."""
    at = prompt.visual_at[0]
    return [*prompt.ids[:at], *[prompt.ids[at]] * count, *prompt.ids[at + 1 :]]


def pixels(folder, images):
    from PIL import Image

    processor = LlavaProcessor.from_pretrained(folder)
    return processor.image_processor([Image.fromarray(i) for i in images], return_tensors="pt")[
        "pixel_values"
    ]


def reference_logits(plain, prompt, tokens, keep, answer, positions):
    """Cache-free forward over the FULL sequence, dropped columns hidden by a 4-D mask."""
    ids = torch.tensor([expanded(prompt, len(tokens)) + list(answer[:-1])])
    embeds = plain.get_input_embeddings()(ids)
    at = prompt.visual_at[0]
    embeds[0, at : at + len(tokens)] = tokens
    alive = torch.ones(ids.shape[1], dtype=torch.bool)
    alive[at : at + len(tokens)] = torch.from_numpy(keep)
    place = torch.arange(ids.shape[1])
    if positions == "contiguous":
        place = (alive.long().cumsum(0) - 1).clamp(min=0)
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & alive[None]
    visible |= torch.eye(ids.shape[1], dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    out = plain(inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=place[None])
    return out.logits[0, -len(answer) :].float()


def reference_scores(logits, answer):
    target = torch.tensor(answer)
    log_p = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float((logits.argmax(-1) == target).all()), float(log_p.exp())


def cases(lvlm, count, seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    visual = [v.tokens for v in lvlm.encode_images(pictures(4, seed))]
    prompts = [lvlm.prompt(QUESTIONS[i % len(QUESTIONS)]) for i in range(count)]
    tokens = [visual[i % 4] for i in range(count)]
    keep = [rng.random(NUM_TOKENS) < share for _ in range(count)]
    return prompts, tokens, keep


# ---------- encoding


def test_encode_equals_the_library(lvlm, plain, folder):
    images = pictures(18, seed=3, size=(40, 28))
    found = lvlm.encode_images(images)
    values = pixels(folder, images)
    expected = plain.get_image_features(
        values, output_hidden_states=True, output_attentions=True, return_dict=True
    )
    layer = -1 if "word" in str(folder) else -2
    assert lvlm.cls_attention_layer == layer
    for i, visual in enumerate(found):
        torch.testing.assert_close(visual.tokens, expected.pooler_output[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            visual.tower, expected.hidden_states[-2][i, 1:], atol=1e-5, rtol=1e-5
        )
        rows = expected.attentions[layer][i, :, 0, 1:].mean(0)
        torch.testing.assert_close(visual.cls_attention, rows, atol=1e-6, rtol=1e-4)
        assert visual.grid == (4, 4)
    assert (lvlm.token_width, lvlm.query_width, lvlm.tower_width) == (48, 48, 32)
    assert not any(p.requires_grad for p in lvlm._model.parameters())


def test_a_layer_the_tower_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="tower layer 7, but the tower has 3 layers"):
        load_lvlm(save_llava(tmp_path, cls_attention_layer=7), device="cpu")


# ---------- scoring


def test_keep_all_is_the_unpruned_model(lvlm, plain, folder):
    images = pictures(4, seed=5)
    values = pixels(folder, images)
    tokens = [v.tokens for v in lvlm.encode_images(images)]
    prompts = [lvlm.prompt(QUESTIONS[i % 3]) for i in range(4)]
    answers = [lvlm.answer_ids(p, "red c1") for p in prompts]
    everything = [np.ones(NUM_TOKENS, bool)] * 4
    scored = lvlm.score(prompts, [[a] for a in answers], tokens)
    kept = lvlm.score(prompts, [[a] for a in answers], tokens, everything)
    np.testing.assert_array_equal(scored.likelihood, kept.likelihood)
    texts = lvlm.generate(prompts, tokens, everything, max_new_tokens=8)
    assert texts == lvlm.generate(prompts, tokens, max_new_tokens=8)
    tokenizer = LlavaProcessor.from_pretrained(folder).tokenizer
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([expanded(prompt)])
        full = torch.cat([ids, torch.tensor([answer[:-1]])], 1)
        logits = plain(input_ids=full, pixel_values=values[i : i + 1]).logits[0, -len(answer) :]
        exact, likelihood = reference_scores(logits, answer)
        assert scored.exact[i] == exact
        assert scored.likelihood[i] == pytest.approx(likelihood, rel=1e-3, abs=1e-12)
        out = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=values[i : i + 1],
            max_new_tokens=8,
            do_sample=False,
            repetition_penalty=1.0,
        )
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert texts[i] == expected


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_pruned_is_the_masked_full_forward(lvlm, plain, positions, share):
    prompts, tokens, keep = cases(lvlm, 8, seed=7, share=share)
    answers = [lvlm.answer_ids(p, "red c1" if i % 2 else "7") for i, p in enumerate(prompts)]
    scored = lvlm.score(prompts, [[a] for a in answers], tokens, keep, positions)
    assert scored.sequences == 8
    for i, answer in enumerate(answers):
        logits = reference_logits(plain, prompts[i], tokens[i], keep[i], answer, positions)
        exact, likelihood = reference_scores(logits, answer)
        assert scored.exact[i] == exact
        assert scored.likelihood[i] == pytest.approx(likelihood, rel=2e-3, abs=1e-12)


def test_positions_are_not_the_same_thing(word_lvlm):
    prompts, tokens, keep = cases(word_lvlm, 6, seed=8, share=0.3)
    answers = [[word_lvlm.answer_ids(p, "7")] for p in prompts]
    original = word_lvlm.score(prompts, answers, tokens, keep, "original").likelihood
    closed = word_lvlm.score(prompts, answers, tokens, keep, "contiguous").likelihood
    assert np.abs(np.log(original) - np.log(closed)).max() > 0.1


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_exact_is_greedy_generation(lvlm, positions):
    """240 (sample, mask) pairs, each against its greedy answer and three altered ones."""
    prompts, tokens, keep = cases(lvlm, 240, seed=11)
    written = lvlm.generate_ids(prompts, tokens, keep, 5, positions)
    rng = np.random.default_rng(0)
    candidates = []
    for ids in written:
        changed = list(ids) or [7]
        changed[-1] = 5 + int(rng.integers(30))
        candidates.append([[*ids, EOS], [*ids[:-1], EOS], [*changed, EOS], [*ids, 9, EOS]])
    asked = [c for row in candidates for c in row]
    scored = lvlm.score(
        [p for p in prompts for _ in range(4)],
        [[c] for c in asked],
        [t for t in tokens for _ in range(4)],
        [k for k in keep for _ in range(4)],
        positions,
    )
    longer = lvlm.generate_ids(prompts, tokens, keep, 7, positions)
    expected = [c[:-1] == longer[i // 4] and len(longer[i // 4]) < 7 for i, c in enumerate(asked)]
    assert scored.exact.tolist() == [float(e) for e in expected]
    assert 20 < sum(expected) < len(asked) - 240
    assert len({tuple(ids) for ids in written}) > 20


def test_generation_with_gaps_is_the_masked_full_forward(lvlm, plain):
    prompts, tokens, keep = cases(lvlm, 6, seed=13)
    for i, ids in enumerate(lvlm.generate_ids(prompts, tokens, keep, 4)):
        padded = [*ids, EOS][:4]
        logits = reference_logits(plain, prompts[i], tokens[i], keep[i], padded, "original")
        assert logits.argmax(-1).tolist() == padded


def test_batched_is_one_by_one_and_padding_does_not_matter(lvlm):
    prompts, tokens, keep = cases(lvlm, 10, seed=17)
    keep[0][:] = True
    keep[1][:] = False
    answers = [[lvlm.answer_ids(p, "red c1" if i % 2 else "7")] for i, p in enumerate(prompts)]
    together = lvlm.score(prompts, answers, tokens, keep)
    assert together.padded_tokens > 0
    texts = lvlm.generate(prompts, tokens, keep, 5)
    for i in range(10):
        part = slice(i, i + 1)
        alone = lvlm.score(prompts[part], answers[part], tokens[part], keep[part])
        assert alone.padded_tokens == 0
        assert alone.exact[0] == together.exact[i]
        assert alone.likelihood[0] == pytest.approx(together.likelihood[i], rel=1e-4)
        assert lvlm.generate(prompts[part], tokens[part], keep[part], 5) == [texts[i]]


def test_several_answers(word_lvlm):
    prompts, tokens, keep = cases(word_lvlm, 12, seed=19)
    written = word_lvlm.generate_ids(prompts, tokens, keep, 6)
    row = next(i for i, ids in enumerate(written) if 0 < len(ids) < 6)
    right, wrong = (*written[row], EOS), (written[row][0], 9, 9, EOS)
    one = (prompts[row : row + 1], tokens[row : row + 1], keep[row : row + 1])

    def score(*answers):
        return word_lvlm.score(one[0], [answers], one[1], one[2])

    both = score(wrong, right, wrong)
    assert both.sequences == 2
    assert (score(right).exact[0], score(wrong).exact[0], both.exact[0]) == (1.0, 0.0, 1.0)
    total = score(right).likelihood[0] + score(wrong).likelihood[0]
    assert both.likelihood[0] == pytest.approx(total, rel=1e-4)
    assert score(right, right).likelihood[0] == pytest.approx(score(right).likelihood[0], rel=1e-5)


def test_every_end_token_counts(word_folder, tmp_path):
    """A model that stops with another of its end tokens still answered right."""
    folder = shutil.copytree(word_folder, tmp_path / "two_ends")
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = [EOS, *range(5, 40)]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    lvlm = load_lvlm(folder, device="cpu")
    prompts, tokens, keep = cases(lvlm, 20, seed=23)
    assert lvlm.generate_ids(prompts, tokens, keep, 3).count([]) > 5
    one_end = load_lvlm(word_folder, device="cpu")
    answers = [[[EOS]]] * 20
    many = lvlm.score(prompts, answers, tokens, keep).exact.sum()
    assert many > one_end.score(prompts, answers, tokens, keep).exact.sum()


@pytest.fixture(scope="module")
def many_ends(word_folder, tmp_path_factory):
    """Like Llama 3: the model may stop with another token than the tokenizer's."""
    folder = shutil.copytree(word_folder, tmp_path_factory.mktemp("ends") / "many")
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = [EOS, 11, 12]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_lvlm(folder, device="cpu")


def test_likelihood_adds_up_all_end_tokens(many_ends, word_lvlm, word_folder):
    plain = LlavaForConditionalGeneration.from_pretrained(
        word_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts, tokens, keep = cases(many_ends, 6, seed=31)
    for i, prompt in enumerate(prompts):
        answer = many_ends.answer_ids(prompt, "red c1" if i % 2 else "7")
        with torch.no_grad():
            logits = reference_logits(plain, prompt, tokens[i], keep[i], answer, "original")
        p = logits.softmax(-1)
        before = p[torch.arange(len(answer) - 1), list(answer[:-1])].prod()
        expected = float(before * p[-1, [EOS, 11, 12]].sum())
        row = ([prompt], [tokens[i]], [keep[i]])
        found = many_ends.score(row[0], [[answer]], row[1], row[2]).likelihood[0]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-12)
        single = word_lvlm.score(row[0], [[answer]], row[1], row[2]).likelihood[0]
        assert found > single


def test_exact_and_likelihood_agree_about_ends(many_ends):
    """An answer that ends with another end token is the same answer, counted once."""
    prompts, tokens, keep = cases(many_ends, 12, seed=37)
    written = many_ends.generate_ids(prompts, tokens, keep, 4)
    ended = [i for i, ids in enumerate(written) if len(ids) < 4]
    assert len(ended) > 3
    pick = [[part[i] for i in ended] for part in (prompts, tokens, keep)]

    def score(*ends):
        answers = [[(*written[i], end) for end in ends] for i in ended]
        return many_ends.score(pick[0], answers, pick[1], pick[2])

    first, other, both = score(EOS), score(12), score(EOS, 11, 12)
    assert first.exact.tolist() == other.exact.tolist() == both.exact.tolist() == [1.0] * len(ended)
    np.testing.assert_array_equal(first.likelihood, other.likelihood)
    np.testing.assert_array_equal(first.likelihood, both.likelihood)
    assert both.sequences == len(ended)


@pytest.mark.filterwarnings("error")
def test_tokens_may_be_read_only_half_precision_arrays(word_lvlm):
    prompts, tokens, keep = cases(word_lvlm, 4)
    answers = [[word_lvlm.answer_ids(p, "7")] for p in prompts]
    stored = [t.numpy().astype(np.float16) for t in tokens]
    for array in stored:
        array.flags.writeable = False
    np.testing.assert_allclose(
        word_lvlm.score(prompts, answers, stored, keep).likelihood,
        word_lvlm.score(prompts, answers, tokens, keep).likelihood,
        rtol=0.1,
    )


def test_bfloat16_keeps_logits_in_float32(word_folder):
    half = load_lvlm(word_folder, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert logits(half._head[:3], half._head).dtype == torch.float32
    prompts, tokens, keep = cases(half, 6)
    scored = half.score(prompts, [[half.answer_ids(p, "7")] for p in prompts], tokens, keep)
    assert np.isfinite(scored.likelihood).all()


# ---------- demonstrator


def test_question_attention_is_the_eager_one(lvlm, plain, monkeypatch):
    prompts, tokens, _ = cases(lvlm, 7, seed=29)
    tokens[3] = tokens[3][:9]
    answers = [[lvlm.answer_ids(p, "7")] for p in prompts]
    before = lvlm.score(prompts, answers, tokens).likelihood
    found = lvlm.question_attention(prompts, tokens)
    np.testing.assert_array_equal(lvlm.score(prompts, answers, tokens).likelihood, before)
    for i, prompt in enumerate(prompts):
        count, at = len(tokens[i]), prompt.visual_at[0]
        embeds = plain.get_input_embeddings()(torch.tensor([expanded(prompt, count)]))
        embeds[0, at : at + count] = tokens[i]
        out = plain(inputs_embeds=embeds, output_attentions=True)
        start, stop = (place + count - 1 for place in prompt.question_span)
        rows = torch.stack([a[0, :, start:stop, at : at + count] for a in out.attentions])
        expected = rows.amax((0, 1, 2)).numpy()
        assert found[i].shape == (count,) and found[i].dtype == np.float32
        np.testing.assert_allclose(found[i], expected, atol=2e-5)
    monkeypatch.setattr("tprl_env.lvlm.execution.question_map._ATTENTION_ELEMENTS", 1)
    for a, b in zip(lvlm.question_attention(prompts, tokens), found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_question_before_image_has_no_attention(word_lvlm):
    prompt = Prompt((1, 7, 8, 4, 6), (3,), (1, 3))
    with pytest.raises(ValueError, match="image before the question"):
        word_lvlm.question_attention([prompt], [torch.zeros(4, 48)])
