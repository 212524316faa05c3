"""``tprl benchmark``: published benchmarks with every reducer and budget, and the papers' table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tprl_env.cli.evaluate_reducers import reducer_names
from tprl_env.cli.parsing import budgets, names, path, place

__all__ = ["add_benchmark"]


@dataclass(frozen=True)
class Contest:
    """What a worker builds: an LVLM and its reducers; small and picklable.

    Attributes:
        lvlm: What ``load_lvlm`` opens.
        options: Its device, number type and revision.
        reducers: Texts such as "fastv(layer=2)".
        positions: "own", "original" or "contiguous".
        policy: Folder of a trained policy.
        autoencoder: Folder of its autoencoder.
    """

    lvlm: str
    options: Mapping[str, Any]
    reducers: tuple[str, ...]
    positions: str
    policy: str | None
    autoencoder: str | None

    @cached_property
    def loaded(self) -> Any:
        """The LVLM, loaded once in a process."""
        from tprl_env.lvlm import load_lvlm

        return load_lvlm(self.lvlm, **self.options)

    def cells(self, wanted: Sequence[float]) -> list[Any]:
        """Every reducer at every budget."""
        from tprl_env.evaluation.benchmark.answering import Cell
        from tprl_env.evaluation.reducer_names import contenders, kind_of

        chosen = contenders(list(self.reducers), self.positions) if self.reducers else []  # type: ignore[arg-type]
        found = []
        for budget in wanted:
            if self.policy is not None:
                found.append(Cell("policy", budget, "policy", {"folder": self.policy}, "original"))
            for one in chosen:
                kind = kind_of(one.make(0))
                found.append(Cell(one.label, budget, kind, one.fields, one.positions))
        return found

    def build(self) -> dict[str, Any]:
        """An answerer per reducer, all on one LVLM."""
        from tprl_env.evaluation.benchmark.answering import ALL
        from tprl_env.evaluation.reducer_names import contenders
        from tprl_env.inference import PrunedLVLM
        from tprl_env.policy.autoencoder import TokenAutoencoder
        from tprl_env.policy.pruner import PolicyPruner
        from tprl_env.reducers import make_reducer

        lvlm = self.loaded
        found = {ALL: PrunedLVLM(lvlm, make_reducer("uniform"))}
        for one in contenders(list(self.reducers), self.positions) if self.reducers else []:  # type: ignore[arg-type]
            found[one.label] = PrunedLVLM(lvlm, one.make(0), positions=one.positions)
        if self.policy is not None and self.autoencoder is not None:
            codes = TokenAutoencoder.from_pretrained(self.autoencoder)
            found["policy"] = PrunedLVLM(lvlm, PolicyPruner.from_pretrained(self.policy), codes)
        return {label: pruned.answer_batch for label, pruned in found.items()}

    def identity(self) -> dict[str, Any]:
        """Name, fingerprint, number type and layers of the LVLM."""
        lvlm = self.loaded
        return {
            "name": lvlm.name,
            "fingerprint": lvlm.fingerprint,
            "dtype": str(lvlm.dtype).removeprefix("torch."),
            "image_backend": lvlm.image_backend,
            "layers": lvlm.num_layers,
        }


def benchmark(args: argparse.Namespace) -> int:
    """Measure reducers on benchmarks, or check result files.

    Raises:
        ValueError: Arguments that do not go together.
    """
    if args.check:
        return _check(args.check)
    missing = [f"--{name}" for name in ("lvlm", "benchmarks", "out") if not getattr(args, name)]
    if missing:
        raise ValueError(f"tprl benchmark needs {', '.join(missing)} (or --check FILE)")
    if (args.policy is None) != (args.autoencoder is None):
        raise ValueError("a policy needs its autoencoder; give both --policy and --autoencoder")
    from tprl_env.evaluation.benchmark.run import RESULTS, TABLE, run_benchmarks

    options = {"device": args.device, "dtype": args.dtype, "revision": args.revision}
    contest = Contest(
        args.lvlm,
        {**options, "device_map": args.device_map},
        tuple(args.reducers or ()),
        args.positions,
        None if args.policy is None else str(args.policy),
        None if args.autoencoder is None else str(args.autoencoder),
    )
    cells = contest.cells(args.budgets)
    each: Any = None
    if args.engine == "ray":
        each = partial(_on_ray, num_gpus=args.num_gpus, concurrency=args.concurrency)
    lvlm = contest.identity() if each is None else _identity_on_ray(contest, args.num_gpus)
    content = run_benchmarks(
        args.benchmarks,
        cells,
        contest.build,
        lvlm,
        args.out,
        places=_places(args.place or ()),
        split=args.split,
        limit=args.limit,
        unit=args.unit,
        batch_size=args.batch_size,
        skip_bad=args.skip_bad,
        streaming=args.streaming,
        command=args.line,
        each=each,
    )
    print(f"{len(content['rows'])} rows in {args.out / TABLE}, {args.out / RESULTS}")
    return 0


def _places(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` to a table."""
    found = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ValueError(f"--from must be NAME=FOLDER, such as gqa=data/GQA, got {text!r}")
        found[name] = folder
    return found


