"""A policy saved with all that belongs to it: round trip, card, hub, damage, other LVLMs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lvlm_fixtures import LLAVA15_CHAT_TEMPLATE, QUESTIONS, pictures, save_llava
from PIL import Image
from small_run import SmallRun, make_small_run

pytest.importorskip("transformers")

import huggingface_hub
from transformers import AutoModelForImageTextToText, AutoProcessor

from tprl_env.evaluation import evaluate_store
from tprl_env.inference import PrunedLVLM, TokenPruner
from tprl_env.inference.bundle import FILES, PRUNER_NAME
from tprl_env.lvlm import load_lvlm
from tprl_env.policy import TokenAutoencoder
from tprl_env.reducers import make_reducer
from tprl_env.rllib.config import load_config

TRAINING = {
    **{"algorithm": "GRPO", "preset": "grpo", "seconds": 1.5, "lvlm_scores": 32},
    **{"env_steps": 32, "seed": 0},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def run(small: SmallRun) -> Path:
    """A training run's folder as `tprl train` leaves it, without what a bundle does not read."""
    place = small.root / "run"
    config = load_config(
        "grpo", {"source": str(small.store), "lvlm": str(small.lvlm), "rules.budget": (2, 6)}
    )
    shutil.copytree(small.policy, place / "policy")
    shutil.copytree(small.autoencoder, small.store / "autoencoder")  # as `tprl autoencoder` does
    (place / "config.json").write_text(json.dumps(config.as_dict()))
    (place / "policy" / "training.json").write_text(json.dumps(TRAINING))
    return place


@pytest.fixture(scope="module")
def pruner(small: SmallRun, run: Path) -> TokenPruner:
    evaluate_store(
        small.store, str(small.lvlm), small.root / "table", policy=run / "policy",
        pruners=["uniform"], budgets=(6, 3), trajectories=0,
    )  # fmt: skip
    return TokenPruner.from_run(run, results=small.root / "table")


@pytest.fixture(scope="module")
def folder(small: SmallRun, pruner: TokenPruner) -> Path:
    return pruner.save_pretrained(small.root / "saved", license="apache-2.0")


@pytest.fixture(scope="module")
def model(small: SmallRun) -> Any:
    return AutoModelForImageTextToText.from_pretrained(small.lvlm).eval()


@pytest.fixture(scope="module")
def inputs(small: SmallRun) -> Any:
    processor = AutoProcessor.from_pretrained(small.lvlm)
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    return processor(images=pictures(3), text=texts, return_tensors="pt", padding=True)


