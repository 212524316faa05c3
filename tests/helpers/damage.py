"""Byte flips in the Arrow files of a store whose checksums are right all the same.

Run as a script on a store's folder, so that a crash of the process is a return code.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from tprl_env.data.features.manifest import StoreError, seal
from tprl_env.data.features.store import FeatureStore


def read_everything(store: FeatureStore) -> None:
    """Every cell that this package ever reads."""
    every = np.arange(len(store))
    store.exists(every), store.query(every), store.query_tokens(every), store.codes(every)
    for sample in range(len(store)):
        store.tokens(sample), store.tower(sample), store.cls_attention(sample)
        store.relevance(sample), store.grid(sample), store.picture(sample)
        store.prompt_ids(sample), store.question_span(sample), store.answer_ids(sample)
        store.question(sample), store.answers(sample), store.id(sample)
        store.question_type(sample), store.grader(sample)
        store.image_id(store.image_number(sample))


def with_right_checksum(folder: Path, name: str, data: bytes) -> None:
    """Write a data file and record its checksum, as a damaged memory would have done."""
    (folder / name).write_bytes(data)
    description = "manifest.json" if not name.startswith("channel-") else f"{name[:-6]}.json"
    content = json.loads((folder / description).read_text())
    entry = content["files"][name] if "files" in content else content["file"]
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    rewrite(folder / description, content)


def rewrite(path: Path, content: dict) -> None:
    """Write a JSON file of a store as if it had been written so, its own checksum included."""
    content.pop("checksum", None)
    path.write_text(json.dumps(seal(content)))


def places(data: bytes, number: int, rng: np.random.Generator) -> list[int]:
    """Places of flips: half anywhere, half in the offsets and descriptions near the ends."""
    near = 3000
    anywhere = rng.integers(8, len(data) - 8, number // 2)
    start = rng.integers(8, min(near, len(data) - 8), number // 4)
    stop = len(data) - 8 - rng.integers(0, min(near, len(data) - 16), number // 4)
    return [int(place) for place in (*anywhere, *start, *stop)]


def flip_and_read(folder: Path, name: str, number: int, seed: int) -> tuple[int, int]:
    """Flip one byte at a time; returns how many flips were refused and how many were read."""
    whole, rng = (folder / name).read_bytes(), np.random.default_rng(seed)
    refused = read = 0
    for place in places(whole, number, rng):
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        (folder / name).write_bytes(data)
        try:
            read_everything(FeatureStore.open(folder, verify="sizes"))
            read += 1
        except StoreError:
            refused += 1
    (folder / name).write_bytes(whole)
    return refused, read


if __name__ == "__main__":
    print(*flip_and_read(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
