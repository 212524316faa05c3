"""Joining Ray: what a worker raised is raised itself."""

import pytest

pytest.importorskip("ray")

import ray
from ray.exceptions import RayTaskError

from tprl_env.ray_session import ray_session


@pytest.fixture
def joined(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


def of_a_worker(cause: BaseException) -> RayTaskError:
    text = "Traceback (most recent call last):\n  ..."
    return RayTaskError("f", text, cause, proctitle="p", ip="0.0.0.0").as_instanceof_cause()


def test_an_error_of_a_worker_comes_without_its_traceback(joined):
    with pytest.raises(ValueError, match=r"^the real reason$") as caught, ray_session(1):
        raise of_a_worker(ValueError("the real reason"))
    assert type(caught.value) is ValueError
    assert isinstance(caught.value.__cause__, RayTaskError)


def test_errors_of_this_process_pass(joined):
    with pytest.raises(KeyError, match="here"), ray_session(1):
        raise KeyError("here")
