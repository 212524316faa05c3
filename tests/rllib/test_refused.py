"""A run that cannot work is refused before anything starts, and leaves no folder behind."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray

from tprl_env.cli import main
from tprl_env.data.features.store import open_source
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import load_config, policy_config
from tprl_env.rllib.run import train as running
from tprl_env.rllib.run.train import train

LOCAL = {"resources.num_scorers": 0, "limits.iterations": 1}


@pytest.fixture
def nothing_starts(monkeypatch):
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray, imitation or scorers were started")

    for name in ("ray_session", "imitate", "_scorers"):
        monkeypatch.setattr(running, name, start)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules.budget": (3, 200)}, r"at most the 16 tokens .* pass rules\.budget=3,16"),
        ({"rules.budget": 17}, r"at most the 16 tokens .* pass rules\.budget=16"),
        ({"rules.budget": (20, 30)}, r"pass rules\.budget=16,16"),
        ({"imitation.demonstrator": "question_attention"}, "needs a channel"),
        ({"imitation.demonstrator": "vispruner"}, "needs tower and cls_attention"),
        ({"source": "nowhere"}, "nowhere"),
        ({"scoring.scorer": "lvlm", "lvlm": "nowhere"}, "nowhere"),
        (
            {"scoring.scorer": "lvlm", "lvlm": "builtin:crowded", "scoring.device": "cuda:77"},
            "scoring.device: device 'cuda:77' is not there",
        ),
        ({"resources.scorer_gpus": 64.0, "resources.num_scorers": 2}, "ask for 128 GPUs"),
        ({"resources.scorer_gpus": 1.5}, "a part of one GPU or a whole number, got 1.5"),
        (
            {"resources.scorer_gpus": 2.0, "scoring.device": "cuda"},
            "'cuda' is one device, but resources.scorer_gpus=2",
        ),
        (
            {"resources.scorer_resources": {"tpu": 1}, "resources.num_scorers": 1},
            "on no machine without a cluster",
        ),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path: Path, changes, said: str):
    with pytest.raises((ValueError, OSError), match=said):
        config = load_config("smoke", {**LOCAL, **changes})
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_starts")
def test_a_start_policy_of_another_shape_is_refused_before_anything_starts(tmp_path: Path):
    config = load_config("smoke", LOCAL)
    other = config.replace(**{"policy.width": 64})
    PruningPolicy(policy_config(other, open_source(config.source))).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="another shape"):
        train(config, tmp_path / "run", init_policy=tmp_path / "p", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_corrected_command_works_in_the_same_folder(tmp_path: Path, capsys):
    out = tmp_path / "run"
    command = ["train", "smoke", "--out", str(out), "--resources.num_scorers", "0"]
    command += ["--limits.iterations", "1"]
    assert main([*command, "--rules.budget", "3,48"]) == 2
    assert "--rules.budget 3,16" in capsys.readouterr().err and not out.exists()
    # found out only while starting: the scorer's factory is imported in the runner
    broken = ["--scoring.scorer", "import", "--scoring.factory", "no_such_module:scorer"]
    with pytest.raises(ModuleNotFoundError):
        config = load_config("smoke", {**LOCAL, "scoring.scorer": "import"})
        train(config.replace(**{"scoring.factory": "no_such_module:x"}), out, progress=False)
    assert main([*command, *broken]) == 2
    assert not out.exists() and not ray.is_initialized()
    assert main([*command, "--rules.budget", "3,16"]) == 0
    assert (out / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("out", ["", "  "])
def test_a_run_in_no_folder_is_refused(tmp_path: Path, monkeypatch, capsys, out: str):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "smoke", "--out", out]) == 2
    assert "expected a path" in capsys.readouterr().err
    with pytest.raises(ValueError, match="got nothing"):
        train(load_config("smoke", LOCAL), out, progress=False)
    assert not list(tmp_path.iterdir())
