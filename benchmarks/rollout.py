"""Environment steps per second of collecting and learning, beside three other ways to do it.

    python -m benchmarks.rollout --lvlm builtin:crowded [--algorithm grpo]

The paper's MDP (preset ``paper``: three Bernoulli steps, every mask scored) on the built-in LVLM's
own questions, in one process with one torch thread:

    ours         the fast runner and learner connector of tprl_env.rllib
    default      RLlib's default runner and connectors on the vector environment
    handwritten  a plain torch loop: one lockstep rollout, one scoring request; no RLlib
    one by one   a sample at a time, every mask answered with the library's own
                 generate(max_new_tokens=20) and graded as text; no batches, no cache; collecting
                 only
    one by one, our decoder  the same with this package's lean ``generate``

    scorer actors  ours with ``--actors`` N scorers in processes of their own, in ``--actor-dtype``,
                 as training runs do it; compared by wall-clock time, on a quiet machine only

With ``--algorithm grpo`` or ``mapo``, 8 draws per sample and without shared rewards, ``default`` is
left out: it does not know the groups. MAPO's memory has something to say once samples come again;
with few ``--samples`` it does from the start.

The first three share policy, scorer, loss, episodes per iteration, epochs and minibatch size; each
has its own weights, optimiser and mask cache. The environment hands RLlib's default runner whole
observations, so there the policy computes dead tokens too; the other two give it sample numbers and
masks, and it leaves them away. Contenders take turns, every round gives one ratio, and medians with
ranges are reported. Only steps of complete episodes count, neither reset slots nor padding rows.
Ratios are of CPU time of this process (Ray's own daemons idle beside it), so that other load on the
machine matters little. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.contenders import SCORERS, Cost, WithRLlib, open_lvlm
from benchmarks.handwritten import Handwritten
from benchmarks.one_by_one import OneByOne, by_our_decoder, by_transformers
from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.policy.autoencoder_training import train_autoencoder, write_codes
from tprl_env.rllib.config import TrainConfig, load_config
from tprl_env.scoring.lvlm_scorer import LVLMScorer

DRAWS = 8
ACTORS = "scorer actors"
LEAN = "one by one, our decoder"
Contender = WithRLlib | Handwritten | OneByOne
GOALS = {
    "collect_vs_one_by_one": "goal: at least 20",
    "collect_vs_one_by_one_with_actors": "goal: at least 20",
    "cpu_per_step_vs_handwritten": "goal: at most 1.25",
    "cpu_per_step_vs_rllib_default": "goal: at most 0.6",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lvlm", default="builtin:crowded", help="any LLaVA checkpoint")
    parser.add_argument("--algorithm", default="ppo", choices=("ppo", "grpo", "mapo"))
    parser.add_argument("--dataset", default="scenes-crowded")
    parser.add_argument("--samples", type=int, default=480, help="samples in the store")
    parser.add_argument("--store", default=None, help="folder to make the store in, or reuse")
    parser.add_argument("--code-width", type=int, default=None, help="default: the autoencoder's")
    parser.add_argument("--autoencoder-steps", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=256, help="per iteration")
    parser.add_argument("--one-by-one", type=int, default=16, help="its episodes per round")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not measured")
    parser.add_argument("--actors", type=int, default=0, help="also collect with so many scorers")
    parser.add_argument("--actor-dtype", default="float32", help="of the LVLM in those scorers")
    parser.add_argument(
        "--actor-batch", type=int, default=512, help="rows that an actor gets at once"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ray.init(
        address="local", num_cpus=1 + args.actors, include_dashboard=False, log_to_driver=False
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = _measure(args, _config(args, Path(args.store or folder) / "store"))
    finally:
        ray.shutdown()
    _print_table(result)
    print(json.dumps(result))
    return 0


def _config(args: argparse.Namespace, folder: Path) -> TrainConfig:
    """Encode the samples, or continue with the store that is there, and point the preset at it."""
    lvlm = open_lvlm(args.lvlm)
    samples = load_dataset(args.dataset, "train", limit=args.samples, seed=args.seed)
    store = encode_dataset(lvlm, samples, folder, tower=False, progress=False)
    width = store.code_width if store.has_channel("codes") else None
    if width is None or args.code_width not in (None, width):
        autoencoder, _ = train_autoencoder(
            store, code_width=args.code_width, steps=args.autoencoder_steps, device="cpu"
        )
        write_codes(store, autoencoder)
    changes: dict[str, Any] = {"rollout.samples": args.episodes}
    if args.algorithm != "ppo":  # whole groups, each episode with its own reward
        changes = {
            "rollout.samples": args.episodes // DRAWS,
            "rollout.draws": DRAWS,
            "rules.reward_batch_size": 1,
        }
    return load_config(
        "paper",
        {
            **changes,
            "algorithm": args.algorithm,
            "source": str(folder),
            "lvlm": args.lvlm,
            "scoring.scorer": "import",
            "scoring.factory": "benchmarks.contenders:timed_scorer",
            "seed": args.seed,
        },
    )


def _measure(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """All rounds and their figures."""
    one_by_one = {
        "one by one": OneByOne(config, args.one_by_one, by_transformers(config.lvlm)),
        LEAN: OneByOne(config, args.one_by_one, by_our_decoder(config.lvlm)),
    }
    contenders: dict[str, Contender] = {
        "ours": WithRLlib("ours", config),
        "handwritten": Handwritten(config),
        **one_by_one,
    }
    if config.algorithm.name == "ppo":
        contenders["default"] = WithRLlib("default", config)
    if args.actors:
        large = config.replace(**{"scoring.batch_size": args.actor_batch})
        contenders[ACTORS] = WithRLlib(ACTORS, large, args.actors, args.actor_dtype)
    rounds: list[dict[str, Cost]] = []
    for number in range(args.warmup + args.repeats):
        names = list(contenders)
        turn = number % len(names)  # nobody always runs first
        found = {name: contenders[name].iterate() for name in names[turn:] + names[:turn]}
        if number >= args.warmup:
            rounds.append(found)
    source = FeatureStore.open(config.source)
    result = {
        **_ratios(rounds),
        "contenders": {name: _figures([r[name] for r in rounds]) for name in contenders},
        "masks_computed": {name: SCORERS[name].stats.scores for name in SCORERS},
        "generated_equals_scored": {
            name: _agreement(contender, config, source) for name, contender in one_by_one.items()
        },
        "setting": vars(args)
        | {"tokens": source.max_tokens, "code_width": source.code_width}
        | {
            "max_steps": config.rules.max_steps,
            "epochs": config.algorithm.epochs,
            "minibatch_size": config.algorithm.minibatch_size,
            "draws": config.rollout.draws,
        },
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
    }
    for contender in contenders.values():
        contender.close()
    return result


def _ratios(rounds: list[dict[str, Cost]]) -> dict[str, Any]:
    """The figures and their smallest and largest round."""
    of: dict[str, Callable[[dict[str, Cost]], float]] = {
        "collect_vs_one_by_one": lambda r: r["one by one"].collected / r["ours"].collected,
        "collect_vs_our_decoder": lambda r: r[LEAN].collected / r["ours"].collected,
        "cpu_per_step_vs_handwritten": lambda r: r["ours"].cpu / r["handwritten"].cpu,
    }
    if "default" in rounds[0]:
        of["cpu_per_step_vs_rllib_default"] = lambda r: r["ours"].cpu / r["default"].cpu
    if ACTORS in rounds[0]:  # several processes: wall-clock time
        of["collect_vs_one_by_one_with_actors"] = lambda r: r[ACTORS].rate / r["one by one"].rate
        of["collect_vs_our_decoder_with_actors"] = lambda r: r[ACTORS].rate / r[LEAN].rate
    values = {name: [ratio(found) for found in rounds] for name, ratio in of.items()}
    medians = {name: round(float(np.median(many)), 3) for name, many in values.items()}
    spread = {name: [round(min(many), 3), round(max(many), 3)] for name, many in values.items()}
    return medians | {"ranges": spread}


def _figures(costs: list[Cost]) -> dict[str, Any]:
    """Medians of one contender: milliseconds of CPU per step by phase, and rates."""

    def median(values: list[float]) -> float:
        return round(float(np.median(values)), 4)

    phases = ("rollout", "scoring", "update")
    return {
        "cpu_ms_per_step": median([1e3 * c.cpu for c in costs]),
        "cpu_ms_per_step_range": [
            round(choose(1e3 * c.cpu for c in costs), 4) for choose in (min, max)
        ],
        **{
            f"{p}_ms_per_step": median([1e3 * getattr(c, p) / c.steps for c in costs])
            for p in phases
        },
        "steps_per_second": median([c.steps / c.wall for c in costs]),
        "collected_per_second": median([c.rate for c in costs]),
        "steps_per_round": median([c.steps for c in costs]),
        "rows_trained_per_step": median([c.trained / c.steps for c in costs]),
    }


def _agreement(one_by_one: OneByOne, config: TrainConfig, source: FeatureStore) -> dict[str, int]:
    """How often the graded text and the teacher-forced score of the same mask are equal."""
    samples, keep, graded = zip(*one_by_one.asked, strict=True)
    scorer = LVLMScorer(open_lvlm(config.lvlm), source, "exact")
    scores = scorer(np.array(samples, np.int64), np.stack(keep))
    return {"equal": int((scores == np.array(graded)).sum()), "masks": len(scores)}


def _print_table(result: dict[str, Any]) -> None:
    """Contenders and goals, for people."""
    titles = "   total  rollout  scoring   update   steps/s  collected/s  rows/step"
    print(f"\n{'CPU ms per step':24} {titles}")
    for name, row in result["contenders"].items():
        print(
            f"{name:24} {row['cpu_ms_per_step']:8.3f} {row['rollout_ms_per_step']:8.3f} "
            f"{row['scoring_ms_per_step']:8.3f} {row['update_ms_per_step']:8.3f} "
            f"{row['steps_per_second']:9.0f} {row['collected_per_second']:12.0f} "
            f"{row['rows_trained_per_step']:10.2f}"
        )
    for name, (low, high) in result["ranges"].items():
        print(f"{name:34} {result[name]:8.3f}  ({low:.3f} to {high:.3f})  {GOALS.get(name, '')}")


if __name__ == "__main__":
    raise SystemExit(main())
