"""A table of kinds of bad input: generated, seeded, and with three allowed ends.

Every input ends in a clear sentence (an exception that the command line prints, exit code 2), in a
skipped and counted sample, or in the right value. No traceback, no hang, nothing left behind. The
first seeds of every kind run always, many more behind ``slow``.
"""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lvlm_fixtures import NUM_TOKENS, pictures
from mutations import ODD_VALUES, alarm, generator, spoil_bytes, spoil_json
from PIL import Image
from small_run import SmallRun, files_under, make_small_run

from tprl_env.cli.commands import main
from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.data.pictures import PictureError, read_picture
from tprl_env.env.rules import EpisodeRules
from tprl_env.env.scorer import ScoringError
from tprl_env.env.single import TokenPruningEnv
from tprl_env.evaluation.measure import keep_masks
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.network import PruningPolicy
from tprl_env.reducers import PRUNERS, make_pruner
from tprl_env.reducers.interfaces import Pruner
from tprl_env.rllib.config import TrainConfig, load_config

torch.set_num_threads(1)
SECONDS = 20.0
LONGEST = 2000  # characters of a message: a sentence, not a dump
# what the command line prints as one sentence
REFUSALS = (ValueError, ScoringError, OSError, FloatingPointError)


@dataclass(frozen=True)
class Run:
    """What an input may use."""

    small: SmallRun
    lvlm: Any
    tmp: Path


def refusal(act: Callable[[], Any]) -> str | None:
    """The sentence that ``act`` was refused with, None where it ended well."""
    try:
        act()
    except REFUSALS as error:
        text = str(error)
        assert len(text.split()) >= 4, f"no sentence: {error!r}"
        assert len(text) <= LONGEST, f"{len(text)} characters: {text[:300]}"
        assert "Traceback" not in text
        return text
    return None


# ---------- datasets


LINE = {"id": "a", "image": "0.png", "question": "what digit is at c1 ?", "answers": ["7"],
        "question_type": "at", "grader": "exact", "image_id": "p"}  # fmt: skip
GOOD_LINE = {"id": "g", "image": "1.png", "question": "color at b1 ?", "answers": ["red"]}


