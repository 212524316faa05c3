"""Every family against the library's own model: prompts, positions, tokens, scores, texts.

Checkpoints have random weights in exactly the published format; see ``lvlm.tiny.families``.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tprl_env.lvlm import FAMILIES, load_lvlm
from tprl_env.lvlm.families.library import LIBRARY_FAMILIES
from tprl_env.lvlm.tiny.families import RANDOM_FAMILIES, Sizes, save_random
from tprl_env.reducers import make_reducer

SIZES = ((40, 70), (28, 28), (90, 33))
TOLERANCE = 2e-4
QUESTIONS = ("what color is the 7 ?", "yes or no")
ANSWERS = ((40, 41, 42, 2), (43, 44, 2))


class Case:
    """A family's LVLM, the library's own model, and two prompts with one and two pictures."""

    def __init__(self, name: str, folder: Any) -> None:
        save_random(name, folder)
        self.name = name
        self.lvlm: Any = load_lvlm(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in SIZES]
        self.visuals = self.lvlm.encode_images(self.pictures)
        self.groups = ([0], [1, 2])
        of_rows = [[self.visuals[i] for i in group] for group in self.groups]
        self.prompts = [
            self.lvlm.prompt(question, row)
            for question, row in zip(QUESTIONS, of_rows, strict=True)
        ]
        self.tokens = [torch.cat([v.tokens for v in row]) for row in of_rows]
        rng = np.random.default_rng(5)
        self.keep = [rng.random(len(t)) < 0.4 for t in self.tokens]

    def expanded(self, row: int) -> list[int]:
        """The prompt's ids with every placeholder repeated as often as its run is long."""
        prompt = self.prompts[row]
        counts = [len(self.tokens[row])] if prompt.placement is None else prompt.placement.runs
        waiting = iter(counts)
        ids: list[int] = []
        for at, token in enumerate(prompt.ids):
            ids += [token] * (next(waiting) if at in prompt.visual_at else 1)
        return ids

    def library_inputs(self, row: int) -> dict[str, Any]:
        """What the library's own processor makes of the row's pictures and prompt."""
        from PIL import Image

        images = [Image.fromarray(self.pictures[i]) for i in self.groups[row]]
        nested = [images] if self.name == "smolvlm" else images
        prepared = self.lvlm._vision._image_processor(images=nested, return_tensors="pt")
        known = inspect.signature(self.model.base_model.get_image_features).parameters
        inputs = {name: value for name, value in prepared.items() if name in known}
        ids = torch.tensor([self.expanded(row)])
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if hasattr(self.model.base_model, "get_rope_index"):
            inputs["mm_token_type_ids"] = (ids == self.lvlm.image_token_id).int()
        return inputs

    def positions(self, row: int) -> torch.Tensor:
        """(A, S) rotary positions by the library."""
        inputs = self.library_inputs(row)
        if "mm_token_type_ids" not in inputs:
            return torch.arange(inputs["input_ids"].shape[1])[None]
        found: torch.Tensor = self.model.base_model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )[0][:, 0]
        return found

    def masked_likelihood(self, row: int, keep: np.ndarray, answer: tuple[int, ...]) -> float:
        """Probability of an answer where nobody sees the dropped tokens of the full prompt."""
        inputs = self.library_inputs(row)
        count = inputs["input_ids"].shape[1]
        suffix = torch.tensor([answer[:-1]])
        ids = torch.cat([inputs["input_ids"], suffix], 1)
        stay = torch.ones(ids.shape[1], dtype=torch.bool)
        image = ids[0] == self.lvlm.image_token_id
        stay[image] = torch.from_numpy(keep)
        mask = torch.ones(len(stay), len(stay), dtype=torch.bool).tril() & stay
        mask |= torch.eye(len(stay), dtype=torch.bool)
        where = self.positions(row)
        more = where[:, -1:] + 1 + torch.arange(suffix.shape[1])
        where = torch.cat([where, more], 1)
        pixels = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in pixels:
            pixels["mm_token_type_ids"] = image.int()[None]
        with torch.no_grad():
            logits = self.model(
                input_ids=ids,
                attention_mask=mask[None, None],
                position_ids=where[:, None] if len(where) > 1 else where,
                **pixels,
            ).logits[0]
        log_p = logits[count - 1 :].log_softmax(-1)
        return float(sum(log_p[i, token] for i, token in enumerate(answer)))


