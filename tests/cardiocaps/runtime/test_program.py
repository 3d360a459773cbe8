"""The frame of the programs: signals, exit statuses, and output."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import pytest

from cardiocaps.errors import DataError
from cardiocaps.runtime.program import Interruption, print_line, run_program


def test_a_signal_is_not_caught_with_exceptions() -> None:
    def body(_: Interruption) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("`except Exception` caught the signal")

    assert run_program(body) == 128 + signal.SIGTERM


def test_a_signal_is_one_line_and_the_handlers_are_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def body(_: Interruption) -> None:
            signal.raise_signal(signal.SIGHUP)  # ignored, as under nohup
            signal.raise_signal(signal.SIGINT)

        assert run_program(body) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == "error: stopped by SIGINT; nothing is half-written\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_was_dropped_comes_again() -> None:
    def body(_: Interruption) -> None:
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    begin = time.monotonic()
    assert run_program(body) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_second_signal_does_not_wait_for_a_save() -> None:
    def body(interruption: Interruption) -> None:
        interruption.defer(True)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signum == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the second signal was deferred")

    assert run_program(body) == 128 + signal.SIGTERM


def test_control_codes_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    def body(_: Interruption) -> None:
        print_line("± 1\n  \x1b[31mtwo\r\n\ttabs\u202e\x9b")
        sys.stderr.write(warnings.formatwarning("\x1b]0;title\x07\nof a window", UserWarning, "", 1))
        raise DataError("bad \x1b[2Jname \udcff")

    assert run_program(body) == 3
    out, err = capsys.readouterr()
    assert out == "± 1\n  \\x1b[31mtwo\\r\n\\ttabs\\u202e\\x9b\n"
    assert err.splitlines() == [r"note: \x1b]0;title\x07\nof a window", r"error: bad \x1b[2Jname \udcff"]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_replaced_and_the_other_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {each: io.StringIO() for each in ("stdout", "stderr")}
    for each, stream in streams.items():
        monkeypatch.setattr(sys, each, stream)
    streams[name].close()
    for _ in range(2):
        print_line("lost", getattr(sys, name))
    assert getattr(sys, name) is not streams.pop(name)
    ((other, stream),) = streams.items()
    assert getattr(sys, other) is stream and stream.getvalue() == ""
    getattr(sys, name).close()


def test_a_pipe_that_nobody_reads_costs_no_descriptor() -> None:
    def lowest() -> int:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        before = lowest()
        print_line("lost", pipe)
        assert lowest() == before
        print_line("lost", pipe)  # goes to the null device


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "torchrun has started several processes (WORLD_SIZE=2)"),
        ({"RANK": "1"}, "torchrun has started several processes (RANK=1)"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun has started several processes (SLURM_STEP_NUM_TASKS=4)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started several processes"),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"WORLD_SIZE": "many"}, ""),
    ],
)
def test_several_copies_of_a_program_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    called: list[object] = []
    assert run_program(called.append) == (2 if message else 0)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") if message else not errors
    assert errors.count("\n") == bool(message) and bool(called) != bool(message)


@pytest.mark.parametrize("backend", ["foo", "", None])
def test_matplotlib_can_be_imported_with_any_backend_set(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if backend is not None:
        monkeypatch.setenv("MPLBACKEND", backend)
    command = [sys.executable, "-c", "import matplotlib"]

    def body(_: object) -> None:
        assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""

    assert run_program(body) == 0
    assert os.environ.get("MPLBACKEND") == backend
