"""The command-line programs in processes of their own, also as several ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.forked_python import forked_python

ROOT = Path(__file__).parents[2]


def python() -> list[str]:
    """The beginning of a command that runs Python, where Lightning and scikit-learn are imported already."""
    return forked_python("lightning.pytorch", "sklearn.linear_model")


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m module arguments`, from the root of the repository."""
    return _started("-m", module, *arguments)


def start_program(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -c program arguments`, from the root of the repository, with further variables."""
    return _started("-c", program, *arguments, **environment)


def _started(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*python(), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(x) for name, x in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start_ranks(ranks: int, program: str, *arguments: str, **environment: str) -> list[subprocess.Popen[str]]:
    """A program in several processes, as torchrun starts it."""
    port = free_port()
    of_all = {"OMP_NUM_THREADS": "1", **environment}
    return [start_program(program, *arguments, **variables(rank, ranks, port), **of_all) for rank in range(ranks)]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 120.0) -> list[tuple[int, str, str]]:
    """Wait for processes; as torchrun does, if one fails, the others get SIGTERM.

    Returns:
        Exit status, output and errors of each.
    """
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > until:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            break
        time.sleep(0.02)
    said = [process.communicate(timeout=60) for process in processes]
    assert time.monotonic() < until, said
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def launch(ranks: int, program: str, *arguments: str, **environment: str) -> list[tuple[int, str, str]]:
    """Run a program in several processes, see `start_ranks` and `ended`."""
    return ended(start_ranks(ranks, program, *arguments, **environment))


def descendants(text: str) -> list[int]:
    """The processes that this one has started, or that those have, whose command line holds the text."""
    return [number for number, line in processes_below().items() if text in line]


def processes_below() -> dict[int, str]:
    """The command lines of the processes that this one has started, or that those have, if they still run."""
    lines, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            parents[int(path.name)] = int(parent)
            if state not in "ZX":
                lines[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue

    def is_below(number: int) -> bool:
        while number in parents:
            number = parents[number]
            if number == os.getpid():
                return True
        return False

    return {number: line for number, line in lines.items() if is_below(number)}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None) -> None:
    """Until the condition holds; `process` must not end before."""
    for _ in range(12_000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.025)
    if process is not None:
        process.kill()
    raise AssertionError("nothing happened within five minutes")