@pytest.fixture(scope="module", params=list(RANDOM_FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def log_likelihoods(case: Case, **how: Any) -> np.ndarray:
    scores = case.lvlm.score(case.prompts, [[a] for a in ANSWERS], case.tokens, **how)
    return np.log(scores.likelihood)


def test_positions_are_the_librarys_own(case: Case) -> None:
    from tprl_env.lvlm.execution.sequence import layout

    counts = [len(t) for t in case.tokens]
    plan = layout(case.prompts, [(), ()], counts, None, "original")
    for row in range(2):
        wanted = case.positions(row).numpy()
        length = wanted.shape[1]
        assert plan.lengths[row] == length == len(case.expanded(row))
        assert (np.atleast_3d(plan.positions.T).T[:, row, :length] == wanted).all()


def test_tokens_are_those_of_the_joint_call(case: Case) -> None:
    inputs = case.library_inputs(1)
    known = inspect.signature(case.model.base_model.get_image_features).parameters
    pixels = {n: v for n, v in inputs.items() if n in known}
    with torch.no_grad():
        found = case.model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    width = found[0].shape[-1]
    joint = torch.cat([part.reshape(-1, width) for part in found])
    torch.testing.assert_close(case.tokens[1][:, :width], joint, atol=1e-4, rtol=1e-4)
    spread = joint.std(0).mean()
    assert spread > 1e-3, "the checkpoint's visual tokens are all alike, the tests prove nothing"


def test_keep_all_is_the_unpruned_model(case: Case) -> None:
    everything = [np.ones(len(t), bool) for t in case.tokens]
    wanted = [case.masked_likelihood(r, everything[r], ANSWERS[r]) for r in range(2)]
    np.testing.assert_allclose(log_likelihoods(case), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(log_likelihoods(case, keep=everything), wanted, atol=TOLERANCE)


def test_pruned_is_masked_attention_over_the_full_prompt(case: Case) -> None:
    wanted = [case.masked_likelihood(r, case.keep[r], ANSWERS[r]) for r in range(2)]
    np.testing.assert_allclose(log_likelihoods(case, keep=case.keep), wanted, atol=TOLERANCE)
    closed = log_likelihoods(case, keep=case.keep, positions="contiguous")
    assert np.abs(closed - wanted).max() > 0.01, "positions make no difference here"


def test_generated_text_is_the_librarys(case: Case) -> None:
    written = case.lvlm.generate_ids(case.prompts, case.tokens, max_new_tokens=8)
    for row in range(2):
        inputs = case.library_inputs(row)
        with torch.no_grad():
            ids = case.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        wanted = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert written[row] == (wanted[: wanted.index(2)] if 2 in wanted else wanted)


def test_no_token_at_all_can_be_kept(case: Case) -> None:
    none = [np.zeros(len(t), bool) for t in case.tokens]
    wanted = [case.masked_likelihood(r, none[r], ANSWERS[r]) for r in range(2)]
    np.testing.assert_allclose(log_likelihoods(case, keep=none), wanted, atol=TOLERANCE)
    assert len(case.lvlm.generate(case.prompts, case.tokens, keep=none, max_new_tokens=3)) == 2


def test_teacher_forcing_says_what_greedy_decoding_writes(case: Case) -> None:
    rng = np.random.default_rng(1)
    keeps = [rng.random(len(case.tokens[i % 2])) < rng.random() for i in range(20)]
    prompts = [case.prompts[i % 2] for i in range(20)]
    tokens = [case.tokens[i % 2] for i in range(20)]
    written = case.lvlm.generate_ids(prompts, tokens, keep=keeps, max_new_tokens=4)
    answers = [[(*ids, 2)] if len(ids) < 4 else [tuple(ids)] for ids in written]
    usable = [i for i, row in enumerate(answers) if row[0]]
    scores = case.lvlm.score(
        [prompts[i] for i in usable],
        [answers[i] for i in usable],
        [tokens[i] for i in usable],
        keep=[keeps[i] for i in usable],
    )
    assert (scores.exact == 1).all()
    other = [[(*row[0][:-1], 50 if row[0][-1] != 50 else 51)] for row in answers]
    wrong = case.lvlm.score(
        [prompts[i] for i in usable],
        [other[i] for i in usable],
        [tokens[i] for i in usable],
        keep=[keeps[i] for i in usable],
    )
    assert (wrong.exact == 0).all()


def test_layer_by_layer_equals_one_mask_per_layer(case: Case) -> None:
    depth = case.lvlm.num_layers
    rng = np.random.default_rng(2)
    lives = [rng.integers(0, depth + 1, len(t)).astype(np.uint8) for t in case.tokens]
    whole = [np.where(k, depth, 0).astype(np.uint8) for k in case.keep]
    np.testing.assert_allclose(
        log_likelihoods(case, lives=whole), log_likelihoods(case, keep=case.keep), atol=TOLERANCE
    )
    wanted = [per_layer_reference(case, row, lives[row]) for row in range(2)]
    np.testing.assert_allclose(log_likelihoods(case, lives=lives), wanted, atol=TOLERANCE)


def per_layer_reference(case: Case, row: int, lives: np.ndarray) -> float:
    """The library's layers over the full prompt, with a mask of its own for each layer."""
    text = (
        getattr(case.model.base_model, "language_model", None) or case.model.base_model.text_model
    )
    answer = ANSWERS[row]
    ids = torch.tensor([[*case.expanded(row), *answer[:-1]]])
    image = ids[0] == case.lvlm.image_token_id
    with torch.no_grad():
        hidden = text.embed_tokens(ids).clone()
        width = hidden.shape[-1]
        hidden[0, image] = case.tokens[row][:, :width]
        deep = []
        for level in case.tokens[row].split(width, 1)[1:]:
            dense = torch.zeros_like(hidden)
            dense[0, image] = level
            deep.append(dense)
        where = case.positions(row)
        where = torch.cat([where, where[:, -1:] + 1 + torch.arange(len(answer) - 1)], 1)
        rotary = text.rotary_emb(hidden, position_ids=where[:, None] if len(where) > 1 else where)
        lived = torch.full((len(image),), len(text.layers))
        lived[image] = torch.from_numpy(lives.astype(np.int64))
        for number, layer in enumerate(text.layers):
            seen = torch.ones(len(image), len(image), dtype=torch.bool).tril() & (lived > number)
            seen |= torch.eye(len(image), dtype=torch.bool)
            hidden = layer(hidden, attention_mask=seen[None, None], position_embeddings=rotary)
            hidden = hidden + deep[number] if number < len(deep) else hidden
        logits = case.model.lm_head(text.norm(hidden))[0]
    log_p = logits[len(case.expanded(row)) - 1 :].log_softmax(-1)
    return float(sum(log_p[i, token] for i, token in enumerate(answer)))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "question_rows"])
def test_reducers_inside_equal_the_replay_of_what_they_dropped(case: Case, name: str) -> None:
    reducer: Any = make_reducer(name)
    average = 0.6 * min(len(t) for t in case.tokens)
    how = {"average": average} if name == "question_rows" else {}
    lives = case.lvlm.reduce(case.prompts, case.tokens, reducer, **how)
    assert any(0 < int(one.min()) < case.lvlm.num_layers for one in lives) or name != "fastv"
    positions = reducer.positions
    np.testing.assert_allclose(
        log_likelihoods(case, reducer=reducer, **how),
        log_likelihoods(case, lives=lives, positions=positions),
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "pact", "question_rows"])
def test_a_budget_is_about_tokens_that_show_the_picture(case: Case, name: str) -> None:
    reducer: Any = make_reducer(name)
    droppable = [
        prompt.droppable(len(tokens))
        for prompt, tokens in zip(case.prompts, case.tokens, strict=True)
    ]
    tiles = case.name in ("llava_next", "llava_onevision")
    assert all(one.all() for one in droppable) is not tiles, "only these have newlines"
    average = 0.6 * min(int(one.sum()) for one in droppable)
    how = {"average": average}
    lives = case.lvlm.reduce(case.prompts, case.tokens, reducer, **how)
    depth = case.lvlm.num_layers
    for row, shown in zip(lives, droppable, strict=True):
        assert (row[~shown] == depth).all()
        assert row[shown].min() < depth
        assert abs(row[shown].sum() / depth - average) < 1
    if not reducer.merges:
        positions = reducer.positions
        np.testing.assert_allclose(
            log_likelihoods(case, reducer=reducer, **how),
            log_likelihoods(case, lives=lives, positions=positions),
            atol=TOLERANCE,
        )


