"""The house: imports go downward only, no circles, few folders, short files and functions."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS, ROOT_MODULES, FILE_LINES, FUNCTION_LINES = 10, 5, 400, 60

# A room may import rooms of later lines, never others of its own line. "" is tprl_env/__init__.py,
# which holds the version and names what it exports as strings.
FLOORS = (
    ("cli",),
    ("rllib",),
    ("rllib.experiments",),
    ("rllib.run",),
    ("rllib.algorithms",),
    ("rllib.rollout",),
    ("rllib.config",),
    ("inference",),
    ("evaluation",),
    ("scoring", "policy"),
    ("lvlm", "env"),
    ("reducers",),
    ("data",),
    ("checks", "files", "ray_session", "ray_reaper"),
    ("",),
)
# Who may import a package: rooms, or single files of rooms that otherwise must not.
PACKAGES = {
    "ray": (
        *("cli", "rllib.experiments", "rllib.run", "rllib.algorithms", "rllib.rollout"),
        *("scoring.pool", "scoring.routing", "lvlm.encoding.encode_with_ray", "ray_session"),
    ),
    "torch": (
        *("rllib.run", "rllib.algorithms", "rllib.rollout", "inference", "policy", "lvlm"),
        *("reducers", "scoring.lvlm_scorer", "evaluation.builtin_stores"),
        *("evaluation.trajectories", "evaluation.reducers", "evaluation.reducer_flops"),
        *("evaluation.efficiency", "cli.efficiency"),
    ),
    "transformers": ("lvlm",),
    "gymnasium": ("rllib.rollout", "env", ""),
    "lmms_eval": ("inference.harness",),
    "matplotlib": ("evaluation",),
    **dict.fromkeys(("benchmarks", "rllib_configs", "tests"), ()),  # they stand on the package
    "": (),  # a relative import; there is one way to write a path
}

ORDER = {room: number for number, floor in enumerate(FLOORS) for room in floor}
Functions = (ast.FunctionDef, ast.AsyncFunctionDef)
Sources = Mapping[str, str]
parse = functools.cache(ast.parse)


def read(*folders: str) -> dict[str, str]:
    """Module name to source text."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return {
        n.removesuffix(".__init__"): p.read_text("utf-8") for n, p in zip(names, files, strict=True)
    }


def imports(sources: Sources, module: str, in_functions: bool = True) -> Iterator[str]:
    """What a module imports; ``if TYPE_CHECKING:`` counts, for a reader has to follow it too."""
    waiting: list[ast.AST] = [parse(sources[module])]
    while waiting:
        node = waiting.pop()
        if in_functions or not isinstance(node, Functions):
            waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "" if node.level else node.module
            for name in (f"{origin}.{alias.name}" for alias in node.names):
                yield name if name in sources else origin


def room(module: str) -> str:
    """The room of a module of the package; an inner room of ``rllib`` where it lies in one."""
    parts = module.split(".")[1:]
    inner = ".".join(parts[:2])
    return inner if inner in ORDER else ".".join(parts[:1])


def allowed(module: str, target: str) -> bool:
    head = target.split(".")[0]
    if head == "tprl_env":
        here, there = room(module), room(target)
        return here == there or ORDER.get(here, -1) < ORDER.get(there, -1)
    inside = module.partition(".")[2]
    return head not in PACKAGES or any(f"{inside}.".startswith(f"{p}.") for p in PACKAGES[head])


def forbidden(sources: Sources) -> list[str]:
    """Imports that the tables forbid; those inside functions count."""
    return [f"{m} -> {t}" for m in sources for t in imports(sources, m) if not allowed(m, t)]


def circle(sources: Sources) -> list[str]:
    """One circle of files, if there is any.

    An import inside a function is left out: so a light file opens a heavy one of its own room when
    it is called, as `tprl_env.lvlm` does with the families.
    """
    graph = {m: set(imports(sources, m, False)) & sources.keys() for m in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def too_long(sources: Sources) -> list[str]:
    """Files and functions above the limits; signature, decorators and docstring are free."""
    lengths = {m: len(text.splitlines()) for m, text in sources.items()}
    found = [f"{m} has {length} lines" for m, length in lengths.items() if length > FILE_LINES]
    for module, text in sources.items():
        for node in (n for n in ast.walk(parse(text)) if isinstance(n, Functions)):
            body = node.body[ast.get_docstring(node) is not None :] or node.body[-1:]
            length = body[-1].end_lineno - body[0].lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{module}.{node.name} has {length} lines")
    return found


PACKAGE = read("tprl_env")


def test_imports_go_downward_only():
    assert forbidden(PACKAGE) == []


def test_no_circle_between_files():
    assert circle(PACKAGE) == []


def test_every_entry_of_the_tables_is_needed():
    assert {room(module) for module in PACKAGE} == ORDER.keys()
    uses = {(m.partition(".")[2], t.split(".")[0]) for m in PACKAGE for t in imports(PACKAGE, m)}
    for package, places in PACKAGES.items():
        users = [f"{inside}." for inside, used in uses if used == package]
        unused = [p for p in places if not any(user.startswith(f"{p}.") for user in users)]
        assert not unused, f"{unused} need not import {package} any more"


def test_few_folders_and_few_modules_in_the_root():
    inside = list((ROOT / "tprl_env").iterdir())
    # a folder counts by its source: a checkout keeps caches where a folder was
    assert sum(any(path.glob("*.py")) for path in inside) <= FOLDERS
    assert sum(path.suffix == ".py" for path in inside) <= ROOT_MODULES


def test_files_and_functions_are_short():
    assert too_long(PACKAGE | read("rllib_configs", "benchmarks")) == []


HEAD = '@decorated\ndef long(\n    a: int,\n) -> None:\n    """Doc\n    string."""\n'


@pytest.mark.parametrize(
    ("check", "planted", "found"),
    [
        (forbidden, {"tprl_env.env.rules": "import tprl_env.policy.network"}, True),
        (forbidden, {"tprl_env.policy.x": "import tprl_env.scoring.cache"}, True),  # one line
        (forbidden, {"tprl_env.rllib.config": "import tprl_env.rllib.run.train"}, True),
        (forbidden, {"tprl_env.data.x": "if TYPE_CHECKING:\n import tprl_env.env"}, True),
        (forbidden, {"tprl_env.data.x": "def f():\n    from torch import nn"}, True),
        (forbidden, {"tprl_env.scoring.cache": "from ray.util import queue"}, True),
        (forbidden, {"tprl_env.data.x": "from . import sample"}, True),
        (forbidden, {"tprl_env.env.x": "from tprl_env.data import sample\nimport numpy"}, False),
        (forbidden, {"tprl_env.scoring.pool": "import ray, tprl_env.lvlm.base"}, False),
        (circle, {"a": "import b", "b": "if TYPE_CHECKING:\n    from a import x"}, True),
        (circle, {"a": "def f():\n    import b", "b": "import a"}, False),
        (too_long, {"m": "\n" * 401}, True),
        (too_long, {"m": HEAD + "    a = 1\n" * 61}, True),
        (too_long, {"m": HEAD + "    a = 1\n" * 60}, False),
    ],
)
def test_planted_violations_are_found(check, planted, found):
    assert bool(check(planted)) == found
