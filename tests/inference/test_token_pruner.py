"""Pruned inputs for plain models of every family: what the model makes of them.

Checkpoints have random weights in exactly the published format; see ``lvlm.tiny.families``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from processed import GROUPS, QUESTIONS, Checkpoint
from transformers import TextIteratorStreamer

from tprl_env.inference import TokenPruner
from tprl_env.lvlm.processed.placing import PLACES
from tprl_env.reducers import make_reducer

FAMILIES = ("llava", "llava_siglip_qwen2", "llava_next", "llava_onevision", "qwen2_vl",
            "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")  # fmt: skip
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


PRUNER = TokenPruner(make_reducer("divprune"))


def test_keeping_all_is_the_unpruned_model(case: Checkpoint) -> None:
    inputs = case.inputs()
    pruned = PRUNER.prune(case.model, inputs, 1.0)
    assert all(keep.all() for keep in pruned.keep)
    assert torch.equal(pruned["input_ids"][inputs["attention_mask"] == 1],
                       inputs["input_ids"][inputs["attention_mask"] == 1])  # fmt: skip
    torch.testing.assert_close(
        case.logits(pruned), case.logits(inputs), atol=TOLERANCE, rtol=TOLERANCE
    )
    assert torch.equal(case.write(pruned), case.write(inputs))


def test_pruned_is_masked_attention_at_full_length(case: Checkpoint) -> None:
    inputs = case.inputs()
    pruned = PRUNER.prune(case.model, inputs, 0.4)
    wanted = case.masked_logits(inputs, pruned.keep)
    found = case.logits(pruned)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    closed = (pruned["attention_mask"].cumsum(1) - 1).clamp(min=0)
    wrong = {**pruned, "position_ids": closed.expand_as(pruned["position_ids"])}
    assert (case.logits(wrong) - wanted).abs().max() > 100 * TOLERANCE
    full = case.logits(inputs)
    assert (found[-1] - full[-1]).abs().max() > 100 * TOLERANCE, "dropping tokens changes nothing"


def test_a_budget_is_of_the_droppable_tokens_of_a_prompt_or_of_each_picture(
    case: Checkpoint,
) -> None:
    inputs = case.inputs()
    fixed = [
        0 if v.placement is None else int((~v.placement.droppable).sum()) for v in case.visuals
    ]
    number = [len(v.tokens) - gone for v, gone in zip(case.visuals, fixed, strict=True)]
    together = [number[0], number[1] + number[2]]
    always = [fixed[0], fixed[1] + fixed[2]]
    share = PRUNER.prune(case.model, inputs, 0.5)
    assert share.counts == [int(n / 2 + 0.5) + a for n, a in zip(together, always, strict=True)]
    count = PRUNER.prune(case.model, inputs, 3)
    assert count.counts == [3 + a for a in always]
    each = PRUNER.prune(case.model, inputs, 3, per_picture=True)
    assert each.counts == [3 + always[0], 6 + always[1]]
    assert [int(keep.sum()) for keep in each.keep] == each.counts
    assert (each["input_ids"] == case.model.config.image_token_id).sum(1).tolist() == each.counts
    assert PRUNER.prune(case.model, inputs, 10_000).counts == [
        n + a for n, a in zip(together, always, strict=True)
    ]


def test_a_batch_is_its_prompts_one_by_one(case: Checkpoint) -> None:
    both = case.write(PRUNER.prune(case.model, case.inputs(), 0.4))
    right = case.write(PRUNER.prune(case.model, case.inputs(left=False), 0.4))
    assert torch.equal(both, right)  # padding is always on the left afterwards
    for row in range(2):
        alone = case.inputs((GROUPS[row],), (QUESTIONS[row],))
        assert torch.equal(case.write(PRUNER.prune(case.model, alone, 0.4))[0], both[row])


def test_several_sequences_per_prompt_see_their_own_tokens(case: Checkpoint) -> None:
    pruned = PRUNER.prune(case.model, case.inputs(), 0.4)
    single = case.write(pruned, 5)
    how = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    for _ in range(2):  # the same object serves any number of calls
        double = case.write(pruned, 5, **how)
        assert torch.equal(double, single.repeat_interleave(2, 0))
    beams = case.write(pruned, 5, num_beams=2)
    for row in range(2):
        alone = case.inputs((GROUPS[row],), (QUESTIONS[row],))
        one = case.write(PRUNER.prune(case.model, alone, 0.4), 5, num_beams=2)
        assert torch.equal(one[0], beams[row])


def test_sampling_with_a_seed_is_that_of_the_unpruned_model(case: Checkpoint) -> None:
    inputs = case.inputs()

    def draw(given: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return case.write(given, 6, do_sample=True, temperature=2.0)

    assert torch.equal(draw(PRUNER.prune(case.model, inputs, 1.0)), draw(inputs))


def test_a_streamer_gets_the_answer(case: Checkpoint) -> None:
    words: Any = case.lvlm._prompter._tokenizer
    pruned = PRUNER.prune(case.model, case.inputs(GROUPS[:1], QUESTIONS[:1]), 0.3)
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    written = case.write(pruned, 4, streamer=streamer)
    assert "".join(streamer) == words.decode(written[0])


def test_no_token_at_all_may_be_kept(case: Checkpoint) -> None:
    inputs = case.inputs()
    pruned = PRUNER.prune(case.model, inputs, 0)
    wanted = case.masked_logits(inputs, pruned.keep)
    torch.testing.assert_close(case.logits(pruned), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert case.write(pruned, 3).shape == (2, 3)
    assert case.write(pruned, 3, num_beams=2).shape == (2, 3)
    tiles = case.name in ("llava_next", "llava_onevision")
    assert (sum(pruned.counts) > 0) == tiles == ("mm_encoder_outputs" in pruned)


def test_the_model_is_as_it_was(case: Checkpoint) -> None:
    inputs = case.inputs()
    before = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
    wanted, classes = case.logits(inputs), [type(m) for m in case.model.modules()]
    PRUNER.prune(case.model, inputs, 0.4)
    assert torch.equal(case.logits(inputs), wanted)
    assert [type(m) for m in case.model.modules()] == classes
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_every_family_is_tested_here() -> None:
    assert set(PLACES) - {"idefics3"} <= set(FAMILIES)  # SmolVLM's classes under another name


def test_placements_are_those_of_the_pictures(case: Checkpoint) -> None:
    from tprl_env.lvlm.processed.reading import read

    first, second = read(case.model, case.inputs())
    for visual, placed in zip(
        case.visuals, (*first.pictures.placements, *second.pictures.placements), strict=True
    ):
        if visual.placement is None:
            assert (placed.coords[:, 0] == 0).all() and len(placed.coords) == np.prod(visual.grid)
            continue
        np.testing.assert_array_equal(placed.coords, visual.placement.coords)
        if case.name != "internvl":
            np.testing.assert_allclose(placed.areas(), visual.placement.areas(), atol=1e-6)
    known = [one.pictures.areas_known for one in (first, second)]
    assert known == ([False, False] if case.name == "internvl" else [True, True])
    tokens = torch.cat([one.tokens for one in (first, second)])
    wanted = torch.cat([visual.tokens for visual in case.visuals])
    torch.testing.assert_close(tokens, wanted, atol=1e-4, rtol=1e-4)