def dataset(rng: random.Random, run: Run) -> None:
    folder = run.tmp / "data"
    folder.mkdir()
    for number, picture in enumerate(pictures(2)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    lines = [json.dumps(spoil_json(rng, LINE)).encode(), json.dumps(GOOD_LINE).encode()]
    if rng.random() < 0.3:
        lines[0] = spoil_bytes(rng, json.dumps(LINE).encode())
    ending = rng.choice((b"\n", b"\r\n", b"\n\n"))
    path = folder / "questions.jsonl"
    path.write_bytes(ending.join(lines) + rng.choice((b"", ending)))
    before = files_under(folder)
    out = run.tmp / "store"

    def encode() -> None:
        store = encode_dataset(
            run.lvlm, load_dataset(path), out, skip_bad=rng.random() < 0.7, progress=False
        )
        numbers = [store.id(i) for i in range(len(store))]
        assert numbers[-1] == "g" and len(numbers) + store.manifest.skipped == 2
        listed = out / "skipped.jsonl"
        assert listed.exists() == bool(store.manifest.skipped)
        assert all(isinstance(answer, str) for answer in store.answers(0))
        assert np.isfinite(store.full_scores("likelihood")).all()

    refused = refusal(encode)
    if refused is not None:
        assert not out.exists(), f"left behind after: {refused}"
        assert str(folder) in refused or "sample '" in refused, refused
    assert files_under(folder) == before


# ---------- pictures


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def picture(rng: random.Random, run: Run) -> None:
    name = rng.choice(FORMATS)
    stream = io.BytesIO()
    size = rng.choice(((1, 1), (3, 7), (32, 32)))
    Image.fromarray(pictures(1, seed=rng.randrange(9), size=size)[0]).save(stream, name)
    data = spoil_bytes(rng, stream.getvalue())
    if rng.random() < 0.1:
        data = rng.randbytes(rng.randrange(200))
    path = run.tmp / f"p.{rng.choice((name, 'png', 'eps', 'txt', ''))}"
    path.write_bytes(data)
    found: list[Any] = []
    try:
        found.append(read_picture(path))
    except PictureError as error:
        assert str(path) in str(error) and len(str(error)) <= LONGEST
        return
    assert found[0].dtype == np.uint8 and found[0].ndim == 3 and found[0].shape[2] == 3


# ---------- configs


SETTINGS = sorted(load_config("recommended").flat())


def config(rng: random.Random, run: Run) -> None:
    base = load_config(rng.choice(("recommended", "grpo", "mapo", "paper")))
    name = rng.choice(sorted(base.flat()))
    if rng.random() < 0.2:
        name = rng.choice((name[:-1], name.upper(), name.replace(".", "_"), f"{name}.x", "", "."))
    value = rng.choice(ODD_VALUES)
    made: list[TrainConfig] = []
    refused = refusal(lambda: made.append(base.replace(**{name: value})))
    if refused is None:
        again = TrainConfig.from_dict(json.loads(json.dumps(made[0].as_dict())))
        assert again == made[0], f"{name}={value!r} reads back as another config"
        assert name in made[0].flat()
    elif name in base.flat():
        assert any(part in refused for part in name.split(".")), (name, refused)


def config_file(rng: random.Random, run: Run) -> None:
    table = load_config(rng.choice(("recommended", "grpo", "mapo", "paper"))).as_dict()
    spoilt = spoil_json(rng, table)
    made: list[TrainConfig] = []
    if refusal(lambda: made.append(TrainConfig.from_dict(spoilt))) is None:
        assert TrainConfig.from_dict(made[0].as_dict()) == made[0]


# ---------- command lines


def command(rng: random.Random, run: Run) -> None:
    gone = str(run.tmp / "gone")
    lines = [
        ["encode", "--data", gone, "--lvlm", str(run.small.lvlm), "--out", gone],
        ["encode", "--data", str(run.small.data), "--lvlm", gone, "--out", gone],
        ["autoencoder", gone, "--steps", "2"],
        ["train", "recommended", "--source", gone, "--out", gone],
        ["train", "recomended", "--out", gone],
        ["evaluate", gone, "--budgets", "4"],
        ["evaluate", str(run.small.store), "--lvlm", str(run.small.lvlm), "--policy", gone],
        ["compare", "no_such_experiment", "--out", gone],
        ["check-results", gone],
        ["quickstart", "--task", "sprase", "--out", gone],
    ]
    words = rng.choice(lines)
    for _ in range(rng.choice((0, 1, 2))):
        at = rng.randrange(1, len(words) + 1)
        odd = rng.choice([str(v) for v in ODD_VALUES if v is not None and "\x00" not in str(v)])
        extra = rng.choice(
            (odd, "--bugdets", "--budgets", "--seed", "--policy.widht", "--limit", "-x")
        )
        words = [*words[:at], extra, *words[at:]]
    before = files_under(run.tmp)
    captured = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.tmp)
        patch.setattr("sys.stderr", captured)
        patch.setattr("sys.stdout", io.StringIO())
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    said = captured.getvalue()
    lines_said = [line for line in said.splitlines() if line.startswith("tprl: ")]
    assert code == 2, (words, code, said)
    assert len(lines_said) == 1 and "Traceback" not in said, (words, said)
    assert len(lines_said[0]) <= LONGEST, words
    assert files_under(run.tmp) == before, words


# ---------- checkpoints, policies, autoencoders, stores


def spoil_folder(rng: random.Random, source: Path, target: Path, names: tuple[str, ...]) -> str:
    """Copy a folder and damage one of its files; its name and what was done."""
    shutil.copytree(source, target)
    path = target / rng.choice(names)
    if path.suffix == ".json" and rng.random() < 0.7:
        spoilt = spoil_json(rng, json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(spoilt), encoding="utf-8")
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")  # names, types, shapes and places
        if rng.random() < 0.7:
            path.write_bytes(spoil_bytes(rng, data[:head]) + data[head:])
        else:
            path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))
    return path.name


def checkpoint(rng: random.Random, run: Run) -> None:
    folder = run.tmp / "lvlm"
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
             "tokenizer.json", "processor_config.json")  # fmt: skip
    there = tuple(name for name in names if (run.small.lvlm / name).is_file())
    spoil_folder(rng, run.small.lvlm, folder, there)
    picture_ = pictures(1)[0]

    def use() -> None:
        lvlm = load_lvlm(folder)
        visual = lvlm.encode_images([picture_])[0]
        prompt = lvlm.prompt("what digit is at c1 ?")
        answer = lvlm.answer_ids(prompt, "7")
        scores = lvlm.score([prompt], [[answer]], [visual.tokens])
        assert 0 <= scores.likelihood[0] <= 1

    refusal(use)


def policy(rng: random.Random, run: Run) -> None:
    folder = run.tmp / "policy"
    names = tuple(path.name for path in sorted(run.small.policy.iterdir()) if path.is_file())
    spoil_folder(rng, run.small.policy, folder, names)
    made: list[PruningPolicy] = []
    if refusal(lambda: made.append(PruningPolicy.from_pretrained(folder))) is None:
        assert all(value.isfinite().all() for value in made[0].state_dict().values())


