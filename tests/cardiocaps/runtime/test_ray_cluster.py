"""The connection to a running Ray cluster."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cardiocaps.errors import ConfigError
from cardiocaps.runtime import ray_cluster

from ..programs import ROOT

pytest.importorskip("ray", reason="needs the extra cluster")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster that wants a token, and the environment of a user who has it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("f" * 64)
    user = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    port = _free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
    command += ["--num-cpus", "1", "--include-dashboard", "false", "--object-store-memory", "100000000"]
    with subprocess.Popen(
        command, env=user, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as head:
        try:
            assert head.stdout is not None
            said = []
            for line in head.stdout:
                said.append(line)
                if found := re.search(rf"--address='([0-9.]+:{port})'", line):
                    break
            else:
                pytest.fail("".join(said))
            del user["RAY_AUTH_MODE"]
            yield found[1], user
        finally:
            head.terminate()  # it stops its own processes
            try:
                head.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)


_CONNECT = """
from cardiocaps.errors import ConfigError
from cardiocaps.runtime.ray_cluster import ray_cluster
try:
    with ray_cluster({address!r}) as ray:
        print("CPUs:", ray.get(ray.remote(lambda: ray.cluster_resources()["CPU"]).remote()))
except ConfigError as error:
    print("error:", error)
"""


def _connected(address: str, environment: Mapping[str, str]) -> str:
    command = [sys.executable, "-c", _CONNECT.format(address=address)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_a_cluster_that_wants_a_token(guarded: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, user = guarded
    assert _connected(address, user) == "CPUs: 1.0\n"
    stranger = {**user, "HOME": str(tmp_path / "other")}
    assert f"error: --address is {address}: no Ray cluster answers there" in _connected(address, stranger)


@pytest.mark.parametrize("wanted", ["disabled", "token"])
def test_the_mode_that_answers_is_kept(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answers(_: str, environment: Mapping[str, str], __: float) -> bool:
        asked.append(environment["RAY_AUTH_MODE"])
        return asked[-1] == wanted

    monkeypatch.setattr(ray_cluster, "_answers", answers)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    ray_cluster._check("h:1")
    assert asked[-1] == os.environ["RAY_AUTH_MODE"] == wanted and len(asked) <= 2
    monkeypatch.setenv("RAY_AUTH_MODE", "other")  # what a user has set is not changed
    with pytest.raises(ConfigError, match="--address is h:1: no Ray cluster answers"):
        ray_cluster._check("h:1")
    assert asked[-1] == "other"
