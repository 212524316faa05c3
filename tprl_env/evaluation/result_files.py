"""The files of one result: which belong together, and whether each is as it was written.

``results.json`` names the run that all files of a result carry, holds the sha256 of each of them
and its own checksum. It is written when the numbers are there, and again after the pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tprl_env.data.features.manifest import SEAL, check_seal, file_sha256, seal
from tprl_env.evaluation.results import RUN_KEY, check_results
from tprl_env.files import write_json

RESULTS_NAME = "results.json"
SCORES_NAME = "per_question.parquet"
CURVE_NAME = "learning_curve.jsonl"
_PAGE = ("report.html", "accuracy.png", "learning_curve.png")


def write_results(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``results.json`` with the checksums of the files beside it, and return its content."""
    data = [SCORES_NAME, *([CURVE_NAME] if "curve_full_accuracy" in results else [])]
    paths = [*(folder / name for name in data), *made_from_numbers(folder)]
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    content = {name: value for name, value in results.items() if name != SEAL}
    content = seal({**content, "files": files})
    write_json(folder / RESULTS_NAME, content)
    return content


def read_results(
    path: str | Path, budgets: Sequence[int] | None = None, *, pictures: bool = True
) -> dict[str, Any]:
    """Read and check a results file, and that the files beside it are those it was written with.

    A copy under another name than ``results.json`` is checked alone, whatever stands beside it.

    Args:
        path: The file, or the folder with `results.json`.
        budgets: Budgets that every method must have been measured at; by default those of the
            file.
        pictures: Check the page and the pictures too; they can be drawn again from the rest.

    Raises:
        ValueError: The file is missing, is not JSON, lacks something, holds a number that cannot
            be, was changed, or one of its files is missing, was changed or is of another run.
    """
    path = Path(path)
    if path.is_dir():
        path /= "results.json"
    if not path.is_file():
        raise ValueError(
            f"no results file at {path}; `tprl evaluate` or `tprl quickstart` write it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was not written here") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    try:
        check_results(content, budgets)
    except ValueError as error:
        reason = str(error).removeprefix("results: ")
        raise ValueError(f"{path}: {reason}") from error
    if path.name == RESULTS_NAME:
        made = made_from_numbers(path.parent) if pictures else []
        _check_one_run(path.parent, made, content.get("run"))
        _check_scores(path.parent / SCORES_NAME, content)
        _check_files(path, content.get("files", {}), pictures)
    check_seal(path, content, "restore it from a copy or run the evaluation again")
    return content


def made_from_numbers(folder: Path) -> list[Path]:
    """The page and the pictures beside a results file that are there."""
    strips = (folder / "trajectories").glob("trajectory-*.png")
    return [*(path for name in _PAGE if (path := folder / name).is_file()), *sorted(strips)]


def _check_one_run(folder: Path, made: Sequence[Path], run: object) -> None:
    """Refuse files beside ``results.json`` that another run wrote."""
    scores = folder / SCORES_NAME
    for path in [*([scores] if scores.is_file() else []), *made]:
        other = _run_of(path)
        if other != run:
            raise ValueError(
                f"{path} belongs to the run {other or 'without a name'}, results.json to "
                f"{run or 'one without a name'}; run the evaluation again, so that all are of one"
            )


def _check_files(path: Path, files: Any, pictures: bool) -> None:
    """Refuse a folder in which a file that ``results.json`` names is missing or was changed."""
    if not isinstance(files, Mapping):
        raise ValueError(f"{path}: 'files' must be an object, got {type(files).__name__}")
    for name, wanted in files.items():
        data = name in (SCORES_NAME, CURVE_NAME)
        if not data and not pictures:
            continue
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"{path}: 'files' names {name!r}, which is outside of its folder")
        cure = (
            "run the evaluation again" if data else f"draw it again with tprl report {path.parent}"
        )
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, but results.json names it among 'files'; {cure}")
        if file_sha256(file) != wanted:
            raise ValueError(
                f"{file} is not as it was written: its sha256 is not the one under 'files' in "
                f"results.json; {cure}"
            )


def _check_scores(path: Path, results: Mapping[str, Any]) -> None:
    """Refuse single scores beside ``results.json`` that do not add up to its accuracies."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return
    try:
        table = pq.read_table(path, columns=["method", "budget", "score"])
        means = table.group_by(["method", "budget"]).aggregate([("score", "mean")]).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); run the evaluation again") from error
    found = {(row["method"], row["budget"]): row["score_mean"] for row in means}
    for row in results["methods"]:
        mean = found.get((row["name"], row["budget"]))
        if mean is None or not abs(mean - row["accuracy"]) < 1e-4:
            raise ValueError(
                f"results: {row['name']!r} at {row['budget']} tokens has the accuracy "
                f"{row['accuracy']}, {path} {'no scores' if mean is None else mean}; run the "
                "evaluation again, so that both are of one"
            )


def is_of_run(path: Path, results: Mapping[str, Any]) -> bool:
    """Whether a picture is there, whole, and of these results."""
    try:
        return path.is_file() and _run_of(path) == results.get("run")
    except ValueError:
        return False


def _run_of(path: Path) -> str | None:
    """Which run a file beside ``results.json`` says it belongs to."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image, UnidentifiedImageError

    try:
        if path.suffix == ".parquet":
            value = (pq.read_schema(path).metadata or {}).get(RUN_KEY)
            return None if value is None else value.decode("utf-8", "replace")
        if path.suffix == ".png":
            with Image.open(path) as picture:
                return picture.info.get(RUN_KEY.decode())
        match = re.search(r"<meta name=run content=(\w+)>", path.read_text("utf-8", "replace"))
        return match[1] if match else None
    except (pa.ArrowException, UnidentifiedImageError, SyntaxError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); run the evaluation again") from error