def autoencoder(rng: random.Random, run: Run) -> None:
    folder = run.tmp / "autoencoder"
    names = tuple(path.name for path in sorted(run.small.autoencoder.iterdir()) if path.is_file())
    spoil_folder(rng, run.small.autoencoder, folder, names)
    made: list[TokenAutoencoder] = []
    if refusal(lambda: made.append(TokenAutoencoder.from_pretrained(folder))) is None:
        assert all(value.isfinite().all() for value in made[0].state_dict().values())


def content(store: FeatureStore) -> list[Any]:
    """Everything that a store gives."""
    rows = np.arange(len(store))
    return [
        [store.id(i) for i in rows], [store.question(i) for i in rows],
        [store.answers(i) for i in rows], store.exists(rows).tolist(),
        *(np.asarray(store.tokens(i), np.float32).tolist() for i in rows),
        store.codes(rows).tolist(), store.query(rows).tolist(), store.full_scores("exact").tolist(),
    ]  # fmt: skip


def store(rng: random.Random, run: Run) -> None:
    folder = run.tmp / "store"
    names = tuple(
        path.name for path in sorted(run.small.store.iterdir())
        if path.suffix in (".arrow", ".json") and path.name != "encoding.json"
    )  # fmt: skip
    spoil_folder(rng, run.small.store, folder, names)
    found: list[Any] = []
    reads = refusal(lambda: found.append(content(FeatureStore.open(folder, verify="checksums"))))
    if reads is None:
        assert found[0] == content(FeatureStore.open(run.small.store)), "other values, unnoticed"


# ---------- scorers, pruners, calls of the environment


ODD_SCORES: tuple[Any, ...] = (
    None, math_nan := float("nan"), [], [[0.5]], ["0.5"], [None], [math_nan], [float("inf")], [1.5],
    [-0.2], [0.5, 0.5], {"score": 0.5}, "good", [0.5 + 0j], [True], [1], [0.25], object(), [1e300],
    np.zeros((1, 1)), np.array([0.5], np.float16), np.array(["a"]), torch.tensor([0.5]), (0.5,),
)  # fmt: skip
FAILURES = (
    ValueError("x"),
    KeyError("x"),
    RuntimeError(""),
    ConnectionError("lost"),
    TypeError("t"),
)


def scorer(rng: random.Random, run: Run) -> None:
    given = rng.choice((*ODD_SCORES, *FAILURES))

    def score(samples: Any, keep: Any) -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    env = TokenPruningEnv(f"toy:samples=6,tokens=8,seed={rng.randrange(9)}", scorer=score)
    env.reset(seed=rng.randrange(100))
    action = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.int8)
    result: list[Any] = []
    refused = refusal(lambda: result.append(env.step(action)))
    if refused is None:
        assert 0.0 <= result[0][4]["score"] <= 1.0 and np.isfinite(result[0][1])
        expected = float(np.asarray(given).ravel()[0])
        assert abs(result[0][4]["score"] - expected) < 1e-6
    else:
        assert "toy-" in refused, refused


def call(rng: random.Random, run: Run) -> None:
    odd = rng.choice((*ODD_VALUES, np.zeros(3), np.ones((8, 8)), np.full(8, 2), np.full(8, np.nan)))
    names = ("max_steps", "alpha", "beta", "score_steps", "score_kind", "budget", "min_tokens",
             "query", "source", "scorer", "render_mode", "max_stepz")  # fmt: skip
    name = rng.choice((*names, "action", "options", "sample", "seed"))

    def use() -> None:
        if name == "action":
            env = TokenPruningEnv("toy:samples=6,tokens=8")
            env.reset(seed=0)
            env.step(odd)
        elif name in ("options", "sample", "seed"):
            env = TokenPruningEnv("toy:samples=6,tokens=8")
            env.reset(**{"options": {"sample": odd}} if name == "sample" else {name: odd})
        else:
            EpisodeRules  # noqa: B018  (its checks are what is called)
            env = TokenPruningEnv(**{"source": "toy:samples=6,tokens=8"} | {name: odd})
            env.reset(seed=0)
            observation, *_ = env.step(np.ones(8, np.int8))
            assert env.observation_space.contains(observation)

    if name in ("max_stepz", "seed"):  # an unknown argument, and Gymnasium's own check of seeds
        try:
            use()
        except (TypeError, *REFUSALS, __import__("gymnasium").error.Error):
            return
    else:
        refusal(use)


