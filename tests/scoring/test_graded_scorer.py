"""The score kind "graded": answers are written from the kept tokens and graded as samples say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from tprl_env.cli import main
from tprl_env.data import BadSampleError, Sample, load_dataset
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.graders import GRADED_TOKENS, grade
from tprl_env.env import TokenPruningEnv
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.stored import stored_prompt
from tprl_env.scoring.graded_scorer import GradedScorer
from tprl_env.scoring.spec import ScorerSpec

LVLM = "builtin:crowded"


def scenes(count: int = 24) -> list[Sample]:
    """Scenes with several graders; a wrong reference shows that all references count."""
    found = []
    for number, one in enumerate(load_dataset("scenes-crowded", "test", limit=count)):
        if number % 3 == 0:  # three of ten people agree with the scene
            answers = one.answers[:1] * 2 + ("red", "blue", "7") + ("no",) * 5
            one = replace(one, grader="vqa", answers=answers)
        elif number % 3 == 1:
            one = replace(one, grader="number_or_text")
        found.append(one)
    return found


@pytest.fixture(scope="module")
def lvlm() -> Any:
    return load_lvlm(LVLM)


@pytest.fixture(scope="module")
def store(lvlm: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    place = tmp_path_factory.mktemp("graded") / "store"
    return encode_dataset(lvlm, scenes(), place, grade=True, progress=False, batch_size=7)


def by_hand(lvlm: Any, store: FeatureStore, masks: list[np.ndarray] | None, **inside: Any) -> Any:
    rows = range(len(store))
    texts = lvlm.generate(
        [stored_prompt(store, row) for row in rows], [store.visual(row).tokens for row in rows],
        masks, GRADED_TOKENS, **inside,
    )  # fmt: skip
    return [
        grade(store.grader(row), text, store.answers(row))
        for row, text in zip(rows, texts, strict=True)
    ]


def test_full_scores_are_those_of_written_answers(lvlm: Any, store: FeatureStore) -> None:
    found = store.full_scores("graded")
    assert found.tolist() == pytest.approx(by_hand(lvlm, store, None))
    assert len({round(float(one), 2) for one in found}) > 2  # VQA's shares are among them
    assert {store.grader(row) for row in range(len(store))} == {"exact", "vqa", "number_or_text"}


def test_masks_and_lives_are_graded(lvlm: Any, store: FeatureStore) -> None:
    scorer, numbers = GradedScorer(lvlm, store, batch_size=5), np.arange(len(store))
    keep = np.random.default_rng(0).random((len(store), store.max_tokens)) < 0.3
    found = scorer(numbers, keep)
    assert found.tolist() == pytest.approx(by_hand(lvlm, store, list(keep)))
    assert np.abs(found - store.full_scores("graded")).max() > 0.2
    assert scorer.stats.computed == len(store) and scorer.score_kind == "graded"
    depth = lvlm.num_layers
    lives = np.where(keep, depth, 2).astype(np.uint8)
    inside = scorer(numbers, lives)
    assert inside.tolist() == pytest.approx(by_hand(lvlm, store, None, lives=list(lives)))
    assert scorer(numbers, keep * np.uint8(depth)).tolist() == found.tolist()


def test_the_environment_pays_for_graded_answers(lvlm: Any, store: FeatureStore) -> None:
    spec = ScorerSpec(str(store.path), "graded", lvlm=LVLM)
    scorer = spec.build()
    assert isinstance(scorer, GradedScorer)
    from tprl_env.policy.autoencoder_training import train_autoencoder, write_codes

    write_codes(store, train_autoencoder(store, code_width=8, steps=2)[0])
    opened = FeatureStore.open(store.path)
    env = TokenPruningEnv(opened, scorer, score_kind="graded", max_steps=1, beta=0.0)
    _, info = env.reset(seed=0, options={"sample": 0})
    action = np.zeros(144, np.int8)
    action[:4] = 1
    reward = env.step(action)[1]
    wanted = scorer(np.array([0]), action[None].astype(bool))[0] - info["full_score"]
    assert reward == pytest.approx(wanted)
    with pytest.raises(ValueError, match="the scorer measures 'graded' but the environment"):
        TokenPruningEnv(opened, scorer, score_kind="exact")


def test_a_store_without_graded_scores_says_how(lvlm: Any, tmp_path: Path, capsys: Any) -> None:
    plain = [replace(one, grader="exact") for one in scenes(4)]
    store = encode_dataset(lvlm, plain, tmp_path / "plain", progress=False)
    with pytest.raises(StoreError, match="has no graded scores; encode it with grade=True"):
        GradedScorer(lvlm, store)
    with pytest.raises(StoreError, match="grade"):  # other settings do not go on in one store
        encode_dataset(lvlm, plain, tmp_path / "plain", grade=True, progress=False)
    with pytest.raises(BadSampleError, match="pass grade=True to have answers written"):
        encode_dataset(lvlm, scenes(4), tmp_path / "other", progress=False)
    from PIL import Image

    rows = []
    for number, one in enumerate(scenes(4)):
        Image.fromarray(one.image).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "question": one.question,
                     "answers": list(one.answers), "grader": one.grader})  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ["encode", "--data", str(tmp_path / "data.jsonl"), "--lvlm", LVLM, "--out"]
    assert main([*line, str(tmp_path / "a")]) == 2
    assert "pass --grade to have answers written" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "b"), "--grade"]) == 0
    graded = FeatureStore.open(tmp_path / "b").full_scores("graded")
    assert len(graded) == 4 and ((graded >= 0) & (graded <= 1)).all()


def test_a_training_takes_graded_scores(store: FeatureStore, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from tprl_env.rllib.config import load_config
    from tprl_env.rllib.run.train import train

    changes = {
        **{"source": str(store.path), "lvlm": LVLM, "rules.score_kind": "graded"},
        **{"scoring.scorer": "lvlm", "resources.num_scorers": 0, "limits.iterations": 1},
        **{"rollout.samples": 4, "rollout.draws": 2, "rules.budget": 12},
    }
    result = train(load_config("smoke", changes), tmp_path / "run", progress=False)
    assert result.progress.scores > 0 and np.isfinite(result.metrics["score"])
