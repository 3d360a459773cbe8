"""What the command-line programs have in common: signals, errors in one line, exit statuses, output for any terminal.

Imports nothing heavy, so that a signal is heard from the start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from cardiocaps.errors import CardioCapsError, ConfigError, printable

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
# Variables of those that start a program many times, and the largest value that they have for a single process.
# (SLURM_NTASKS is also set for a single process of a larger allocation.)
_LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0},
    "srun": {"SLURM_STEP_NUM_TASKS": 1},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": 1, "PMI_SIZE": 1},
}

_REMIND_EVERY = 0.2  # seconds


class Interrupted(BaseException):
    """The program was told to stop by a signal. Its exit status is 128 + the signal's number.

    No Exception, as KeyboardInterrupt is none: who goes on after any failure should not go on after this.
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {where}")
        self.signum, self.exit_code = signum, 128 + signum


class Interruption:
    """SIGTERM, SIGINT and SIGHUP raise `Interrupted`: at once, or, while a network is trained, after batch and save.

    What a signal's handler raises can get lost: Python's compiler, which every import may call, destructors and some C
    extensions drop it. So it is raised again, by SIGALRM, until it has left the block or is on its way out.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Handle the signals inside the block, and as before after it."""
        before = {signum: signal.getsignal(signum) for signum in (*_SIGNALS, signal.SIGALRM)}
        unraisable = sys.unraisablehook
        # Who started the program with a signal ignored (nohup) wants it ignored.
        self._watched = [signum for signum in _SIGNALS if before[signum] != signal.SIG_IGN]
        signal.signal(signal.SIGALRM, self._remind)
        sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, Interrupted) else unraisable(lost)
        self.defer(False)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = unraisable
            for signum in (*self._watched, signal.SIGALRM):
                signal.signal(signum, before[signum])

    def defer(self, deferred: bool) -> None:
        """Whether a signal waits for a save. Takes the signals back from Lightning, for which SIGTERM is a success."""
        self.deferred = deferred
        for signum in self._watched:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        again, self.signum = self.signum is not None, signum
        if not self.deferred or again:
            signal.setitimer(signal.ITIMER_REAL, _REMIND_EVERY, _REMIND_EVERY)
            raise Interrupted(signum, "nothing is half-written")

    def _remind(self, _: int, __: FrameType | None) -> None:
        error = sys.exception()
        while error is not None and not isinstance(error, Interrupted):
            error = error.__context__
        if error is None and self.signum is not None and not self.deferred:
            raise Interrupted(self.signum, "nothing is half-written")


@contextmanager
def defer_signals() -> Iterator[None]:
    """Signals that Python handles wait for the end of the block, which an exception in its midst would leave with a
    process that nobody knows of or a lock that nobody opens."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread alone
        return
    arrived: list[int] = []
    signals = (*_SIGNALS, signal.SIGALRM)
    handled = {signum: handler for signum in signals if callable(handler := signal.getsignal(signum))}
    try:
        for signum in handled:
            signal.signal(signum, lambda signum, _: arrived.append(signum))
        yield
    finally:
        for signum, handler in handled.items():
            signal.signal(signum, handler)
        for signum in arrived:
            signal.raise_signal(signum)


def run_program(body: Callable[[Interruption], None]) -> int:
    """Run a program's body; an error that a user can cause becomes one line on standard error. The exit status."""
    sys.stdout, sys.stderr = _writable(sys.stdout), _writable(sys.stderr)
    before, warnings.formatwarning = warnings.formatwarning, _note
    # Plots go to files. The backend of windows that a user has chosen is not needed, and if nobody knows it, no library
    # that imports matplotlib can be imported.
    backend = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        _refuse_copies()
        with Interruption().watched() as interruption:
            body(interruption)
    except (CardioCapsError, Interrupted) as error:
        print_line(f"error: {error}", sys.stderr)
        return error.exit_code
    finally:
        warnings.formatwarning = before
        os.environ.pop("MPLBACKEND")
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return 0


def _refuse_copies() -> None:
    """Raise ConfigError where a launcher has started the program several times at once: each would do all of the work
    by itself, into the same folder."""
    for launcher, variables in _LAUNCHERS.items():
        numbers = {name: os.environ.get(name, "") for name in variables}
        several = [f"{name}={x}" for name, x in numbers.items() if x.isdecimal() and int(x) > variables[name]]
        if several:
            raise ConfigError(
                f"{launcher} has started several processes ({', '.join(several)}); this program runs in one process, "
                f"on one GPU: start it by itself"
            )


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line, or several, without any code that the terminal would obey. Where nobody reads any more (a closed
    pipe, a full disk), the work goes on without words."""
    stream = stream or sys.stdout
    try:
        print(_plain(text), file=stream, flush=True)
    except (OSError, ValueError):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            sys.stdout = _writable(None)


def _plain(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _writable(stream: TextIO | None) -> TextIO:
    """A stream that takes any character, be it as a question mark; nowhere, where the stream is closed."""
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def _note(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as a line for a user, who does not look for the line of code that gave it."""
    return f"note: {printable(message)}\n"
