"""Reducers inside the LVLM: rows against eager attention, lives, replay, merged tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from full_length import KINDS, FullLength, random_model
from lvlm_fixtures import NUM_TOKENS, QUESTIONS, pictures, save_llava

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.execution.language import LanguageModel
from tprl_env.lvlm.execution.selection import Selection
from tprl_env.lvlm.protocol import Prompt
from tprl_env.reducers.layer import (
    BTP,
    PACT,
    AutoPrune,
    FastV,
    PyramidDrop,
    QuestionRows,
    SparseVLM,
)
from tprl_env.reducers.layer_pruner import Choice, OneCut, Stage

torch.set_num_threads(1)
LAYERS = 3
RULES = {
    "fastv": FastV(layer=1, depth=None),
    "pyramiddrop": PyramidDrop(layers=(1, 2), depth=None),
    "question_rows": QuestionRows(layer=1),
    "before the LLM": QuestionRows(layer=0),
    "previous": QuestionRows(layer=2, source="previous", heads="mean"),
    "sparsevlm v2": SparseVLM("v2"),
    "btp": BTP(),
    "autoprune": AutoPrune(share=0.6),
}


@pytest.fixture(scope="module")
def lvlm(tmp_path_factory):
    return load_lvlm(save_llava(tmp_path_factory.mktemp("word")), device="cpu")


def rows(lvlm, count=6, seed=0):
    """Prompts, answers (one or two each) and tokens, the last image smaller."""
    visual = [v.tokens for v in lvlm.encode_images(pictures(3, seed))]
    prompts = [lvlm.prompt(QUESTIONS[i % 3]) for i in range(count)]
    tokens = [visual[i % 3] for i in range(count)]
    tokens[-1] = tokens[-1][:10]
    texts = [("7", "red c1") if i % 3 == 0 else ("2 9",) for i in range(count)]
    answers = [
        [lvlm.answer_ids(p, a) for a in some] for p, some in zip(prompts, texts, strict=True)
    ]
    return prompts, answers, tokens


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("rule", ["fastv", "pyramiddrop", "question_rows", "previous"])
@torch.inference_mode()
def test_rules_see_the_eager_attention(kind, rule):
    """Lives of two samples equal those of a full-length pass with eager attention and masks."""
    from tprl_env.lvlm.execution.attention import IMPLEMENTATION

    reducer = RULES[rule]
    model, plain = (random_model(kind, name, LAYERS) for name in (IMPLEMENTATION, "eager"))
    language = LanguageModel(model.model, model.lm_head, (2,), 256)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        Prompt((1, 7, 4, 9, 11, 12, 6, 5), (2,), (3, 6)),
        Prompt((1, 4, 8, 13, 6), (1,), (2, 4)),
    ]
    tokens = [torch.randn(n, 48, generator=generator) for n in (14, 14)]
    lives = language.reduce(prompts, tokens, Selection(reducer=reducer))
    stages = {stage.layer: stage.keep for stage in reducer.stages(14, LAYERS)}
    for prompt, visual, found in zip(prompts, tokens, lives, strict=True):
        at = prompt.visual_at[0]
        embedded = model.model.embed_tokens(torch.tensor(prompt.ids))
        embeds = torch.cat([embedded[:at], visual, embedded[at + 1 :]])
        image = torch.full((len(embeds),), -1)
        image[at : at + 14] = torch.arange(14)
        expected = torch.full((14,), LAYERS)
        asked = range(*(place + 13 for place in prompt.question_span))
        if getattr(reducer, "rows", "last") == "last":
            asked = range(len(embeds) - 1, len(embeds))
        source = getattr(reducer, "source", "previous" if rule == "fastv" else "own")
        largest = getattr(reducer, "heads", "mean") == "max"

        def choose(layer, alive, weights, *, e=expected, i=image, a=asked, s=source, g=largest):
            if layer not in stages:
                return alive
            seen = weights[s][:, list(a)].amax(1)
            values = (seen.amax(0) if g else seen.mean(0))[i >= 0]
            values = values.masked_fill(~alive[i >= 0], -1)
            kept = torch.zeros(14, dtype=torch.bool)
            kept[values.topk(stages[layer]).indices] = True
            e[alive[i >= 0] & ~kept] = layer
            stays = i < 0
            stays[i >= 0] = kept
            return stays

        FullLength(plain, image, reducer.positions == "contiguous").logits(embeds, choose)
        assert found.dtype == np.uint8
        assert found.tolist() == expected.tolist()
        assert set(found.tolist()) == {*stages, LAYERS}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("positions", [None, "original", "contiguous"])
def test_replay_is_the_reducers_own_pass(lvlm, rule, positions):
    reducer = RULES[rule]
    prompts, answers, tokens = rows(lvlm)
    own = lvlm.score(prompts, answers, tokens, positions=positions, reducer=reducer)
    assert [one.shape for one in own.lives] == [(len(t),) for t in tokens]
    for one, alone in zip(
        own.lives, lvlm.reduce(prompts, tokens, reducer, positions=positions), strict=True
    ):
        assert one.tolist() == alone.tolist()
    same = positions or reducer.positions
    again = lvlm.score(prompts, answers, tokens, positions=same, lives=own.lives)
    np.testing.assert_array_equal(again.exact, own.exact)
    np.testing.assert_allclose(again.likelihood, own.likelihood, rtol=1e-4)
    assert again.lives is None and again.sequences == own.sequences == 8
    texts = lvlm.generate(prompts, tokens, None, 6, positions, reducer=reducer)
    assert lvlm.generate(prompts, tokens, None, 6, same, lives=own.lives) == texts
    assert lvlm.generate(prompts, tokens, None, 6) != texts
    for i in range(len(prompts)):
        part = slice(i, i + 1)
        alone = lvlm.score(
            prompts[part], answers[part], tokens[part], positions=positions, reducer=reducer
        )
        assert alone.lives[0].tolist() == own.lives[i].tolist()
        assert alone.likelihood[0] == pytest.approx(own.likelihood[i], rel=1e-4)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_mask_is_the_special_case_to_the_bit(lvlm, positions):
    prompts, answers, tokens = rows(lvlm)
    rng = np.random.default_rng(0)
    keep = [rng.random(len(t)) < 0.4 for t in tokens]
    keep[0][:], keep[1][:] = False, True
    lives = [mask.astype(np.uint8) * LAYERS for mask in keep]
    mask = lvlm.score(prompts, answers, tokens, keep, positions)
    replay = lvlm.score(prompts, answers, tokens, None, positions, lives=lives)
    np.testing.assert_array_equal(mask.exact, replay.exact)
    np.testing.assert_array_equal(mask.likelihood, replay.likelihood)
    assert mask.padded_tokens == replay.padded_tokens
    texts = lvlm.generate(prompts, tokens, keep, 6, positions)
    assert lvlm.generate(prompts, tokens, None, 6, positions, lives=lives) == texts


def test_exact_is_greedy_generation_with_lives(lvlm):
    prompts, _, tokens = rows(lvlm, 60)
    rng = np.random.default_rng(1)
    lives = [rng.integers(0, LAYERS + 1, len(t)).astype(np.uint8) for t in tokens]
    written = lvlm.generate_ids(prompts, tokens, None, 5, lives=lives)
    ended = [[(*ids, 2)] for ids in written]
    scored = lvlm.score(prompts, ended, tokens, lives=lives)
    longer = lvlm.generate_ids(prompts, tokens, None, 6, lives=lives)
    assert scored.exact.tolist() == [float(a == b) for a, b in zip(longer, written, strict=True)]
    assert 0 < scored.exact.sum() and len({tuple(ids) for ids in written}) > 10
    other = lvlm.score(prompts, ended[1:] + ended[:1], tokens, lives=lives)
    assert other.exact.sum() < scored.exact.sum()


@pytest.mark.parametrize("reducer", [SparseVLM("v1"), SparseVLM("v1.5"), PACT(1, cutoff=0.8)])
def test_merged_states_in_scores_and_answers(lvlm, reducer):
    """Merged states take part: exact is greedy, batch is one by one, and dropping alone is not."""
    prompts, answers, tokens = rows(lvlm, 24)
    written = lvlm.generate_ids(prompts, tokens, None, 6, reducer=reducer)
    ended = [[(*ids, 2)] for ids in written]
    scored = lvlm.score(prompts, ended, tokens, reducer=reducer)
    longer = lvlm.generate_ids(prompts, tokens, None, 7, reducer=reducer)
    assert scored.exact.tolist() == [float(a == b) for a, b in zip(longer, written, strict=True)]
    together = lvlm.score(prompts, answers, tokens, reducer=reducer)
    if reducer.name == "sparsevlm":
        entered = [stage.keep for stage in reducer.stages(16, LAYERS)[1:]]
        assert together.lives[0].sum() == 16 + sum(entered)
    for i in range(6):
        part = slice(i, i + 1)
        alone = lvlm.score(prompts[part], answers[part], tokens[part], reducer=reducer)
        assert alone.lives[0].tolist() == together.lives[i].tolist()
        assert alone.likelihood[0] == pytest.approx(together.likelihood[i], rel=1e-4)
    positions = reducer.positions
    dropped = lvlm.score(prompts, answers, tokens, None, positions, lives=together.lives)
    assert np.abs(np.log(dropped.likelihood) - np.log(together.likelihood)).max() > 1e-3


def test_nothing_left_at_any_layer(lvlm):
    prompts, answers, tokens = rows(lvlm)
    for layer in range(LAYERS + 1):
        lives = [np.full(len(t), layer, np.uint8) for t in tokens]
        scored = lvlm.score(prompts, answers, tokens, lives=lives)
        assert np.isfinite(scored.likelihood).all() and (scored.likelihood > 0).all()
        for i, one in enumerate(lives):
            part = slice(i, i + 1)
            alone = lvlm.score(prompts[part], answers[part], tokens[part], lives=[one])
            assert alone.likelihood[0] == pytest.approx(scored.likelihood[i], rel=1e-4)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_merged_tokens_stand_at_given_places(lvlm, positions):
    """Merging that merges nothing is a mask, to the bit; order and places both count."""
    prompts, answers, tokens = rows(lvlm)
    rng = np.random.default_rng(2)
    keep = [rng.random(len(t)) < 0.4 for t in tokens]
    places = [np.flatnonzero(mask) for mask in keep]
    merged = [t[torch.from_numpy(mask)] for t, mask in zip(tokens, keep, strict=True)]
    sizes = [len(t) for t in tokens]
    mask = lvlm.score(prompts, answers, tokens, keep, positions)
    given = lvlm.score(prompts, answers, merged, None, positions, places=places, sizes=sizes)
    np.testing.assert_array_equal(mask.likelihood, given.likelihood)
    texts = lvlm.generate(prompts, merged, None, 6, positions, places=places, sizes=sizes)
    assert texts == lvlm.generate(prompts, tokens, keep, 6, positions)
    shifted = [np.roll(one, 1) for one in places]
    moved = lvlm.score(prompts, answers, merged, None, positions, places=shifted, sizes=sizes)
    assert (moved.likelihood == given.likelihood).all() == (positions == "contiguous")


@pytest.mark.parametrize("rule", [*RULES, "pact"])
def test_questions_about_one_image_share_its_layers(lvlm, rule):
    """The same figures as without sharing, from fewer places in the first layers."""
    reducer = {**RULES, "pact": PACT(layer=1, depth=None, cutoff=0.6)}[rule]
    prompts, answers, _ = rows(lvlm, 9)
    images = [v.tokens for v in lvlm.encode_images(pictures(2, 7))]
    shared = [images[i // 5] for i in range(9)]
    apart = [one.clone() for one in shared]
    places = []
    hook = lvlm._language.text.layers[0].mlp.register_forward_pre_hook(
        lambda _, given: places.append(given[0].shape[0] * given[0].shape[1])
    )
    together = lvlm.score(prompts, answers, shared, reducer=reducer)
    fewer, places[:] = sum(places), []
    alone = lvlm.score(prompts, answers, apart, reducer=reducer)
    hook.remove()
    # nothing is shared behind a cut before layer 0, but for the answers of one sample
    assert fewer < 0.7 * sum(places) or rule == "before the LLM"
    np.testing.assert_array_equal(together.exact, alone.exact)
    np.testing.assert_allclose(together.likelihood, alone.likelihood, rtol=1e-4)
    for one, other in zip(together.lives, alone.lives, strict=True):
        assert one.tolist() == other.tolist()
    lives = [one + (one == 0) for one in together.lives]
    replay = [lvlm.score(prompts, answers, t, lives=lives).likelihood for t in (shared, apart)]
    np.testing.assert_allclose(*replay, rtol=1e-4)


@dataclass(frozen=True)
class FirstHalf(PACT):
    """Reads the image alone, and remembers a number for each sample."""

    def stages(self, num_tokens, num_layers, average=None):
        return Stage(1, num_tokens // 2), Stage(2, num_tokens // 4)

    def select(self, view):
        given = view.hidden.shape[0]
        ASKED.append((given, view.memory.get("first", torch.zeros(0)).shape[0]))
        view.memory.setdefault("first", view.hidden.float().sum((1, 2)))
        return Choice((torch.arange(view.alive.shape[1]) < view.keep[:, None]) & view.alive)


ASKED: list[tuple[int, int]] = []


def test_a_rule_that_reads_the_image_alone_is_asked_once_for_its_questions(lvlm):
    """Two images, nine questions with one or two answers; after the first cut nothing is shared."""
    prompts, answers, _ = rows(lvlm, 9)
    images = [v.tokens for v in lvlm.encode_images(pictures(2, 7))]
    shared = [images[i // 5] for i in range(9)]
    ASKED.clear()
    together = lvlm.score(prompts, answers, shared, reducer=FirstHalf())
    assert ASKED == [(2, 0), (9, 9)]
    half, quarter = NUM_TOKENS // 2, NUM_TOKENS // 4
    expected = [LAYERS] * quarter + [2] * (half - quarter) + [1] * (NUM_TOKENS - half)
    assert [one.tolist() for one in together.lives] == [expected] * 9


def test_saliency_is_what_the_rule_ranks_by(lvlm):
    prompts, _, tokens = rows(lvlm)
    for rule in (QuestionRows(layer=0), QuestionRows(layer=2), FastV(layer=1, depth=None)):
        values = lvlm.saliency(prompts, tokens, rule)
        assert [one.shape for one in values] == [(len(t),) for t in tokens]
        cut = OneCut(rule, rule.layer, 5)
        for one, lives in zip(values, lvlm.reduce(prompts, tokens, cut), strict=True):
            assert one.dtype == np.float32 and (one >= 0).all() and (one <= 1).all()
            top = np.argsort(-one, kind="stable")[:5]
            assert set(top.tolist()) == set(np.flatnonzero(lives == LAYERS).tolist())


@pytest.mark.parametrize("reducer", [*RULES.values(), SparseVLM(), PACT(1)])
def test_images_of_one_token_and_of_none(lvlm, reducer):
    prompts, answers, tokens = rows(lvlm, 3)
    few = [tokens[0], tokens[0][:0], tokens[0][:1]]
    scored = lvlm.score(prompts, answers, few, reducer=reducer)
    assert np.isfinite(scored.likelihood).all()
    assert [len(one) for one in scored.lives] == [16, 0, 1]
    nothing = lvlm.score(prompts, answers, [few[1]] * 3, reducer=reducer)
    blind = lvlm.score(prompts, answers, [few[1]] * 3, positions=reducer.positions)
    np.testing.assert_allclose(nothing.likelihood, blind.likelihood, rtol=1e-4)
    assert nothing.likelihood[1] == pytest.approx(scored.likelihood[1], rel=1e-4)
    assert len(lvlm.generate(prompts, few, None, 2, reducer=reducer)) == 3


def test_bfloat16_runs_every_way(tmp_path_factory):
    half = load_lvlm(save_llava(tmp_path_factory.mktemp("half")), device="cpu", dtype="bfloat16")
    prompts, answers, tokens = rows(half)
    for reducer in (*RULES.values(), SparseVLM(), PACT(1)):
        scored = half.score(prompts, answers, tokens, reducer=reducer)
        assert np.isfinite(scored.likelihood).all() and scored.lives is not None
        assert len(half.generate(prompts, tokens, None, 3, reducer=reducer)) == 6
        assert len(half.reduce(prompts, tokens, reducer)) == 6


def test_bad_requests_are_refused(lvlm):
    prompts, answers, tokens = rows(lvlm)
    rule, full = FastV(), [np.full(len(t), LAYERS) for t in tokens]

    def score(match, **inside):
        with pytest.raises(ValueError, match=match):
            lvlm.score(prompts, answers, tokens, **inside)

    score("one of keep, lives, reducer and places, got lives and reducer", lives=full, reducer=rule)
    score("average 4 has no reducer", average=4)
    score("lives has 2 rows, expected 6", lives=full[:2])
    score(r"lives of row 0 must be integers of shape \(16,\)", lives=[np.ones(4, int)] * 6)
    score("lives of row 0 must be integers", lives=[np.ones(len(t), bool) for t in tokens])
    score(r"row 0 must lie in \[0, 3\].* 4 to 4", lives=[one + 1 for one in full])
    score(r"fastv can have an average of 6 to 16 .* got 2", reducer=rule, average=2)
    score("places need sizes", places=[np.arange(len(t)) for t in tokens])
    bad = [np.arange(len(t)) + 1 for t in tokens]
    score(r"places of row 0 must lie in \[0, 15\]", places=bad, sizes=[len(t) for t in tokens])
    first = Prompt((1, 7, 8, 4, 6), (3,), (1, 3))
    with pytest.raises(ValueError, match="question_rows needs the image before the question"):
        lvlm.reduce([first], [torch.zeros(NUM_TOKENS, 48)], QuestionRows())
    with pytest.raises(ValueError, match="fastv before layer 0, 4 kept looks at the layer below"):
        lvlm.reduce(prompts, tokens, OneCut(rule, 0, 4))
    assert lvlm.reduce([], [], rule) == [] and lvlm.score([], [], []).lives is None
