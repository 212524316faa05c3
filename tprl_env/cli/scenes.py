"""``tprl scenes``: a built-in dataset as pictures and a file of questions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_env.checks import did_you_mean
from tprl_env.cli.parsing import at_least_one, path

if TYPE_CHECKING:
    from tprl_env.data import Sample

__all__ = ["add_scenes", "write_scenes"]

FILE_NAME = "questions.jsonl"


def write_scenes(samples: list[Sample], out: Path) -> Path:
    """Write samples as `tprl encode --data FILE` reads them; the file of questions comes last.

    Args:
        samples: What is written; samples of one image share its picture.
        out: A folder that does not exist or is empty.

    Returns:
        The file of questions.

    Raises:
        ValueError: The folder holds something.
    """
    from PIL import Image

    from tprl_env.files import write_atomically, write_text

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    rows, drawn = [], set()
    for sample in samples:
        name = f"{sample.image_id}.png"
        if name not in drawn:
            picture = Image.fromarray(sample.image)
            write_atomically(out / name, lambda stream, p=picture: p.save(stream, "PNG"))  # type: ignore[misc]
            drawn.add(name)
        row = {"id": sample.id, "image": name, "question": sample.question}
        rows.append({**row, "answers": list(sample.answers), "question_type": sample.question_type})
    return write_text(out / FILE_NAME, "".join(f"{json.dumps(row)}\n" for row in rows))


def _run(args: argparse.Namespace) -> int:
    from tprl_env.data import DATASETS, load_dataset

    if args.data not in DATASETS:
        raise ValueError(
            f"unknown dataset {args.data!r}, known are {', '.join(DATASETS)}"
            f"{did_you_mean(args.data, DATASETS)}"
        )
    samples = list(load_dataset(args.data, args.split, limit=args.limit, seed=args.seed))
    file = write_scenes(samples, args.out)
    pictures = len({sample.image_id for sample in samples})
    print(f"{len(samples)} questions about {pictures} pictures in {file}")
    return 0


def add_scenes(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser(
        "scenes", help="write a built-in dataset as PNG pictures and a questions.jsonl"
    )
    sub.add_argument("--data", default="scenes-sparse", help="scenes-crowded or scenes-sparse")
    sub.add_argument("--split", default="test", help="train, calibration or test")
    sub.add_argument("--limit", type=at_least_one, default=12, help="number of questions")
    sub.add_argument("--seed", type=int, default=0, help="chooses other scenes of the split")
    sub.add_argument("--out", type=path, required=True, help="new folder")
    sub.set_defaults(run=_run)
