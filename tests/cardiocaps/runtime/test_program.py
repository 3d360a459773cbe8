"""The frame of the programs: signals, exit statuses, and output."""

from __future__ import annotations

import signal
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
