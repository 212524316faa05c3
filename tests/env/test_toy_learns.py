"""The toy setting teaches: the README's own loop and stock PPO solve it, beside its references."""

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from tprl_env.env.single import TokenPruningEnv

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
ENOUGH = 0.75  # doing nothing and random keeping earn 0, the best rule 0.8125


def block_with(words):
    (found,) = [b for b in re.findall(r"^```\w*\n(.*?)^```$", README, re.M | re.S) if words in b]
    return found


def run_block(block, seed):
    """Run a block of the README with another seed; returns what its policy has learned."""
    changed, places = re.subn(r"^seed = 0$", f"seed = {seed}", block, flags=re.M)
    assert places == 1
    namespace = {"__name__": "readme"}
    exec(compile(changed, f"README, seed {seed}", "exec"), namespace)
    return float(namespace["learned"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_readmes_own_loop_solves_the_toy(seed, capsys):
    block = block_with("# REINFORCE")
    assert "torch" not in block and "stable_baselines3" not in block
    learned = run_block(block, seed)
    references = gymnasium.make("tprl_env/TokenPruningToy-v0").unwrapped.reference_returns()
    assert learned > ENOUGH > max(references["keep_all"], references["random"]) + 0.5
    assert learned <= references["best_rule"] + 1e-6
    printed = capsys.readouterr().out
    assert f"learned {learned:.4f}" in printed and "'best_rule': 0.8125" in printed


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_stock_ppo_solves_the_toy(seed, capsys):
    pytest.importorskip("stable_baselines3")
    import torch

    torch.set_num_threads(1)
    learned = run_block(block_with("from stable_baselines3"), seed)
    assert learned > ENOUGH
    assert "'best_rule': 0.8125" in capsys.readouterr().out


def test_maskable_ppo_finds_the_action_masks():
    contrib = pytest.importorskip("sb3_contrib")
    import torch

    torch.set_num_threads(1)
    env = gymnasium.make("tprl_env/TokenPruning-v0")
    model = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=16, batch_size=16, seed=0)
    model.learn(32)
    observation, _ = env.reset(seed=0)
    half = np.arange(16) % 2
    observation, *_ = env.step(half)
    masks = env.unwrapped.action_masks()
    for _ in range(8):
        action, _ = model.predict(observation, action_masks=masks, deterministic=False)
        assert np.all(action <= half)


def test_both_pages_hold_the_reference_returns():
    pages = {"README": README, "class": TokenPruningEnv.__doc__ or ""}
    for env_id in ("tprl_env/TokenPruning-v0", "tprl_env/TokenPruningToy-v0"):
        env = gymnasium.make(env_id).unwrapped
        found = env.reference_returns(episodes=64 * 256)
        for page, text in pages.items():
            (row,) = re.findall(rf"^ *\| `{env_id}`[^|\n]*\|(.*)\|$", text, re.M)
            written = [float(cell) for cell in row.split("|")]
            expected = [found["keep_all"], found["random"], found["best_rule"]]
            assert written == pytest.approx(expected, abs=0.015), (page, env_id)
