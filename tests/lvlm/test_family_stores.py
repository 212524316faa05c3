"""Stores of LVLMs whose tokens lie in tiles, on three axes or between newlines, to the end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tprl_env.cli.commands import main
from tprl_env.data import load_dataset
from tprl_env.data.features.manifest import StoreError, file_sha256
from tprl_env.data.features.store import FeatureStore
from tprl_env.env import TokenPruningEnv
from tprl_env.evaluation import evaluate_store
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.tiny.families import save_random
from tprl_env.reducers import make_pruner, make_reducer, prune_inputs
from tprl_env.scoring.lvlm_scorer import LVLMScorer

SIZES = ((40, 70), (28, 28), (90, 33))
QUESTIONS = ("what color is the 7 ?", "yes or no")
FAMILIES = ("qwen2_5_vl", "llava_next", "smolvlm")


class Case:
    """A random checkpoint, a dataset with pictures of three sizes, and its store."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        save_random(name, folder / "lvlm")
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in SIZES]
        lines = []
        for number, picture in enumerate(self.pictures):
            Image.fromarray(picture).save(folder / f"{number}.png")
            for turn, question in enumerate(QUESTIONS):
                lines.append(
                    {
                        **{"id": f"{number}-{turn}", "image": f"{number}.png"},
                        **{"question": question, "answers": ["yes"]},
                    }
                )
        (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        words = ["encode", "--data", folder / "data.jsonl", "--lvlm", folder / "lvlm"]
        assert main([str(word) for word in (*words, "--out", folder / "store")]) == 0
        self.lvlm: Any = load_lvlm(folder / "lvlm")
        self.store = FeatureStore.open(folder / "store", verify="checksums")

    def direct(self, keep: np.ndarray | None) -> np.ndarray:
        """Log-likelihoods by ``lvlm.score`` from the pictures, without the store."""
        prompts, tokens, masks = [], [], []
        for row in range(len(self.store)):
            (visual,) = self.lvlm.encode_images([self.pictures[row // 2]])
            prompts.append(self.lvlm.prompt(QUESTIONS[row % 2], [visual]))
            tokens.append(visual.tokens.half().float())
            shown = visual.placement.droppable
            mask = np.ones(len(shown), bool)
            if keep is not None:
                mask[shown] = keep[row, : shown.sum()]
            masks.append(mask)
        answers = [[self.lvlm.answer_ids(prompt, "yes")] for prompt in prompts]
        return np.log(self.lvlm.score(prompts, answers, tokens, masks).likelihood)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def random_masks(store: FeatureStore) -> np.ndarray:
    every = store.exists(np.arange(len(store)))
    return every & (np.random.default_rng(1).random(every.shape) < 0.5)


def test_scores_from_the_store_are_those_of_the_lvlm(case: Case) -> None:
    scorer = LVLMScorer(case.lvlm, case.store, "likelihood")
    numbers = np.arange(len(case.store))
    full = np.log(case.store.full_scores("likelihood"))
    np.testing.assert_allclose(full, case.direct(None), atol=1e-4)
    np.testing.assert_allclose(np.log(scorer.score_both(numbers)[1]), full, atol=1e-4)
    keep = random_masks(case.store)
    pruned = np.log(scorer(numbers, keep))
    np.testing.assert_allclose(pruned, case.direct(keep), atol=1e-4)
    assert np.abs(pruned - full).max() > 0.01, "masks make no difference here"
    depth = case.lvlm.num_layers
    lives = np.where(keep, depth, 0).astype(np.uint8)
    inside = scorer.score_inside(numbers, lives=lives)
    np.testing.assert_allclose(np.log(inside.likelihood), pruned, atol=1e-4)
    assert (inside.lives == lives).all()


def test_newlines_are_no_ones_choice(case: Case) -> None:
    store = case.store
    fixed = [store.fixed_count(image) for image in range(3)]
    assert (min(fixed) > 0) == (case.name == "llava_next") and (
        case.name != "smolvlm" or not any(fixed)
    )
    for sample in range(len(store)):
        count = int(store.exists([sample]).sum())
        assert len(store.tokens(sample)) == len(store.coords(sample)) == count
        assert np.prod(store.grid(sample)) == count and store.coords(sample).min() >= 0
        assert len(store.visual(sample).tokens) == count + fixed[store.image_number(sample)]
    reducer: Any = make_reducer("fastv")
    scorer = LVLMScorer(case.lvlm, store)
    found = scorer.score_inside(np.arange(2), reducer=reducer)
    depth = case.lvlm.num_layers
    for sample in range(2):  # the method's own shares, of the droppable tokens alone
        count = int(store.exists([sample]).sum())
        (stage,) = reducer.stages(count, depth, None)
        lives = found.lives[sample]
        assert (lives[count:] == 0).all() and (lives[:count] == depth).sum() == stage.keep


def test_areas_lie_in_the_picture_and_cover_it(case: Case) -> None:
    for sample in range(0, len(case.store), 2):
        areas, tiles = case.store.areas(sample), case.store.coords(sample)[:, 0]
        size = (areas[:, 3] - areas[:, 1]) * (areas[:, 4] - areas[:, 2])
        overview = tiles.max() if case.name == "smolvlm" else 0
        assert size[tiles == overview].sum() == pytest.approx(1.0, abs=1e-5)
        cut = areas[tiles != overview]
        if len(cut):  # the tiles show the picture once more, but for a rim that is trimmed
            assert size[tiles != overview].sum() == pytest.approx(1.0, abs=0.35)
            assert (cut[:, 1:3] > -0.2).all() and (cut[:, 3:] < 1.2).all()
            assert len(np.unique(cut.round(4), axis=0)) == len(cut)


@pytest.mark.parametrize("name", [*FAMILIES, "llava_onevision", "internvl"])
@pytest.mark.parametrize("size", [(112, 56), (60, 112)])
def test_areas_are_where_tokens_look(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """What changes in the picture changes the token over it most, in the tiles and in the whole."""
    save_random(name, tmp_path)
    lvlm: Any = load_lvlm(tmp_path)
    picture = np.full((*size, 3), 128, np.uint8)
    (before,) = lvlm.encode_images([picture])
    shown = before.placement.droppable
    areas, tiles = before.placement.areas()[:, 1:], before.placement.coords[shown, 0]
    right = total = 0
    for token in range(0, len(areas), 3):
        changed = picture.copy()
        edges = areas[token] * np.array([*size, *size])
        middle, third = (edges[:2] + edges[2:]) / 2, (edges[2:] - edges[:2]) / 3
        (top, left), (bottom, last) = (middle - third).clip(0), middle + third
        changed[int(top) : round(bottom), int(left) : round(last)] = (255, 0, 0)
        (after,) = lvlm.encode_images([changed])
        moved = (after.tokens - before.tokens)[torch.from_numpy(shown)].norm(dim=1).numpy()
        mine = np.flatnonzero(tiles == tiles[token])
        right += int(mine[moved[mine].argmax()] == token)
        total += 1
    assert right >= 0.9 * total, (right, total)


def test_episodes_and_pictures(case: Case) -> None:
    store = case.store
    store.write_channel("codes", ((store.image_tokens(i)[:, :8]) for i in range(3)))
    env = TokenPruningEnv(store, LVLMScorer(case.lvlm, store), render_mode="rgb_array")
    observation, _ = env.reset(seed=0, options={"sample": 2})
    count = int(store.exists([2]).sum())
    assert observation["areas"].shape == (store.max_tokens, 5)
    assert not observation["areas"][count:].any() and observation["alive"].sum() == count
    assert env.observation_space.contains(observation)
    _, _, _, _, info = env.step((np.arange(store.max_tokens) % 2).astype(np.int8))
    assert info["kept"] == count // 2
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3


def test_pruners_and_the_table(case: Case, tmp_path: Path) -> None:
    names = ["random", "uniform", "divprune"]
    for name in names:
        inputs = prune_inputs(case.store, 0)
        for budget in (1, 5, inputs.num_tokens):
            assert int(make_pruner(name).prune(inputs, budget).sum()) == budget
    results = evaluate_store(
        case.folder / "store", str(case.folder / "lvlm"), tmp_path, pruners=names,
        budgets=(8, 3), trajectories=0,
    )  # fmt: skip
    assert len(results["methods"]) == 6
    fixed = [case.store.fixed_count(case.store.image_number(i)) for i in range(len(case.store))]
    assert results.get("always_kept", 0) == pytest.approx(np.mean(fixed), abs=1e-3)
    least = min(int(case.store.exists([i]).sum()) for i in range(len(case.store)))
    kept = {row["budget"]: row["mean_tokens"] for row in results["methods"]}
    assert kept[3] == 3 and (kept[8] == 8) == (least >= 8)


def test_answers_of_pruned_tokens(case: Case) -> None:
    model = PrunedLVLM(case.lvlm, make_pruner("uniform"))
    answer = model.answer(case.pictures[0], QUESTIONS[0], 5, max_new_tokens=4)
    keep = np.zeros((len(case.store), case.store.max_tokens), bool)
    keep[0, : len(answer.keep)] = answer.keep
    assert answer.keep.sum() == 5 and len(answer.keep) == len(case.store.tokens(0))
    visual = case.store.visual(0)
    mask = np.ones(len(visual.tokens), bool)
    mask[visual.droppable] = answer.keep
    (visual_now,) = case.lvlm.encode_images([case.pictures[0]])
    prompt = case.lvlm.prompt(QUESTIONS[0], [visual_now])
    wanted = case.lvlm.generate([prompt], [visual_now.tokens], [mask], 4, "original")
    assert answer.text == wanted[0]


def test_an_interrupted_encoding_asks_again_about_an_earlier_picture(
    case: Case, tmp_path: Path
) -> None:
    samples = list(load_dataset(str(case.folder / "data.jsonl")))
    later = replace(samples[0], id="again", question="yes or no 7")
    how: dict[str, Any] = {"progress": False, "shard_images": 1}
    encode_dataset(case.lvlm, samples[:4], tmp_path / "store", **how)
    store = encode_dataset(case.lvlm, [*samples[:4], later], tmp_path / "store", **how)
    scorer = LVLMScorer(case.lvlm, store, "likelihood")
    (visual,) = case.lvlm.encode_images([later.image])
    prompt = case.lvlm.prompt(later.question, [visual])
    answer = case.lvlm.answer_ids(prompt, "yes")
    wanted = case.lvlm.score([prompt], [[answer]], [visual.tokens.half().float()]).likelihood
    assert store.prompt_ids(4).tolist() == list(prompt.ids)
    np.testing.assert_allclose(
        np.log(scorer.score_both(np.array([4]))[1]), np.log(wanted), atol=1e-4
    )


def test_a_store_of_the_first_format_is_refused_for_these_families(
    case: Case, tmp_path: Path
) -> None:
    copy = shutil.copytree(case.folder / "store", tmp_path / "store")
    for path in copy.glob("channel-*"):
        path.unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    damage.rewrite(copy / "manifest.json", {**manifest, "version": 1})
    with pytest.raises(ValueError, match=r"format version 1.*encode it again with --restart"):
        LVLMScorer(case.lvlm, FeatureStore.open(copy))


def test_placements_that_contradict_their_tokens_are_damage(case: Case, tmp_path: Path) -> None:
    copy = shutil.copytree(case.folder / "store", tmp_path / "store")
    for path in copy.glob("channel-*"):
        path.unlink()
    name = "images-00000.arrow"
    with pa.ipc.open_file(copy / name) as reader:
        table = reader.read_all()
    shorter = [row[:-3] for row in table["coords"].to_pylist()]
    place = table.schema.get_field_index("coords")
    table = table.set_column(
        place, table.schema.field(place), [pa.array(shorter, pa.large_list(pa.int32()))]
    )
    with pa.OSFile(str(copy / name), "wb") as stream, pa.ipc.new_file(stream, table.schema) as out:
        out.write_table(table)
    manifest = json.loads((copy / "manifest.json").read_text())

    manifest["files"][name] |= {
        "bytes": (copy / name).stat().st_size,
        "sha256": file_sha256(copy / name),
    }
    damage.rewrite(copy / "manifest.json", manifest)
    with pytest.raises(StoreError, match="the lengths of coords do not fit"):
        FeatureStore.open(copy)
