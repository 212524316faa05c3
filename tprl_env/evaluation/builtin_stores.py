"""The built-in scenes as encoded stores: training, calibration and test split with codes."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tprl_env.data.features.store import FeatureStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tprl_env.lvlm.protocol import LVLM


@dataclass(frozen=True)
class QuickstartSettings:
    """Size and place of a quickstart run.

    Attributes:
        task: ``crowded`` or ``sparse``.
        out: Folder of everything the run writes.
        preset: Config of ``rllib_configs/``.
        seed: Seed of data order, demonstrations, policy and training.
        scale: Multiplies the sizes below; 1 takes about ten minutes on two cores.
        train_questions: Questions of the training store.
        calibration_questions: Questions of the calibration store.
        test_questions: Questions of the test store.
        code_width: Width of the codes.
    """

    task: str = "crowded"
    out: Path = field(default_factory=lambda: Path("runs/quickstart"))
    preset: str = "recommended"
    seed: int = 0
    scale: float = 1.0
    train_questions: int = 6000
    calibration_questions: int = 600
    test_questions: int = 1800
    code_width: int = 64

    def sized(self, count: int) -> int:
        """A count multiplied by ``scale``, at least one scene's questions."""
        return max(12, round(count * self.scale))


class Stopwatch:
    """Prints what is going on and how long it took."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Time one stage."""
        begin = time.perf_counter()
        print(f"[{begin - self.start:6.1f} s] {what}", flush=True)
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)


def encode_split(
    settings: QuickstartSettings, lvlm: LVLM, split: str, questions: int
) -> FeatureStore:
    """Encode one split of the built-in scenes, with the LVLM's question-token attention."""
    from tprl_env.data import load_dataset
    from tprl_env.lvlm.encoding.encode import encode_dataset
    from tprl_env.lvlm.encoding.saliency import add_question_attention

    name = f"scenes-{settings.task}"
    samples = load_dataset(name, split, limit=questions, seed=settings.seed)
    description = {"data": name, "split": split, "limit": questions, "seed": settings.seed}
    store = encode_dataset(lvlm, samples, settings.out / "stores" / split, description=description)
    if not store.has_channel("question_attention"):
        add_question_attention(store, lvlm)
    return store


def encode_all(
    settings: QuickstartSettings, lvlm: LVLM, watch: Stopwatch
) -> dict[str, FeatureStore]:
    """Training, calibration and test stores with codes."""
    from tprl_env.policy.autoencoder_training import (
        TokenAutoencoder,
        train_autoencoder,
        write_codes,
    )

    sizes = {
        "train": settings.sized(settings.train_questions),
        "calibration": settings.sized(settings.calibration_questions),
        "test": settings.sized(settings.test_questions),
    }
    stores = {}
    for split, questions in sizes.items():
        with watch.stage(f"encode {split}", f"encoding {questions} {split} questions"):
            stores[split] = encode_split(settings, lvlm, split, questions)
    folder = settings.out / "autoencoder"
    with watch.stage("autoencoder", f"token autoencoder, code width {settings.code_width}"):
        if folder.is_dir():
            autoencoder = TokenAutoencoder.from_pretrained(folder)
        else:
            steps = max(20, round(1500 * min(1.0, settings.scale)))
            autoencoder, report = train_autoencoder(
                stores["train"], code_width=settings.code_width, steps=steps, seed=settings.seed
            )
            autoencoder.save_pretrained(folder)
            print(
                f"           explained variance {report.explained_variance:.4f} on held-out images"
            )
        for store in stores.values():
            if not store.has_channel("codes"):
                write_codes(store, autoencoder)
    return {split: FeatureStore.open(store.path) for split, store in stores.items()}


@contextmanager
def all_threads() -> Iterator[None]:
    """Let torch use every core, for the stages that run alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # a container may have fewer than the host
    try:
        yield
    finally:
        torch.set_num_threads(before)
