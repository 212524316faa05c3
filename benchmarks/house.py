"""Counts the house: rooms, modules, lines, public names, and what one call leads through.

A reader who follows one episode, or one ``sample()`` of the training runner, opens every file and
every function that it enters: those of ``tprl_env`` are counted while the call runs, by
``sys.setprofile``. ``--tree PATH`` counts another checkout beside this one.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or the same as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--tree", type=Path, help="another checkout, counted too")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(Path.cwd())))
        return 0
    trees = {"here": HERE} if args.tree is None else {"tree": args.tree.resolve(), "here": HERE}
    try:
        found = {name: in_subprocess(tree) for name, tree in trees.items()}
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(found) if args.json else table(found))
    return 0


def in_subprocess(tree: Path) -> dict[str, Any]:
    """`measure` in a process that imports ``tprl_env`` and ``rllib_configs`` of that tree.

    Raises:
        ValueError: There is no checkout, or its packages cannot be measured.
    """
    if not (tree / "tprl_env" / "__init__.py").is_file():
        raise ValueError(f"{tree} is no checkout: it has no tprl_env/__init__.py")
    done = subprocess.run(
        [sys.executable, "-P", __file__, "--measure"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "RAY_DISABLE_IMPORT_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{tree} cannot be measured: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(tree: Path) -> dict[str, Any]:
    """What is counted, of the tree that is imported from."""
    package = tree / "tprl_env"
    modules = sorted(package.rglob("*.py"))
    front = [path for path in modules if path.parent == package]
    rooms = [path for path in modules if path.parent.parent == package and path.stem == "__init__"]
    return {
        "rooms and cli": len(rooms),
        "modules in the root": len(front),
        "modules": len(modules),
        "lines": sum(len(path.read_text("utf-8").splitlines()) for path in modules),
        "public names": sum(len(public_names(path)) for path in front + rooms),
        "one episode": entered(episode(), package),
        "one training sample": entered(training_sample(), package),
    }


def public_names(path: Path) -> set[str]:
    """``__all__`` of a module; without one, its functions and classes without an underscore."""
    body = ast.parse(path.read_text("utf-8")).body
    tables = {
        target.id: node.value
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "__all__" in tables:
        return _strings(tables["__all__"], tables)
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")}


def _strings(node: ast.expr, tables: dict[str, ast.expr]) -> set[str]:
    """Names in a literal list or in the keys of a dict; ``*OTHER`` is looked up."""
    found: set[str] = set()
    for part in node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", []):
        if isinstance(part, ast.Starred) and isinstance(part.value, ast.Name):
            found |= _strings(tables[part.value.id], tables)
        elif isinstance(part, ast.Constant):
            found.add(str(part.value))
    return found


def episode() -> Callable[[], object]:
    """One episode of the environment with its toy source, from reset to the end."""
    import gymnasium

    import tprl_env  # noqa: F401  (registers the id)

    env = gymnasium.make("tprl_env/TokenPruning-v0")
    env.action_space.seed(0)

    def run() -> None:
        env.reset(seed=0)
        over = False
        while not over:
            *_, ended, truncated, _ = env.step(env.action_space.sample())
            over = ended or truncated

    return run


def training_sample() -> Callable[[], object]:
    """``sample()`` of the runner that trains the ``smoke`` preset, which scores by itself."""
    from tprl_env.rllib.algorithms import algorithm_config
    from tprl_env.rllib.config import load_config

    settings = algorithm_config(load_config("smoke"), pool=None)
    runner = settings.env_runner_cls(config=settings, worker_index=0, num_workers=0)
    return runner.sample


def entered(call: Callable[[], object], package: Path) -> dict[str, Any]:
    """Files, functions and classes of the package that a call enters in this thread.

    A class counts when one of its methods is entered. Comprehensions belong to their function:
    whether they have frames of their own depends on Python's version.
    """
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    inside = {code for code in codes if Path(code.co_filename).is_relative_to(package)}
    named = {code for code in inside if code.co_name == "<lambda>" or code.co_name[0] != "<"}
    files = {str(Path(code.co_filename).relative_to(package)) for code in inside}
    classes = {(code.co_filename, owner) for code in named if (owner := _owner(code))}
    return {"files": sorted(files), "functions": len(named), "classes": len(classes)}


def _owner(code: CodeType) -> str:
    """The class a function is defined in, empty for one of a module."""
    outside = code.co_qualname.split(".<locals>")[0]
    return outside.rpartition(".")[0]


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line per figure, one column per tree."""
    rows = [["", *found]]
    for name, value in next(iter(found.values())).items():
        columns = [count[name] for count in found.values()]
        if isinstance(value, dict):
            rows.append([f"{name}: files", *(str(len(each["files"])) for each in columns)])
            for part in ("functions", "classes"):
                rows.append([f"{name}: {part}", *(str(each[part]) for each in columns)])
        else:
            rows.append([name, *map(str, columns)])
    return "\n".join(f"{name:<32}" + "".join(f"{v:>8}" for v in values) for name, *values in rows)


if __name__ == "__main__":
    raise SystemExit(main())
