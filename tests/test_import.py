"""A plain import is light; the exported names exist."""

import importlib.util
import subprocess
import sys

import pytest

import tprl_env

HEAVY = ("torch", "ray", "transformers", "datasets", "pyarrow", "PIL", "matplotlib", "scipy")

SCRIPT = """
import sys
BLOCKED = {blocked!r}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import gymnasium, numpy, tprl_env
{body}
print(*sorted(name for name in {heavy!r} if name in sys.modules))
"""

USE = """
env = gymnasium.make("tprl_env/TokenPruning-v0", render_mode="ansi")
env.reset(seed=0)
env.step(env.action_space.sample())
envs = gymnasium.make_vec("tprl_env/TokenPruning-v0", num_envs=2)
envs.reset(seed=0)
envs.step(envs.action_space.sample())
"""


def run(body, blocked=()):
    code = SCRIPT.format(body=body, heavy=HEAVY, blocked=blocked)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_a_plain_import_loads_nothing_heavy():
    assert run("") == []


def test_the_environment_runs_on_numpy_and_gymnasium_alone():
    assert run(USE, blocked=HEAVY) == []


FIND = """
import gymnasium
try:
    gymnasium.spec({bare!r})
except gymnasium.error.NamespaceNotFound:
    print("unknown")
{importing}
env, envs = gymnasium.make({name!r}), gymnasium.make_vec({name!r}, num_envs=2)
print(env.spec.id)
"""


@pytest.mark.parametrize("bare", ["tprl_env/TokenPruning-v0", "tprl_env/TokenPruningToy-v0"])
@pytest.mark.parametrize(("importing", "prefix"), [("import tprl_env", ""), ("", "tprl_env:")])
def test_gymnasium_finds_an_id_in_two_ways(bare, importing, prefix):
    code = FIND.format(bare=bare, importing=importing, name=prefix + bare)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["unknown", bare], done.stderr
    assert done.stderr == ""


def test_few_names_are_exported():
    assert len(tprl_env.__all__) <= 8 and set(tprl_env.__all__) <= set(dir(tprl_env))


@pytest.mark.parametrize("name", tprl_env.__all__)
def test_every_exported_name_resolves(name):
    if name in {"PruningPolicy", "load_lvlm", "make_pruner"}:
        pytest.importorskip("torch")
    if name == "load_lvlm":
        pytest.importorskip("transformers")
    assert callable(getattr(tprl_env, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tprl_env.nothing


def test_the_version_is_a_release_number():
    assert all(part.isdigit() for part in tprl_env.__version__.split("."))


def test_the_package_says_that_it_is_typed():
    spec = importlib.util.find_spec("tprl_env")
    assert spec is not None and spec.submodule_search_locations is not None
    from pathlib import Path

    assert (Path(spec.submodule_search_locations[0]) / "py.typed").exists()