def test_saliency_is_zero_where_nothing_of_the_picture_is_shown(case: Case) -> None:
    rule: Any = make_reducer("question_rows")
    found = case.lvlm.saliency(case.prompts, case.tokens, rule)
    for values, prompt, tokens in zip(found, case.prompts, case.tokens, strict=True):
        assert values.shape == (len(tokens),)
        assert ((values > 0) == prompt.droppable(len(tokens))).all()


def test_prompts_made_without_their_pictures_are_refused(case: Case) -> None:
    tokens = [case.visuals[0].tokens]
    bare = [case.lvlm.prompt("yes or no")]
    runs = {
        "score": lambda: case.lvlm.score(bare, [[ANSWERS[0]]], tokens),
        "generate": lambda: case.lvlm.generate(bare, tokens, max_new_tokens=2),
        "reduce": lambda: case.lvlm.reduce(bare, tokens, make_reducer("fastv")),
        "question_attention": lambda: case.lvlm.question_attention(bare, tokens),
    }
    for run in runs.values():
        if case.lvlm.placed:
            with pytest.raises(ValueError, match="row 0: the prompt was made without its pictures"):
                run()
        else:
            run()
    assert case.lvlm.placed is not case.name.startswith("llava") or case.name in (
        "llava_next",
        "llava_onevision",
    )


