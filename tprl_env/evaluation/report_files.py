"""Draws what belongs to a finished comparison: plots, trajectories, then the page.

The numbers are written before, so a picture that fails costs a warning and none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tprl_env.evaluation.plots import attempt, plot_accuracy, plot_learning_curve
from tprl_env.evaluation.report import write_report
from tprl_env.evaluation.result_files import (
    CURVE_NAME,
    RESULTS_NAME,
    is_of_run,
    read_results,
    write_results,
)
from tprl_env.evaluation.trajectories import Examples
from tprl_env.files import JsonLog


def write_pictures(
    out: Path, results: Mapping[str, Any], *, draw: Callable[[], Examples] | None = None
) -> dict[str, Any]:
    """Draw the plots and the trajectories, ``report.html`` with those that could be drawn.

    A picture that cannot be drawn is a warning that names it. ``results.json`` is written again
    at the end: with the checksums of all files and with how the examples were chosen.

    Args:
        out: Folder that `write_data` has filled.
        results: Content of its ``results.json``.
        draw: Draws the trajectories; by default those that the results name are kept.

    Returns:
        Content of ``results.json``.
    """
    run = str(results.get("run", ""))
    place = out / "accuracy.png"
    captions = {place: "Accuracy against tokens kept; bands: 95 % intervals."}
    drawn = [attempt(str(place), partial(plot_accuracy, results, place))]
    points = JsonLog(out / CURVE_NAME).read() if (out / CURVE_NAME).is_file() else []
    if points and "curve_full_accuracy" in results:
        place, full = out / "learning_curve.png", results["curve_full_accuracy"]
        captions[place] = (
            "The policy on calibration questions while it learns, without redundancy penalty; "
            "bands: 95 % intervals."
        )
        drawn.append(attempt(str(place), partial(plot_learning_curve, points, full, place, run)))
    examples = stored_examples(out, results) if draw is None else None
    if draw is not None:
        examples = attempt(str(out / "trajectories"), draw)
    figures = [(path, captions[path]) for path in drawn if path is not None]
    page = out / "report.html"
    attempt(str(page), partial(write_report, results, figures, examples, page))
    told = {name: value for name, value in results.items() if name != "examples"}
    if examples is not None:
        pictures = [
            {"file": path.relative_to(out).as_posix(), "caption": caption}
            for path, caption in examples.pictures
        ]
        told["examples"] = {"chosen": examples.chosen, "pictures": pictures}
    return write_results(out, told)


def stored_examples(out: Path, results: Mapping[str, Any]) -> Examples | None:
    """The trajectories that a results file names, as far as their pictures are there."""
    told = results.get("examples")
    if not told:
        return None
    pictures = [(out / one["file"], str(one["caption"])) for one in told["pictures"]]
    whole = [(path, caption) for path, caption in pictures if is_of_run(path, results)]
    return Examples(whole, str(told["chosen"])) if whole else None


def rebuild_report(folder: str | Path) -> Path:
    """Draw plots and page of a finished comparison again from its stored numbers (``tprl report``).

    Nothing is trained or measured. The trajectories are kept: they need the policy and the LVLM.

    Args:
        folder: With ``results.json`` and its files.

    Returns:
        The page.

    Raises:
        ValueError: The folder holds no results, or damaged or mixed ones.
    """
    folder = Path(folder)
    results = read_results(folder / RESULTS_NAME, pictures=False)
    write_pictures(folder, results)
    page = folder / "report.html"
    if not page.is_file():
        raise ValueError(f"{page} could not be written; the warning above says why")
    return page
