"""A tiny random LLaVA, a small .jsonl dataset and what the commands make of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lvlm_fixtures import QUESTIONS, pictures, save_llava
from PIL import Image

from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.encoding.saliency import add_question_attention
from tprl_env.policy.autoencoder_training import train_autoencoder, write_codes
from tprl_env.policy.network import PolicyConfig, PruningPolicy

KINDS = ("at", "exists", "color")


@dataclass(frozen=True)
class SmallRun:
    """Folders of one small, complete run."""

    root: Path
    lvlm: Path
    data: Path
    store: Path
    autoencoder: Path
    policy: Path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_dataset(folder: Path, images: int = 6, answers: list[str] | None = None) -> Path:
    """Two questions about each of some random pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(images)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [
        {
            "id": f"q{i}",
            "image": f"{i // 2}.png",
            "question": QUESTIONS[i % len(QUESTIONS)],
            "answers": [answers[i] if answers else str(i % 10)],
            "question_type": KINDS[i % len(KINDS)],
        }
        for i in range(2 * images)
    ]
    return write_jsonl(folder / "questions.jsonl", rows)


def spoken_answers(lvlm, data: Path) -> list[str]:
    """What the LVLM says itself, for two questions of three, so that some scores are 1."""
    samples = list(load_dataset(data))
    tokens = [v.tokens for v in lvlm.encode_images([s.image for s in samples])]
    said = lvlm.generate([lvlm.prompt(s.question) for s in samples], tokens)
    return [text if i % 3 and text.strip() else "7" for i, text in enumerate(said)]


def make_small_run(root: Path) -> SmallRun:
    """Encode, codes and a random policy, in a second or two."""
    run = SmallRun(
        root, root / "lvlm", root / "data" / "questions.jsonl", root / "store",
        root / "autoencoder", root / "policy",
    )  # fmt: skip
    save_llava(run.lvlm)
    lvlm = load_lvlm(run.lvlm)
    answers = spoken_answers(lvlm, write_dataset(root / "data"))
    write_dataset(root / "data", answers=answers)
    store = encode_dataset(lvlm, load_dataset(run.data), run.store, progress=False)
    add_question_attention(store, lvlm)
    autoencoder, _ = train_autoencoder(store, code_width=8, steps=20)
    autoencoder.save_pretrained(run.autoencoder)
    write_codes(store, autoencoder)
    write_policy(run.policy, FeatureStore.open(run.store))
    return run


def write_policy(folder: Path, store: FeatureStore, **changes: int) -> Path:
    torch.manual_seed(0)
    widths = {"token_width": store.code_width, "query_width": store.query_width} | changes
    PruningPolicy(PolicyConfig.question_aware(**widths)).save_pretrained(folder)
    return folder


def files_under(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to show that a refused command changed nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


def full_accuracy(run: SmallRun) -> float:
    return float(np.mean(FeatureStore.open(run.store).full_scores("exact")))
