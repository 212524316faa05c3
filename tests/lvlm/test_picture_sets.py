"""Questions about several pictures, from the data file to the drawing, in every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

from tprl_env.cli.commands import main
from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.env import TokenPruningEnv
from tprl_env.env.token_layers import layers_of
from tprl_env.env.token_picture import layered_picture, sheet
from tprl_env.evaluation import reducer_table
from tprl_env.evaluation.reducer_names import contenders
from tprl_env.evaluation.reducers import Bench
from tprl_env.evaluation.trajectories import draw_examples
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode_with_ray import UnitWorker
from tprl_env.lvlm.encoding.units import plan_units
from tprl_env.lvlm.tiny.families import save_random
from tprl_env.policy import PolicyConfig, PolicyPruner, PruningPolicy
from tprl_env.policy.autoencoder_training import train_autoencoder, write_codes
from tprl_env.reducers import make_reducer
from tprl_env.scoring.lvlm_scorer import LVLMScorer

SIZES = ((40, 70), (28, 28), (90, 33))
SETS = ((0,), (0, 1), (2, 0), (0, 1, 2))
QUESTIONS = ("what color is the 7 ?", "yes or no")
FAMILIES = ("llava", "llava_siglip_qwen2", "llava_next", "llava_onevision", "qwen2_vl",
            "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "video_llava")  # fmt: skip


class Case:
    """A random checkpoint, a data file with sets of one to three pictures, and its store."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        save_random(name, folder / "lvlm")
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in SIZES]
        for number, picture in enumerate(self.pictures):
            Image.fromarray(picture).save(folder / f"{number}.png")
        self.rows = [(one, question) for one in SETS for question in QUESTIONS]
        lines = [
            {
                "id": str(number),
                **({"image": f"{shown[0]}.png"} if len(shown) == 1 else
                   {"images": [f"{picture}.png" for picture in shown]}),
                **{"question": question, "answers": ["yes"]},
            }
            for number, (shown, question) in enumerate(self.rows)
        ]  # fmt: skip
        (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        words = ["encode", "--data", folder / "data.jsonl", "--lvlm", folder / "lvlm"]
        assert main([str(word) for word in (*words, "--out", folder / "store")]) == 0
        self.lvlm: Any = load_lvlm(folder / "lvlm")
        self.store = FeatureStore.open(folder / "store", verify="checksums")

    def shown(self, row: int) -> list[np.ndarray]:
        return [self.pictures[one] for one in self.rows[row][0]]

    def direct(self, keep: np.ndarray | None) -> np.ndarray:
        """Log-likelihoods by ``lvlm.score`` from the pictures one by one, without the store."""
        import torch

        prompts, tokens, masks = [], [], []
        for row, (_, question) in enumerate(self.rows):
            visuals = self.lvlm.encode_images(self.shown(row))
            prompts.append(self.lvlm.prompt(question, visuals))
            tokens.append(torch.cat([visual.tokens for visual in visuals]).half().float())
            shown = prompts[-1].droppable(len(tokens[-1]))
            masks.append(np.ones(len(shown), bool))
            if keep is not None:
                masks[-1][shown] = keep[row, : shown.sum()]
        answers = [[self.lvlm.answer_ids(prompt, "yes")] for prompt in prompts]
        return np.log(self.lvlm.score(prompts, answers, tokens, masks).likelihood)


def make_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


case = pytest.fixture(make_case, scope="module", params=FAMILIES)


def test_a_set_is_stored_and_scored_as_its_pictures_one_by_one(case: Case) -> None:
    store, numbers = case.store, np.arange(len(case.rows))
    assert store.num_images == len(SETS) and store.has_sets
    for row in numbers.tolist():
        for found, wanted in zip(store.pictures(row), case.shown(row), strict=True):
            assert np.array_equal(found, wanted)
        areas, coords = store.areas(row), store.coords(row)
        assert set(areas[:, 0]) == set(range(len(case.rows[row][0])))
        assert len(np.unique(coords, axis=0)) == len(coords)
    with pytest.raises(ValueError, match="'2' is about 2 pictures"):
        store.picture(2)
    scorer = LVLMScorer(case.lvlm, store, "likelihood")
    full = np.log(store.full_scores("likelihood"))
    np.testing.assert_allclose(full, case.direct(None), atol=1e-4)
    exists = store.exists(numbers)
    keep = exists & (np.random.default_rng(1).random(exists.shape) < 0.5)
    pruned = np.log(scorer(numbers, keep))
    np.testing.assert_allclose(pruned, case.direct(keep), atol=1e-4)
    assert np.abs(pruned - full).max() > 0.01
    # the order of the pictures, and which of them a token is of, make a difference
    turned = exists & np.roll(keep, 3, axis=1)
    assert np.abs(np.log(scorer(numbers, turned)) - pruned).max() > 0.01


def test_a_worker_that_encodes_a_set_again_gets_the_same(case: Case) -> None:
    samples = load_dataset(str(case.folder / "data.jsonl"))
    units = list(plan_units(samples, shard_images=2))
    assert [len(unit.new) for unit in units] == [2, 2]
    worker = UnitWorker(lambda: case.lvlm, str(case.folder), 4, True, False)
    again = worker._again(units[1], 2)
    stored = case.store.visual(4)
    assert again.grid == stored.grid and again.placeholder == stored.placeholder
    np.testing.assert_array_equal(again.tokens, stored.tokens)
    assert again.placement is not None and stored.placement is not None
    np.testing.assert_array_equal(again.placement.offsets, stored.placement.offsets)


def test_a_pruned_lvlm_answers_about_several_pictures(case: Case) -> None:
    pruned = PrunedLVLM(case.lvlm, make_reducer("divprune"))
    shown, questions = [case.shown(row) for row in range(8)], [q for _, q in case.rows]
    answers = pruned.answer_batch(shown, questions, 0.5, 4)
    scores = pruned.score_batch(shown, questions, [["yes"]] * 8, 0.5)
    keep = np.zeros((8, case.store.max_tokens), bool)
    for row, answer in enumerate(answers):
        assert answer.text == pruned.answer(shown[row], questions[row], 0.5, 4).text
        assert len(answer.keep) == case.store.image_count(row // 2)
        keep[row, : len(answer.keep)] = answer.keep
    found = np.log([score.likelihood for score in scores])
    np.testing.assert_allclose(found, case.direct(keep), atol=5e-3)  # the store's are halves
    if case.name != "llava":
        return
    with pytest.raises(ValueError, match=r"'visionzip' .* question 1 of the batch has 2"):
        PrunedLVLM(case.lvlm, make_reducer("visionzip")).answer_batch(
            [shown[0], shown[2]], questions[:2], 5
        )
    for bad, said in (([], "picture 0: an empty list"), ([shown[0][0], 3], "0, number 2 of its 2")):
        with pytest.raises(ValueError, match=said):
            pruned.answer(bad, "yes or no", 5)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Case("llava", tmp_path_factory.mktemp("llava"))
    autoencoder, _ = train_autoencoder(made.store, code_width=8, steps=3)
    write_codes(made.store, autoencoder)
    return made


def test_the_environment_says_which_picture_a_token_is_of(llava: Case) -> None:
    env = TokenPruningEnv(llava.store, LVLMScorer(llava.lvlm, llava.store), render_mode="rgb_array")
    observation, _ = env.reset(seed=0, options={"sample": 6})
    assert sorted(set(observation["areas"][:, 0].astype(int))) == [0, 1, 2]
    assert env.render().shape[2] == 3


def test_each_picture_is_drawn_with_its_own_tokens(llava: Case, tmp_path: Path) -> None:
    store, row = llava.store, 2
    picture, places = sheet(store.pictures(row))
    assert places is not None and places.shape == (2, 4)
    assert picture.shape[0] == 40 and places[0, 3] < places[1, 1]
    np.testing.assert_array_equal(picture[:, :70], llava.pictures[0])
    (layer,) = layers_of(store, row, places) or []
    assert sorted(layer.index.tolist()) == list(range(32))
    first = np.arange(32) < 16
    drawn = layered_picture(picture, first, [layer], (200, 200 * picture.shape[1] // 40))
    border = round(places[0, 3] * drawn.shape[1])
    # kept: in colour; pruned: grey
    colour = np.ptp(drawn.astype(int), axis=2)
    inside = slice(round(places[1, 1] * drawn.shape[1]) + 4, drawn.shape[1] - 4)
    assert colour[:, : border - 4].mean() > 30 > 8 > colour[:, inside].mean()


def test_strips_and_tables_of_sets_are_drawn(llava: Case, tmp_path: Path) -> None:
    store, scorer = llava.store, LVLMScorer(llava.lvlm, llava.store)
    config = PolicyConfig.question_aware(store.code_width, store.query_width, width=16)
    pruner = PolicyPruner(PruningPolicy(replace(config, coordinates=True)))
    samples, scores = np.arange(8), np.ones(8, np.float32)
    examples = draw_examples(store, scorer, pruner, samples, scores, 3, [8, 4], tmp_path)
    assert len(examples.pictures) == 3 and all(path.exists() for path, _ in examples.pictures)
    bench = Bench(store, llava.lvlm, samples)
    measured = bench.measure(contenders(["divprune"])[0], [6])
    assert reducer_table.draw_examples(measured, bench, tmp_path / "kept.png").exists()


def test_reducers_that_look_into_the_tower_say_why_they_cannot(llava: Case) -> None:
    bench = Bench(llava.store, llava.lvlm, np.arange(8))
    for one in contenders(["visionzip", "divprune"]):
        for measured in bench.measure(one, [6]):
            name = measured.row["name"]
            assert measured.row["feasible"] == name.startswith("divprune")
            if not measured.row["feasible"]:
                assert "some questions here have several" in measured.row["reason"]


def test_verify_reads_every_picture(llava: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(llava.folder / "store")]) == 0
    assert "8 samples about 4 images" in capsys.readouterr().out
