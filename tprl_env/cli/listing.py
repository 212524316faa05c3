"""``tprl list KIND``: the names that commands take, what each is, and its defaults."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Entry", "add_list", "entries"]


@dataclass(frozen=True)
class Entry:
    """One name.

    Attributes:
        name: As commands take it.
        about: One line.
        defaults: Its own settings and their values.
    """

    name: str
    about: str
    defaults: dict[str, Any] = field(default_factory=dict)


def _presets() -> list[Entry]:
    from tprl_env.rllib.config import load_config, presets_folder

    shown = (
        *("algorithm.name", "policy.distribution", "rules.budget", "rules.max_steps"),
        *("imitation.demonstrator", "limits.max_scores", "limits.iterations"),
    )
    return [
        Entry(name, about, {each: load_config(name).flat()[each] for each in shown})
        for name, about in _files(presets_folder())
    ]


def _experiments() -> list[Entry]:
    from tprl_env.rllib.config import presets_folder
    from tprl_env.rllib.experiments.definition import Experiment, load_experiment

    found = []
    for name, about in _files(presets_folder() / "experiments"):
        one = load_experiment(name)
        values: dict[str, Any] = {"preset": one.preset, "max_scores": one.max_scores}
        if isinstance(one, Experiment):
            values |= {"tasks": one.tasks, "arms": tuple(one.arms), "seeds": one.seeds}
        else:
            values |= {"trials": one.trials, "space": tuple(one.space)}
        found.append(Entry(name, about, values))
    return found


def _files(folder: Path) -> Iterable[tuple[str, str]]:
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            yield path.stem, _first_line(ast.get_docstring(ast.parse(path.read_text("utf-8"))))


def _pruners() -> list[Entry]:
    from tprl_env.reducers import PRUNERS

    trained = "What a trained policy keeps: give its folder as --policy."
    return [*_methods(PRUNERS), Entry("policy", trained)]


def _reducers() -> list[Entry]:
    from tprl_env.reducers import REDUCERS

    return _methods(REDUCERS)


def _layer_pruners() -> list[Entry]:
    from tprl_env.reducers.layer import LAYER_PRUNERS

    return _methods(LAYER_PRUNERS)


def _methods(table: dict[str, Any]) -> list[Entry]:
    return [
        Entry(name, _first_line(inspect.getdoc(method)), _defaults(method))
        for name, method in table.items()
    ]


def _defaults(method: type[Any]) -> dict[str, Any]:
    return {
        each.name: each.default
        for each in dataclasses.fields(method)
        if each.default is not dataclasses.MISSING
    }


def _datasets() -> list[Entry]:
    from tprl_env.data import DATASETS, DEFAULT_SCENES, QUESTIONS_PER_SCENE
    from tprl_env.data.scenes import SPLITS, TASKS

    found = []
    for name, task in DATASETS.items():
        (fewest, most), _ = TASKS[task]
        about = f"Questions about drawn scenes of {fewest} to {most} digits, 96 x 96 pixels."
        limit = DEFAULT_SCENES * QUESTIONS_PER_SCENE
        found.append(Entry(name, about, {"splits": SPLITS, "limit": limit, "seed": 0}))
    return [*found, Entry("FILE.jsonl", "Your questions, one JSON object per line.")]


def _benchmarks() -> list[Entry]:
    from tprl_env.data.benchmarks import BENCHMARKS

    found = []
    for name, one in BENCHMARKS.items():
        about = f"{one.title}, {one.hub} on the hub{f': {one.note}' if one.note else ''}."
        found.append(Entry(name, about, {"splits": tuple(one.splits), "grader": one.grader}))
    return found


def _lvlms() -> list[Entry]:
    from tprl_env.data.scenes import TASKS
    from tprl_env.lvlm import FAMILIES

    built_in = [
        Entry(f"builtin:{task}", f"Ships with the package, trained on scenes-{task}.")
        for task in TASKS
    ]
    about = f"A checkpoint of one of these families: {', '.join(FAMILIES)}."
    return [*built_in, Entry("FOLDER or HUB/ID", about)]


KINDS: dict[str, Callable[[], list[Entry]]] = {
    "presets": _presets,
    "experiments": _experiments,
    "pruners": _pruners,
    "reducers": _reducers,
    "layer-pruners": _layer_pruners,
    "datasets": _datasets,
    "benchmarks": _benchmarks,
    "lvlms": _lvlms,
}
_USED_BY = {
    "presets": "tprl train NAME",
    "experiments": "tprl compare NAME",
    "benchmarks": "tprl benchmark --benchmarks NAME,NAME; tprl encode --data NAME",
    "pruners": "tprl evaluate --pruners NAME,NAME; make_pruner(NAME) in Python",
    "reducers": "make_reducer(NAME) in Python",
    "layer-pruners": "tprl cliff --rules NAME,NAME; make_layer_pruner(NAME) in Python",
    "datasets": "tprl encode --data NAME",
    "lvlms": "--lvlm NAME",
}


def entries(kind: str) -> list[Entry]:
    """The names of a kind, a key of `KINDS`."""
    return KINDS[kind]()


def _first_line(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _list(args: argparse.Namespace) -> int:
    found = entries(args.kind)
    if args.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
        return 0
    print(f"{args.kind} ({_USED_BY[args.kind]})\n")
    for one in found:
        print(f"{one.name}\n    {one.about}")
        if one.defaults:
            shown = (f"{key}={_word(value)}" for key, value in one.defaults.items())
            print(f"    {'  '.join(shown)}")
    return 0


def add_list(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser("list", help="the names of presets, pruners, datasets, LVLMs, ...")
    sub.add_argument("kind", choices=tuple(KINDS), help="what to list")
    sub.add_argument("--json", action="store_true", help="print a JSON array instead")
    sub.set_defaults(run=_list)