def test_question_attention_is_that_of_the_library(case: Case) -> None:
    found = case.lvlm.question_attention(case.prompts, case.tokens)
    text = (
        getattr(case.model.base_model, "language_model", None) or case.model.base_model.text_model
    )
    before = text.config._attn_implementation
    text.set_attn_implementation("eager")
    try:
        for row, prompt in enumerate(case.prompts):
            with torch.no_grad():
                output = case.model(**case.library_inputs(row), output_attentions=True)
            image = np.array(case.expanded(row)) == case.lvlm.image_token_id
            shift = int(image.sum()) - len(prompt.visual_at)
            start, stop = (place + shift for place in prompt.question_span)
            rows = torch.stack([layer[0, :, start:stop] for layer in output.attentions])
            wanted = rows.amax((0, 1, 2))[torch.from_numpy(image)]
            np.testing.assert_allclose(found[row], wanted.numpy(), atol=1e-5)
    finally:
        text.set_attn_implementation(before)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gemma3", "sliding layers count places"),
        ("qwen3_5", "linear-attention layers"),
        ("mllama", "cross-attention"),
        ("qwen2_vll", r"did you mean 'qwen2_vl'\?"),
    ],
)
def test_relatives_are_refused_with_the_reason(kind: str, why: str, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"model_type '{kind}', which cannot be run.*{why}"):
        load_lvlm(tmp_path)


def test_the_pages_blocks_run_in_order(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "families.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert len(blocks) == 2 and len(names["prompt"].visual_at) == 2
    assert capsys.readouterr().out


def test_every_family_is_tested_here(tmp_path: Any) -> None:
    tested = {RANDOM_FAMILIES[name](Sizes())[0].config.model_type for name in RANDOM_FAMILIES}
    assert set(FAMILIES) - tested == {"idefics3"}  # SmolVLM's classes under another name
    assert set(LIBRARY_FAMILIES) | {"llava"} == set(FAMILIES)
