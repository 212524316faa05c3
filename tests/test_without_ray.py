"""Where Ray is not installed: everything below ``rllib`` imports and runs, the rest says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_architecture import PACKAGE, PACKAGES, room

pytest.importorskip("transformers")

WITHOUT = """
import sys

class _NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _NoRay())
"""


def without_ray(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + textwrap.dedent(script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_module_below_rllib_imports() -> None:
    may = [f"tprl_env.{name}." for name in (*PACKAGES["ray"], *PACKAGES["lmms_eval"])]
    free = [
        name
        for name in PACKAGE
        if room(name).split(".")[0] not in ("rllib", "cli", "ray_reaper")
        and not any(f"{name}.".startswith(one) for one in may)
    ]
    assert len(free) > 150
    done = without_ray("import importlib\nfor n in sys.argv[1:]: importlib.import_module(n)", *free)
    assert done.returncode == 0, done.stderr[-2000:]


RUNS = """
import json
from pathlib import Path

import numpy as np

from tprl_env.cli import main
from tprl_env.data.features.store import FeatureStore
from tprl_env.env import TokenPruningEnv
from tprl_env.evaluation import evaluate_store
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.policy import PolicyConfig, PolicyPruner, PruningPolicy
from tprl_env.reducers import make_reducer
from tprl_env.scoring.lvlm_scorer import LVLMScorer

out = Path(sys.argv[1])
lvlm = "builtin:sparse"
words = ["encode", "--data", "scenes-sparse", "--split", "test", "--limit", "6", "--lvlm", lvlm]
assert main([*words, "--out", str(out / "store")]) == 0
assert main(["autoencoder", str(out / "store"), "--steps", "3"]) == 0
store, loaded = FeatureStore.open(out / "store"), load_lvlm(lvlm)
env = TokenPruningEnv(store, LVLMScorer(loaded, store), max_steps=1)
obs, _ = env.reset(seed=0)
env.step(obs["alive"])
policy = PruningPolicy(PolicyConfig.question_aware(store.code_width, store.query_width, width=16))
policy.save_pretrained(out / "policy")
assert main(["evaluate", str(out / "store"), "--lvlm", lvlm, "--policy", str(out / "policy"),
             "--budgets", "9", "--out", str(out / "evaluated")]) == 0
answer = PrunedLVLM(loaded, make_reducer("divprune")).answer(store.picture(0), store.question(0), 9)
assert answer.keep.sum() == 9
assert "ray" not in sys.modules
print(json.dumps({"done": True}))
"""


def test_encoding_scoring_pruning_and_evaluating_run(tmp_path: Path) -> None:
    done = without_ray(RUNS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"done": true' in done.stdout


def test_training_names_the_extra() -> None:
    script = "from tprl_env.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = without_ray(script, "train", "smoke", "--out", "x")
    assert done.returncode == 2
    assert done.stderr == 'tprl: ray is not installed; run pip install "tprl-env[all]"\n'
