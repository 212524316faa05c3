"""Tokens that leave between layers, against the library's own pass and a full-length reference."""

from __future__ import annotations

import pytest
import torch
from full_length import KINDS, FullLength, random_model
from transformers import DynamicCache

from tprl_env.lvlm.execution.attention import IMPLEMENTATION
from tprl_env.lvlm.execution.decoder import states_at
from tprl_env.lvlm.execution.layerwise import (
    Replay,
    Stream,
    decode_step,
    greedy_with_cuts,
    run_with_cuts,
    states_with_cuts,
)

torch.set_num_threads(1)
LAYERS, VISUAL, STEPS = 5, 12, 8
SHAPES = ((3, 5), (2, 9))  # text before and behind the image, two rows
TOLERANCE = 3e-5


@pytest.fixture(scope="module", params=sorted(KINDS))
def models(request):
    """The probed fused attention, and the same weights with eager attention."""
    return random_model(request.param, IMPLEMENTATION), random_model(request.param, "eager")


def stream_of(model, seed=0):
    """Two sequences of different lengths, right-padded, with 12 visual tokens each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([before + VISUAL + behind for before, behind in SHAPES])
    size = int(lengths.max())
    hidden = model.model.embed_tokens(torch.randint(3, 40, (2, size), generator=generator))
    image = torch.full((2, size), -1)
    for row, (before, _) in enumerate(SHAPES):
        visual = torch.randn(VISUAL, hidden.shape[-1], generator=generator)
        hidden[row, before : before + VISUAL] = visual
        image[row, before : before + VISUAL] = torch.arange(VISUAL)
    positions = torch.arange(size).expand(2, size)
    return Stream(hidden, positions, lengths, image)


def random_lives(seed):
    return torch.randint(0, LAYERS + 1, (2, VISUAL), generator=torch.Generator().manual_seed(seed))


def lives_rule(image, lives):
    """For the reference: what enters a layer by an array of lifetimes."""
    padded = torch.cat([lives, torch.tensor([99])])
    until = padded[image]  # text, -1, takes the last entry
    return lambda layer, alive, weights: until > layer


NOTHING = Replay(torch.full((2, VISUAL), LAYERS), LAYERS, False)


@torch.inference_mode()
def test_without_cuts_it_is_the_models_own_forward(models):
    model, plain = models
    stream = stream_of(model)
    cache = DynamicCache(config=model.config)
    found, segments = run_with_cuts(model.model, stream, NOTHING, LAYERS, cache)
    logits = model.lm_head(model.model.norm(found.hidden))
    own = DynamicCache(config=plain.config)
    expected = plain(
        inputs_embeds=stream.hidden, attention_mask=stream.valid.long(), past_key_values=own
    ).logits
    for row, length in enumerate(stream.lengths.tolist()):
        torch.testing.assert_close(
            logits[row, :length], expected[row, :length], atol=TOLERANCE, rtol=0
        )
        for mine, theirs in zip(cache, own, strict=True):
            for one, other in zip(mine[:2], theirs[:2], strict=True):
                torch.testing.assert_close(
                    one[row, :, :length], other[row, :, :length], atol=TOLERANCE, rtol=0
                )
    assert [segment.layers for segment in segments] == [range(LAYERS)]


@torch.inference_mode()
def test_without_cuts_it_writes_what_generate_writes(models):
    model, plain = models
    stream = stream_of(model)
    written = greedy_with_cuts(model.model, model.lm_head.weight, stream, NOTHING, (2,), 8)
    for row, length in enumerate(stream.lengths.tolist()):
        ids = plain.generate(
            inputs_embeds=stream.hidden[row : row + 1, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
        )[0].tolist()
        assert written[row] == (ids[: ids.index(2)] if 2 in ids else ids)


@pytest.mark.parametrize("contiguous", [False, True], ids=["original", "contiguous"])
@pytest.mark.parametrize("seed", [1, 2])
@torch.inference_mode()
def test_prefill_and_eight_decoding_steps_equal_the_full_length_reference(models, contiguous, seed):
    model, plain = models
    stream, lives = stream_of(model), random_lives(seed)
    replay = Replay(lives, LAYERS, contiguous)
    assert replay.layers == list(range(1, LAYERS))
    start = stream.take((stream.image < 0) | (lives.gather(1, stream.image.clamp(min=0)) > 0))
    start = start.repacked() if contiguous else start
    cache = DynamicCache(config=model.config)
    end, segments = run_with_cuts(model.model, start, replay, LAYERS, cache)
    lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    states = model.model.norm(end.hidden[torch.arange(2), end.lengths - 1])
    written: list[torch.Tensor] = []
    for _ in range(STEPS + 1):
        logits = model.lm_head(states)
        for row, length in enumerate(stream.lengths.tolist()):
            embeds = stream.hidden[row, :length]
            image = stream.image[row, :length]
            if written:
                more = plain.model.embed_tokens(torch.stack(written)[:, row])
                embeds = torch.cat([embeds, more])
                image = torch.cat([image, torch.full((len(written),), -1)])
            reference = FullLength(plain, image, contiguous)
            expected = reference.logits(embeds, lives_rule(image, lives[row]))[-1]
            torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)
        written.append(logits.argmax(-1))
        states = decode_step(model.model, written[-1], segments, cache)


@torch.inference_mode()
def test_the_reference_can_tell(models):
    """Closed-up positions are not original ones, and one lifetime more is not the same."""
    model, plain = models
    stream, lives = stream_of(model), random_lives(1)
    length = int(stream.lengths[0])
    embeds, image = stream.hidden[0, :length], stream.image[0, :length]

    def logits(contiguous, lives):
        reference = FullLength(plain, image, contiguous)
        return reference.logits(embeds, lives_rule(image, lives))[-1]

    gaps = logits(False, lives[0])
    assert (gaps - logits(True, lives[0])).abs().max() > 100 * TOLERANCE
    changed = lives[0].clone()
    changed[changed.argmin()] += 1
    assert (gaps - logits(False, changed)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
@torch.inference_mode()
def test_states_for_scoring_take_the_short_last_layer_in_any_case(models, layer):
    model, _ = models
    stream = stream_of(model)
    lives = torch.where(random_lives(3) > 2, LAYERS, layer)
    if layer == 0:
        stream = stream.take((stream.image < 0) | (lives.gather(1, stream.image.clamp(min=0)) > 0))
    replay = Replay(lives, LAYERS, False)
    from_end = torch.tensor([[3, 2, 1], [2, 1, 1]])
    calls = []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(
        lambda _, given: calls.append(tuple(given[0].shape))
    )
    states = states_with_cuts(model.model, stream, replay, from_end)
    hook.remove()
    assert [shape[:2] for shape in calls] == [(2, 3)]
    end, _ = run_with_cuts(model.model, stream, replay, LAYERS)
    places = end.lengths[:, None] - from_end
    expected = model.model.norm(end.hidden)[torch.arange(2)[:, None], places]
    torch.testing.assert_close(states, expected, atol=TOLERANCE, rtol=0)
    if layer == 0:
        same = states_at(model.model, stream.hidden, stream.positions, places)
        torch.testing.assert_close(states, same, atol=0, rtol=0)


def test_a_stream_carries_three_axes_and_additions_behind_layers():
    """What the families with M-RoPE and DeepStack need: gathered with the same index."""
    hidden = torch.arange(2 * 6 * 4).view(2, 6, 4).float()
    axes = torch.stack([torch.arange(12).view(2, 6) + 100 * axis for axis in range(3)])
    image = torch.tensor([[-1, 0, 1, 2, -1, -1], [-1, 0, 1, 2, -1, -1]])
    stream = Stream(hidden, axes, torch.tensor([6, 5]), image, (hidden * 10, hidden * 100))
    keep = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]]).bool()
    taken = stream.take(keep)
    assert taken.lengths.tolist() == [5, 3]  # the last place of row 1 was padding
    assert taken.positions.shape == (3, 2, 5)
    assert taken.positions[1, 0].tolist() == [100, 102, 103, 104, 105]
    assert taken.image[1, :3].tolist() == [-1, 2, -1]
    torch.testing.assert_close(taken.hidden[0], hidden[0, [0, 2, 3, 4, 5]])
    for one, factor in zip(taken.deep, (10, 100), strict=True):
        torch.testing.assert_close(one, taken.hidden * factor)
    assert taken.next_positions().tolist() == [[[206], [211]]] * 3
    assert taken.repacked().positions.shape == (3, 2, 5)
    moved = stream.take(keep, torch.tensor([[0, 0, 1, 0, 0, 0]] * 2).bool())
    assert moved.image[0].tolist() == [-1, 2, 1, -1, -1]


@torch.inference_mode()
def test_additions_behind_layers_are_added(models):
    model, _ = models
    stream = stream_of(model)
    deep = (torch.randn_like(stream.hidden), torch.randn_like(stream.hidden))
    with_deep = Stream(stream.hidden, stream.positions, stream.lengths, stream.image, deep)
    found, _ = run_with_cuts(model.model, with_deep, NOTHING, LAYERS)
    hidden = stream.hidden
    rotary = model.model.rotary_emb(hidden, position_ids=stream.positions)
    for number, layer in enumerate(model.model.layers):
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        hidden = hidden + deep[number] if number < 2 else hidden
    torch.testing.assert_close(found.hidden, hidden, atol=0, rtol=0)