class Odd(Pruner):
    """Gives back what it was made with."""

    name = "odd"
    knowledge = "heuristic"
    needs = ()

    def __init__(self, given: Any) -> None:
        self.given = given

    def prune(self, inputs: Any, budget: int) -> Any:
        return self.given


def pruner(rng: random.Random, run: Run) -> None:
    n = NUM_TOKENS
    exact = np.zeros(n, bool)
    exact[:4] = True
    given = rng.choice(
        [None, 4, "4", [0, 1, 2, 3], torch.arange(4), torch.ones(n, dtype=torch.bool),
         torch.zeros(n, dtype=torch.bool), torch.zeros(n), torch.full((n,), float("nan")),
         torch.ones(n - 1, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool),
         torch.from_numpy(exact), torch.from_numpy(exact).float(), torch.from_numpy(exact).int(),
         exact]
    )  # fmt: skip
    found: list[Any] = []
    source = FeatureStore.open(run.small.store)
    row = np.array([rng.randrange(len(source))])
    refused = refusal(lambda: found.append(keep_masks(Odd(given), source, row, 4)))
    if refused is None:
        assert found[0].dtype == bool and found[0][0].tolist() == exact.tolist(), given
    else:
        assert "odd" in refused, refused


def pruner_fields(rng: random.Random, run: Run) -> None:
    name = rng.choice(sorted(PRUNERS))
    fields = [f for f in getattr(PRUNERS[name], "__dataclass_fields__", {})] or ["x"]
    field = rng.choice((*fields, "importance_ratio", ""))
    value = rng.choice(ODD_VALUES)
    source = FeatureStore.open(run.small.store)
    budget = rng.choice((1, 4, NUM_TOKENS, 0, -1, NUM_TOKENS + 1, 2.5, True, "4"))

    def use() -> None:
        made = make_pruner(rng.choice((name, name[:-1])), **({field: value} if field else {}))
        if name == "oracle":
            raise ValueError("the small store has no relevance, on purpose")
        kept = keep_masks(made, source, np.array([0]), budget)
        assert int(kept.sum()) == budget

    refusal(use)


@dataclass(frozen=True)
class Kind:
    """One kind of bad input: what makes and checks one, and how many of them always run."""

    check: Callable[[random.Random, Run], None]
    count: int


KINDS = {
    "dataset": Kind(dataset, 140),
    "picture": Kind(picture, 180),
    "config": Kind(config, 140),
    "config_file": Kind(config_file, 80),
    "command": Kind(command, 100),
    "checkpoint": Kind(checkpoint, 90),
    "store": Kind(store, 80),
    "policy": Kind(policy, 60),
    "autoencoder": Kind(autoencoder, 40),
    "scorer": Kind(scorer, 60),
    "call": Kind(call, 120),
    "pruner": Kind(pruner, 40),
    "pruner_fields": Kind(pruner_fields, 80),
}
MORE = 8  # times as many behind ``slow``


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    run = make_small_run(tmp_path_factory.mktemp("small"))
    return SimpleNamespace(run=run, lvlm=load_lvlm(run.lvlm), before=files_under(run.root))


def check(small: SimpleNamespace, tmp_path: Path, kind: str, seed: int) -> None:
    logging.disable(logging.ERROR)  # hundreds of warnings say nothing
    try:
        with alarm(SECONDS):
            KINDS[kind].check(generator(kind, seed), Run(small.run, small.lvlm, tmp_path))
    finally:
        logging.disable(logging.NOTSET)


def seeds(first: int, times: int) -> list[Any]:
    return [
        pytest.param(kind, seed, id=f"{kind}-{seed}")
        for kind, row in KINDS.items()
        for seed in range(first * row.count, (first + times) * row.count)
    ]


@pytest.mark.parametrize(("kind", "seed"), seeds(0, 1))
def test_bad_input_ends_well(small, tmp_path, kind, seed):
    check(small, tmp_path, kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), seeds(1, MORE))
def test_more_bad_input_ends_well(small, tmp_path, kind, seed):
    check(small, tmp_path, kind, seed)


def test_the_default_suite_has_five_hundred():
    assert sum(kind.count for kind in KINDS.values()) >= 500


def test_nothing_touched_what_was_given(small):
    """Runs last in this file: the shared folders are as they were."""
    assert files_under(small.run.root) == small.before


def test_the_toy_scorer_itself_is_right():
    """The scorer kind's environment gives the plain numbers without an odd scorer."""
    source = ToyStore(samples=6, tokens=8)
    scores = ToyScorer(source)(np.arange(6), np.ones((6, 8), bool))
    assert ((scores >= 0) & (scores <= 1)).all()
