"""A fixture: two hosts on one machine, as network namespaces with a cable between them."""

import os
import shutil
import subprocess

import pytest


def shell(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them; yields their names and addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip")
    stem = f"tprl{os.getpid() % 10000}"
    hosts = {f"{stem}a": "10.213.7.1", f"{stem}b": "10.213.7.2"}
    first, second = hosts
    try:
        for name in hosts:
            shell("ip", "netns", "add", name)
        shell(
            *f"ip link add {first}v netns {first} type veth peer name {second}v".split(),
            *("netns", second),
        )
        for name, address in hosts.items():
            inside = ("ip", "netns", "exec", name, "ip")
            shell(*inside, "addr", "add", f"{address}/24", "dev", f"{name}v")
            shell(*inside, "link", "set", f"{name}v", "up")
            shell(*inside, "link", "set", "lo", "up")
        yield hosts
    finally:
        for name in hosts:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
