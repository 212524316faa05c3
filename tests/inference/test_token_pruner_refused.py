"""What cannot be pruned is refused with a cure; what a policy sees in processed inputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from processed import GROUPS, QUESTIONS, Checkpoint

from tprl_env.inference import PrunedLVLM, TokenPruner
from tprl_env.lvlm.processed.question import QuestionFrame
from tprl_env.policy import PolicyConfig, PolicyPruner, PruningPolicy, TokenAutoencoder
from tprl_env.policy.autoencoder import AutoencoderConfig
from tprl_env.reducers import make_reducer

PRUNER = TokenPruner(make_reducer("divprune"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("budget", [-1, 1.5, 0.0, -0.2, True, "0.2", float("nan"), None])
def test_budgets_out_of_range_are_refused(llava: Checkpoint, budget: Any) -> None:
    sentence = "no default budget" if budget is None else "a count of visual tokens .* or a share"
    with pytest.raises(ValueError, match=sentence):
        PRUNER.prune(llava.model, llava.inputs(), budget)
    if budget is not None:
        with pytest.raises(ValueError, match=sentence):
            TokenPruner(make_reducer("divprune"), budget=budget)


def without(inputs: dict[str, Any], name: str) -> dict[str, Any]:
    return {one: value for one, value in inputs.items() if one != name}


def cut(inputs: dict[str, Any], name: str, stop: int) -> dict[str, Any]:
    return {**inputs, name: inputs[name][:stop]}


CHANGES = {
    "there is no pixel_values among the inputs": lambda x: without(x, "pixel_values"),
    "there is no input_ids": lambda x: without(x, "input_ids"),
    "videos are not pruned yet, got pixel_values_videos": lambda x: {
        **x, "pixel_values_videos": x["pixel_values"]
    },
    "does not know the inputs inputs_embeds": lambda x: {**x, "inputs_embeds": x["pixel_values"]},
    r"return_tensors='pt'": lambda x: {**x, "input_ids": x["input_ids"].tolist()},
    r"have \[16, 32\] image placeholders, 48 together, but the pictures make 32": lambda x: cut(
        x, "pixel_values", 2
    ),
    r"have \[0, 0\] image placeholders": lambda x: {**x, "input_ids": x["input_ids"] * 0 + 50},
    "unbroken stretch": lambda x: {
        **x, "attention_mask": torch.arange(x["input_ids"].shape[1])[None].expand(2, -1) % 2
    },
    "attention_mask must be a tensor of the shape of input_ids": lambda x: {
        **x, "attention_mask": x["attention_mask"][:, None, None]
    },
    r"input_ids must have shape \(batch, places\)": lambda x: {**x, "input_ids": x["input_ids"][0]},
}  # fmt: skip


@pytest.mark.parametrize("sentence", CHANGES)
def test_inputs_that_do_not_fit_are_refused(llava: Checkpoint, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PRUNER.prune(llava.model, CHANGES[sentence](llava.inputs()), 4)


def test_the_prompt_whose_pictures_do_not_fit_is_named(llava: Checkpoint) -> None:
    inputs = llava.inputs()
    ids, image = inputs["input_ids"], llava.model.config.image_token_id
    first, second = (torch.nonzero(row == image)[0, 0] for row in ids)
    ids[0, first], ids[1, second - 2] = 50, image
    with pytest.raises(ValueError, match=r"prompt 0 has 15 image placeholders, .*\[16\] visual"):
        PRUNER.prune(llava.model, inputs, 4)


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), "llava", None])
def test_what_is_no_model_of_a_known_family_is_refused(model: Any, llava: Checkpoint) -> None:
    with pytest.raises(ValueError, match="prune takes a model such as AutoModelForImageTextToText"):
        PRUNER.prune(model, llava.inputs(), 4)
    near = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_v"), lm_head=None)
    with pytest.raises(ValueError, match=r"did you mean 'qwen2_5_vl'\?"):
        PRUNER.prune(near, llava.inputs(), 4)


@pytest.mark.parametrize("name", ["fastv", "question_attention", "question_rows", "oracle"])
def test_reducers_that_need_the_language_model_or_labels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"PrunedLVLM\(lvlm, reducer\)|labels"):
        TokenPruner(make_reducer(name))


def test_methods_that_look_into_the_tower_work_on_llava(llava: Checkpoint) -> None:
    for name in ("cls_attention", "vispruner", "visionzip", "tome"):
        reducer = make_reducer(name)
        pruned = TokenPruner(reducer).prune(llava.model, llava.inputs(), 5, per_picture=True)
        assert pruned.counts == [5, 10], name
        answers = PrunedLVLM(llava.lvlm, reducer, positions="original").answer_batch(
            llava.pictures[:1], [QUESTIONS[0]], 5, max_new_tokens=4
        )
        assert pruned.keep[0].tolist() == answers[0].keep.tolist(), name
        one = llava.inputs(GROUPS[:1], QUESTIONS[:1])
        same = TokenPruner(reducer, positions="original").prune(llava.model, one, 5)
        written = llava.model.generate(**same, max_new_tokens=4, do_sample=False)
        new = written[0, same["input_ids"].shape[1] :].tolist()
        assert llava.lvlm._prompter.decode(new) == answers[0].text, name
    with pytest.raises(ValueError, match="a prompt has 2; pass per_picture=True"):
        TokenPruner(make_reducer("tome")).prune(llava.model, llava.inputs(), 5)


@pytest.fixture(scope="module", params=["llava_next", "qwen3_vl", "smolvlm", "internvl"])
def placed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def random_policy(lvlm: Any, coordinates: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    config = PolicyConfig.question_aware(8, lvlm.query_width, coordinates=coordinates)
    autoencoder = TokenAutoencoder(AutoencoderConfig(lvlm.token_width, 8)).eval()
    return {"reducer": PolicyPruner(PruningPolicy(config)), "autoencoder": autoencoder}


@pytest.mark.parametrize("coordinates", [False, True])
def test_a_policy_sees_what_it_sees_from_picture_and_question(
    placed: Checkpoint, coordinates: bool
) -> None:
    parts = random_policy(placed.lvlm, coordinates)
    pruner = TokenPruner(**parts, question=QuestionFrame.of(placed.lvlm))
    groups, inputs = ([0], [2]), placed.inputs(([0], [2]))
    if coordinates and placed.name == "internvl":
        with pytest.raises(ValueError, match=r"internvl does not say how it cut .*PrunedLVLM"):
            pruner.prune(placed.model, inputs, 4)
        return
    pruned = pruner.prune(placed.model, inputs, 4)
    answers = PrunedLVLM(placed.lvlm, **parts).answer_batch(
        [placed.pictures[group[0]] for group in groups], list(QUESTIONS), 4, max_new_tokens=1
    )
    for keep, answer, group in zip(pruned.keep, answers, groups, strict=True):
        shown = placed.visuals[group[0]].placement.droppable
        assert keep[shown].tolist() == answer.keep.tolist() and keep[~shown].all()
    assert len({tuple(np.flatnonzero(keep)) for keep in pruned.keep}) == 2


def test_towers_other_than_llavas_are_refused(placed: Checkpoint) -> None:
    with pytest.raises(ValueError, match=f"model_type 'llava'; this one is '{placed.name}'"):
        TokenPruner(make_reducer("cls_attention")).prune(placed.model, placed.inputs(), 4)


def test_several_pictures_of_llava_onevision_are_not_cut_into_tiles(tmp_path: Path) -> None:
    from PIL import Image

    case = Checkpoint("llava_onevision", tmp_path)
    pictures = [[Image.fromarray(one) for one in case.pictures[1:]]]
    made = case.images(images=pictures, return_tensors="pt")
    image = case.model.config.image_token_id
    ids = torch.tensor([[40, *[image] * 17, 41, *[image] * 17, 42, 43]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
    assert made["batch_num_images"].tolist() == [2]
    pruned = PRUNER.prune(case.model, inputs, 0.5)
    assert pruned.counts == [18] and pruned.keep[0][[16, 33]].all()
    whole = PRUNER.prune(case.model, inputs, 1.0)
    torch.testing.assert_close(case.logits(whole), case.logits(inputs), atol=2e-4, rtol=2e-4)


def test_labels_and_own_positions_are_pruned_along(llava: Checkpoint) -> None:
    inputs = llava.inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs |= {"labels": labels, "position_ids": llava.positions(inputs) + 2}
    pruned = PRUNER.prune(llava.model, inputs, 3)
    seen = pruned["attention_mask"] == 1
    assert torch.equal(pruned["labels"][seen], pruned["input_ids"][seen])
    assert (pruned["labels"][~seen] == -100).all()
    text = pruned["input_ids"] != llava.model.config.image_token_id
    for row in range(2):
        whole = inputs["attention_mask"][row] == 1
        full = inputs["position_ids"][row][
            whole & (labels[row] != llava.model.config.image_token_id)
        ]
        assert pruned["position_ids"][row][seen[row] & text[row]].min() == full.min() == 2
    loss = llava.model(**pruned).loss
    assert torch.isfinite(loss)


def test_pruned_inputs_move_together(llava: Checkpoint) -> None:
    pruned = PRUNER.prune(llava.model, llava.inputs(), 3)
    moved = pruned.to("cpu", dtype=torch.bfloat16)
    assert moved["input_ids"].dtype == torch.int64
    first = moved["mm_encoder_outputs"]["image"].pooler_output[0]
    assert first.dtype == torch.bfloat16 and moved.counts == pruned.counts
    assert set(pruned) == {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs"}