def _check(files: Sequence[Path]) -> int:
    from tprl_env.evaluation.benchmark.summary import check_together

    contents = {}
    for file in files:
        file = file / "benchmark.json" if file.is_dir() else file
        try:
            contents[str(file)] = json.loads(file.read_text(encoding="utf-8"))
            contents[str(file)]["lvlm"]["fingerprint"], contents[str(file)]["asked"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is no result of tprl benchmark ({type(error).__name__})"
            ) from error
    rows = check_together(contents)
    print(f"{len(contents)} files, {rows} rows under one protocol")
    return 0


def _on_ray(
    work: Callable[[int, list[Any]], None],
    todo: Iterator[tuple[int, list[Any]]],
    num_gpus: float,
    concurrency: int,
) -> None:
    """Run units on workers with an LVLM each.

    Raises:
        ValueError: What a worker refused.
    """
    from tprl_env.ray_session import ray_session

    with ray_session(0):
        import ray

        class Unit:
            def run(self, number: int, samples: list[Any]) -> None:
                work(number, samples)

        remote: Any = ray.remote(num_cpus=1, num_gpus=num_gpus)(Unit)
        workers = [remote.remote() for _ in range(concurrency)]
        busy: dict[Any, Any] = {}
        waiting = list(workers)
        try:
            for number, samples in todo:
                if not waiting:
                    waiting.append(_next(busy))
                worker = waiting.pop()
                busy[worker.run.remote(number, samples)] = worker
            while busy:
                _next(busy)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, (ValueError, OSError)) else error from None


def _identity_on_ray(contest: Contest, num_gpus: float) -> dict[str, Any]:
    """The LVLM's identity where workers load it, with their device's number type."""
    from tprl_env.ray_session import ray_session

    with ray_session(0):
        import ray

        asked: Any = ray.remote(num_cpus=1, num_gpus=num_gpus)(Contest.identity)
        try:
            found: dict[str, Any] = ray.get(asked.remote(contest))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from None
        return found


def _next(busy: dict[Any, Any]) -> Any:
    """The next worker that is done; what it raised is raised here."""
    import ray

    done, _ = ray.wait(list(busy), num_returns=1)
    ray.get(done[0])
    return busy.pop(done[0])


def add_benchmark(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser(
        "benchmark", help="published benchmarks with every reducer and budget: the papers' table"
    )
    sub.add_argument("--lvlm", type=place, help="builtin:crowded, a folder or a hub id")
    sub.add_argument("--benchmarks", type=names, help="names of tprl list benchmarks, with commas")
    sub.add_argument("--reducers", type=reducer_names, help="all, or name,name(field=value)")
    sub.add_argument("--positions", default="own", help="own, original or contiguous")
    sub.add_argument("--policy", type=path, help="folder of a trained policy, measured first")
    sub.add_argument("--autoencoder", type=path, help="folder of the policy's autoencoder")
    sub.add_argument(
        "--budgets", type=budgets, default=(192, 128, 64),
        help="tokens left, counts or shares; inside the LLM the average (default: 192,128,64)",
    )  # fmt: skip
    sub.add_argument(
        "--from", dest="place", action="append", metavar="NAME=FOLDER",
        help="copy of a benchmark's dataset (default: the hub); may be given again",
    )  # fmt: skip
    sub.add_argument("--split", default="test", help="of every benchmark")
    sub.add_argument("--limit", type=int, help="questions of each (default: all)")
    sub.add_argument("--out", type=path, help="folder; answers that are there are kept")
    sub.add_argument("--batch-size", type=int, default=8, help="questions per pass")
    sub.add_argument("--unit", type=int, default=256, help="questions per file of answers")
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    sub.add_argument("--device-map", metavar="HOW", help="several GPUs instead (default: none)")
    sub.add_argument("--dtype", help="number type (default: bfloat16 on a GPU, else float32)")
    sub.add_argument("--revision", help="commit of a hub checkpoint (default: its newest)")
    sub.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be read")
    sub.add_argument("--streaming", action="store_true", help="read rows one by one from the hub")
    sub.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this process, or Ray workers"
    )
    sub.add_argument("--num-gpus", type=float, default=0, help="per worker of --engine ray")
    sub.add_argument("--concurrency", type=int, default=1, help="workers of --engine ray")
    sub.add_argument(
        "--check", type=path, nargs="+", metavar="FILE",
        help="only say whether result files were measured under one protocol (default: measure)",
    )  # fmt: skip
    sub.set_defaults(run=benchmark)