def test_it_prunes_as_the_same_policy_does_from_picture_and_question(
    small: SmallRun, folder: Path, model: Any, inputs: Any
) -> None:
    pruned = TokenPruner.from_pretrained(folder).prune(model, inputs, budget=5)
    wanted = PrunedLVLM.load(str(small.lvlm), policy=small.policy, autoencoder=small.autoencoder)
    answers = wanted.answer_batch(pictures(3), list(QUESTIONS), 5)
    assert [keep.tolist() for keep in pruned.keep] == [one.keep.tolist() for one in answers]
    assert len({tuple(keep) for keep in pruned.keep}) == 3
    words = AutoProcessor.from_pretrained(small.lvlm)
    ids = model.generate(**pruned, max_new_tokens=20, do_sample=False)
    texts = words.batch_decode(ids[:, pruned["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [one.text for one in answers]


def test_what_was_saved_comes_back(pruner: TokenPruner, folder: Path, model: Any, inputs: Any):
    again = TokenPruner.from_pretrained(folder, redundancy_penalty=2.0)
    assert again.origin == pruner.origin and again.question == pruner.question
    assert again.budget == pruner.budget == 6
    assert again.reducer.redundancy_penalty == 2.0 and pruner.reducer.redundancy_penalty == 0.0
    assert again.prune(model, inputs).counts == [6, 6, 6]
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(
        [*FILES, PRUNER_NAME, "README.md"]
    )
    origin = pruner.origin
    assert (origin.budgets, origin.samples, origin.model_type) == ((2, 6), 12, "llava")
    assert [row["budget"] for row in origin.results] == [16, 6, 3]
    assert origin.training == TRAINING


def test_the_card_has_valid_metadata_and_the_figures(
    small: SmallRun, pruner: TokenPruner, folder: Path
) -> None:
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "tprl-env" and card.data.license == "apache-2.0"
    measured = [(r.metric_name, r.metric_value) for r in card.data.eval_results]
    rows = [row for row in pruner.origin.results if row["knowledge"] == "policy"]
    assert measured == [
        (f"accuracy at {row['mean_tokens']:g} visual tokens", row["accuracy"]) for row in rows
    ]
    for text in (
        pruner.origin.lvlm_fingerprint, pruner.origin.lvlm_signature, "12 samples", "GRPO",
        "2 to 6 visual tokens", "| all tokens | 16 visual tokens |", "questions.jsonl",
    ):  # fmt: skip
        assert text in card.text, text


def test_the_cards_example_runs_as_it_stands(
    folder: Path, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S
    )
    processor = AutoProcessor.from_pretrained(small.lvlm)
    if processor.chat_template is None:  # the real checkpoints have one
        (small.lvlm / "chat_template.jinja").write_text(LLAVA15_CHAT_TEMPLATE)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    (small.lvlm / "chat_template.jinja").unlink(missing_ok=True)
    assert names["pruned"].counts == [6] and capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("name", [*FILES, PRUNER_NAME])
def test_damage_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = (broken / name).read_bytes()
    middle = len(data) // 2
    (broken / name).write_bytes(data[:middle] + b"0" + data[middle + 1 :])
    with pytest.raises(ValueError, match=f"{name}.*(again|differ)"):
        TokenPruner.from_pretrained(broken)
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        TokenPruner.from_pretrained(broken)


def test_a_save_that_was_cut_off_is_no_bundle(pruner: TokenPruner, tmp_path: Path, monkeypatch):
    pruner.save_pretrained(tmp_path / "b")

    def full(*args: Any, **more: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tprl_env.inference.bundle.write_text", full)
    with pytest.raises(OSError, match="disk full"):
        pruner.save_pretrained(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="saved whole"):
        TokenPruner.from_pretrained(tmp_path / "b")


def test_a_bundle_of_a_later_release_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "later")
    path = tmp_path / "later" / PRUNER_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="version 2, this release reads 1; install"):
        TokenPruner.from_pretrained(tmp_path / "later")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = save_llava(tmp_path_factory.mktemp("other") / "lvlm", seed=1)
    return AutoModelForImageTextToText.from_pretrained(place).eval()


def test_another_lvlm_is_refused_or_warned_about(folder: Path, other: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"trained on .*allow_other_lvlm=True"):
        TokenPruner.from_pretrained(folder).prune(other, inputs)
    brave = TokenPruner.from_pretrained(folder, allow_other_lvlm=True)
    with pytest.warns(UserWarning, match="nobody has measured"):
        assert brave.prune(other, inputs).counts == [6, 6, 6]


def test_the_same_lvlm_in_another_type_is_no_other(folder: Path, small: SmallRun, inputs: Any):
    from tprl_env.lvlm.processed.identity import model_signature

    wanted = TokenPruner.from_pretrained(folder).origin.lvlm_signature
    model = AutoModelForImageTextToText.from_pretrained(small.lvlm, dtype=torch.bfloat16)
    assert model_signature(model) == wanted
    half = AutoModelForImageTextToText.from_pretrained(small.lvlm).half()
    published = model_signature(half)  # a checkpoint of float16
    assert published == model_signature(half.float()) == model_signature(half.bfloat16())
    model = AutoModelForImageTextToText.from_pretrained(small.lvlm)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"the weights of .* are others"):
        TokenPruner.from_pretrained(folder).prune(model, inputs)


class FakeHub:
    """Repositories in folders, by the calls that are used of `huggingface_hub`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: list[dict[str, Any]] = []

    def HfApi(self) -> FakeHub:
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        self.commits.append({"repo": repo_id, "message": commit_message})
        return SimpleNamespace(commit_url=f"hub://{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, revision: Any, allow_patterns: list[str]) -> str:
        if not (self.root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository")
        place = self.root / "cache" / repo_id
        for name in allow_patterns:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / repo_id / name, place / name)
        return str(place)


def test_the_hub_gives_back_what_was_pushed(
    pruner: TokenPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a local stand-in; not run against the real hub."""
    hub = FakeHub(tmp_path)
    for name in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    where = pruner.push_to_hub("me/pruner", commit_message="first")
    assert where == "hub://me/pruner/commit/1"
    assert hub.commits == [{"repo": "me/pruner", "message": "first"}]
    assert 'from_pretrained("me/pruner")' in (tmp_path / "me/pruner/README.md").read_text()
    again = TokenPruner.from_pretrained("me/pruner")
    assert again.origin == pruner.origin
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor a reachable hub"):
        TokenPruner.from_pretrained("me/nothing")
    with pytest.raises(ValueError, match="'owner/name', got 'pruner'"):
        pruner.push_to_hub("pruner")


def test_the_pages_blocks_run_in_order(
    small: SmallRun, run: Path, folder: Path, model: Any, inputs: Any, tmp_path: Path, monkeypatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "inference.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    shutil.copytree(folder, tmp_path / "my" / "policy")
    shutil.copytree(run, tmp_path / "runs" / "mine")
    shutil.copytree(small.root / "table", tmp_path / "runs" / "mine-table")
    (tmp_path / "a.png").write_bytes((small.data.parent / "0.png").read_bytes())
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.HfApi)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": model, "processor_inputs": inputs, "lvlm": str(small.lvlm)}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert len(blocks) >= 2 and names["inputs"].counts == [3, 3, 3]
    assert hub.commits[0]["repo"] == "me/my-policy"


def test_only_a_policy_of_a_run_is_saved(pruner: TokenPruner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"make_reducer\('divprune'\)"):
        TokenPruner(make_reducer("divprune")).save_pretrained(tmp_path)
    bare = TokenPruner(pruner.reducer, pruner.autoencoder)
    with pytest.raises(ValueError, match=r"TokenPruner.from_run\(run\)"):
        bare.save_pretrained(tmp_path)


def test_results_of_another_policy_are_refused(small: SmallRun, run: Path, pruner: TokenPruner):
    place = run / "policy" / "training.json"
    place.write_text(json.dumps({**TRAINING, "seed": 1}))
    try:
        with pytest.raises(ValueError, match="is about another policy"):
            TokenPruner.from_run(run, results=small.root / "table")
    finally:
        place.write_text(json.dumps(TRAINING))


def test_another_autoencoder_than_the_one_of_the_codes_is_refused(
    small: SmallRun, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no autoencoder in .*autoencoder="):
        TokenPruner.from_run(run, autoencoder=tmp_path / "none")
    config = TokenAutoencoder.from_pretrained(small.autoencoder).config
    TokenAutoencoder(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is another .* than the one that made the codes"):
        TokenPruner.from_run(run, autoencoder=tmp_path / "other")


def test_a_question_that_cannot_be_found_is_named(
    folder: Path, model: Any, inputs: Any, small: SmallRun
) -> None:
    pruner = TokenPruner.from_pretrained(folder)
    wanted = pruner.prune(model, inputs)
    spans = []
    lvlm = load_lvlm(small.lvlm)
    for row, question in enumerate(QUESTIONS):
        start, stop = lvlm.prompt(question).question_span
        size = len(lvlm.prompt(question).ids) + 15
        padding = inputs["input_ids"].shape[1] - size
        assert int(inputs["attention_mask"][row].sum()) == size
        spans.append((start + 15 + padding, stop + 15 + padding))
    pointed = pruner.prune(model, inputs, question_spans=spans)
    assert all(np.array_equal(a, b) for a, b in zip(pointed.keep, wanted.keep, strict=True))
    cut = {name: value[:, :-1] if value.ndim == 2 else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"prompt 0: the question cannot be found.*question_spans"):
        pruner.prune(model, cut)
    with pytest.raises(ValueError, match=r"question_spans\[0\] is \(0, 9\).*no image placeholder"):
        pruner.prune(model, inputs, question_spans=[(0, 9)] * 3)
    bare = TokenPruner(pruner.reducer, pruner.autoencoder)
    with pytest.raises(ValueError, match="'policy' looks at the question"):
        bare.prune(model, inputs, 3)
