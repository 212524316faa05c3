"""Tower signals on request are those of the tower's own attention, and runs of it are its own."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers.lvlm_fixtures import pictures, save_llava
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.loading.signals import TowerSignals
from tprl_env.reducers import PruneInputs, make_reducer

BLOCKS = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        initializer_factor=8.0,
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def eager(model):
    model.set_attn_implementation("eager")
    found = model(pixels(), output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    return found


def pixels():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def signals(model):
    projector = torch.nn.Identity()
    projector.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    return TowerSignals(model, projector, pixels(), [-2], True, -2)


@pytest.mark.parametrize("number", range(BLOCKS))
def test_attention_of_every_block_equals_eager(model, eager, number):
    view, wanted = signals(model).block(number), eager.attentions[number][0]
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(view.attention(), wanted, **close)
    torch.testing.assert_close(view.cls_attention(), wanted[:, 0, 1:], **close)
    torch.testing.assert_close(view.patch_attention(), wanted.mean((0, 1))[1:], **close)
    again = signals(model).block(number - BLOCKS)
    assert torch.equal(again.key, view.key)


def test_keys_are_the_projections_of_the_block(model, eager):
    layer = getattr(model, "vision_model", model).encoder.layers[2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(eager.hidden_states[2]))[0]
    view = signals(model).block(2)
    torch.testing.assert_close(view.full_width("key"), keys, rtol=1e-4, atol=1e-5)
    mean = keys.view(17, 2, 8).mean(1)[1:]
    torch.testing.assert_close(view.mean_keys(), mean, rtol=1e-4, atol=1e-5)


def test_a_run_in_which_nothing_happens_makes_the_features(model, eager):
    seen = []

    def step(number, view, states):
        seen.append(number)
        return states, torch.zeros(len(states))

    vision = signals(model)
    torch.testing.assert_close(vision.run(step), eager.hidden_states[-2][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vision.features(), eager.hidden_states[-2][0], rtol=1e-4, atol=1e-4)
    assert seen == [0, 1, 2] and vision.last_block == vision.cls_block == 2


def test_a_key_of_weight_minus_infinity_is_as_good_as_gone(model):
    gone, masked = signals(model), signals(model)
    bias = torch.zeros(17)
    bias[5] = -torch.inf
    alive = torch.arange(17) != 5
    one = gone.run(
        lambda number, view, states: (states[alive] if len(states) == 17 else states, None)
    )
    two = masked.run(lambda number, view, states: (states, bias))
    torch.testing.assert_close(one, two[alive], rtol=1e-4, atol=1e-5)


def test_unknown_blocks_and_several_feature_layers_are_refused(model):
    with pytest.raises(ValueError, match="blocks 0 to 3, got 4"):
        signals(model).block(4)
    several = TowerSignals(model, None, pixels(), [-3, -2], True, -2)
    with pytest.raises(ValueError, match="features of one layer"):
        several.run(lambda number, view, states: (states, None))
    blind = dataclasses.replace(signals(model).block(0), cls=False)
    with pytest.raises(ValueError, match="no CLS token; the authors of VisPruner"):
        blind.cls_attention()


def test_the_lvlm_offers_them(tmp_path):
    lvlm = load_lvlm(str(save_llava(tmp_path / "lvlm")))
    picture = pictures(1)[0]
    visual = lvlm.encode_images([picture])[0]
    vision = lvlm.vision_signals(picture)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(vision.features()[1:], visual.tower, **close)
    torch.testing.assert_close(vision.project(vision.features()[1:]), visual.tokens, **close)
    torch.testing.assert_close(lvlm.project(visual.tower), visual.tokens, **close)
    row = vision.block(vision.cls_block).cls_attention().mean(0)
    torch.testing.assert_close(row, visual.cls_attention, **close)
    inputs = PruneInputs(tokens=visual.tokens, grid=visual.grid, vision=vision)
    for name in ("tome", "flowcut", "visionzip", "prumerge", "prumerge_plus"):
        merged = make_reducer(name).merge(inputs, 8)
        assert merged.tokens.shape == (8, 48) and np.isfinite(merged.tokens.numpy()).all()
