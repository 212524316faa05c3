"""Bring finished experiments into the documentation.

    tprl compare NAME --shared runs/shared          (runs/compare/NAME)
    python -m benchmarks.experiments

Replaces what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` in
docs/experiments.md by the tables of that experiment, and copies its Parquet files and plots.
Experiments that have not been run leave their part as it is.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tprl_env.evaluation.experiment_tables import write_tables

MARK = re.compile(r"<!-- (?P<name>[a-z0-9_]+):begin -->")


def bring(name: str, runs: Path, record: Path, images: Path) -> str | None:
    """Tables of an experiment as Markdown, its files copied; None if it is not there."""
    folder = runs / name
    if not (folder / "experiment.json").is_file():
        return None
    write_tables(folder)
    record.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    for part in ("results", "curves"):
        shutil.copyfile(folder / f"{part}.parquet", record / f"{name}-{part}.parquet")
    links = []
    for picture in sorted(folder.glob("*.png")):
        shutil.copyfile(picture, images / f"{name}-{picture.name}")
        task, against = picture.stem.rsplit("-", 1)
        links.append(f"[`{task}` against {against}](images/experiments/{name}-{picture.name})")
    tables = (folder / "tables.md").read_text("utf-8").strip()
    return f"{tables}\n\nPlots: {', '.join(links)}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/experiments"))
    parser.add_argument("--doc", type=Path, default=Path("docs/experiments.md"))
    args = parser.parse_args(argv)
    text = args.doc.read_text("utf-8")
    for name in MARK.findall(text):
        try:
            tables = bring(name, args.runs, args.record, args.doc.parent / "images" / "experiments")
        except ValueError as error:  # unfinished: its part of the page stays as it is
            print(f"{name}: {error}")
            continue
        if tables is None:
            print(f"{name}: not run")
            continue
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        start, stop = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:start]}\n{tables}\n{text[stop:]}"
        print(f"{name}: brought")
    args.doc.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
