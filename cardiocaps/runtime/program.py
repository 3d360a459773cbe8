"""The frame of the command-line programs: signals, errors in one line, exit statuses, output for any terminal.

Nothing heavy is imported, so that signals are handled from the start.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from cardiocaps.errors import CardioCapsError, ConfigError, printable

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_REMIND_EVERY = 0.2  # seconds

# Variables that a launcher sets in each process that it starts, and their largest value for a single process.
# (SLURM_NTASKS is also set for a single process of a larger allocation.)
_LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0},
    "srun": {"SLURM_STEP_NUM_TASKS": 1},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": 1, "PMI_SIZE": 1},
}


class Interrupted(BaseException):
    """A signal told the program to stop. The exit status is 128 + the number of the signal.

    A BaseException, like KeyboardInterrupt, so that `except Exception` does not swallow it.
    """

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {where}")
        self.signum, self.exit_code = signum, 128 + signum


class Interruption:
    """Makes SIGTERM, SIGINT and SIGHUP raise `Interrupted`: at once, or, during training, after the batch and a save.

    A second signal raises at once in any case. Files are written in one step and checkpoints are complete, so a
    program that is stopped at any moment leaves nothing half-written.

    Some libraries drop what a signal's handler raises, NumPy's and torch's imports for example. So SIGALRM raises it
    again every 0.2 seconds, until it has left the block or is on its way out.

    Attributes:
        signum: the last signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Handle the signals inside the block, except those that the caller ignores (as nohup ignores SIGHUP)."""
        before = {signum: signal.getsignal(signum) for signum in (*_SIGNALS, signal.SIGALRM)}
        self._watched = [signum for signum in _SIGNALS if before[signum] != signal.SIG_IGN]
        signal.signal(signal.SIGALRM, self._remind)
        self.defer(False)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for signum in (*self._watched, signal.SIGALRM):
                signal.signal(signum, before[signum])

    def defer(self, deferred: bool) -> None:
        """Set whether a signal waits for a save. Reinstalls the handlers, because Lightning installs its own."""
        self.deferred = deferred
        for signum in self._watched:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        again, self.signum = self.signum is not None, signum
        if again or not self.deferred:
            signal.setitimer(signal.ITIMER_REAL, _REMIND_EVERY, _REMIND_EVERY)
            raise Interrupted(signum, "nothing is half-written")

    def _remind(self, _: int, __: FrameType | None) -> None:
        error = sys.exception()
        while error is not None and not isinstance(error, Interrupted):
            error = error.__context__
        if error is None and self.signum is not None and not self.deferred:
            raise Interrupted(self.signum, "nothing is half-written")


def run_program(body: Callable[[Interruption], None], *, copies: bool = False) -> int:
    """Run the body of a program and return its exit status.

    An error that a user can cause becomes one line on standard error; no line if it has no text.

    Args:
        copies: whether a launcher may start it several times; the body then calls `refuse_copies` where it may not.
    """
    sys.stdout, sys.stderr = _writable(sys.stdout), _writable(sys.stderr)
    before, warnings.formatwarning = warnings.formatwarning, _note
    # Plots are only written to files. With an unknown backend in this variable, matplotlib could not be imported.
    backend = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        if not copies:
            refuse_copies()
        with Interruption().watched() as interruption:
            body(interruption)
    except (CardioCapsError, Interrupted) as error:
        if str(error):
            print_line(f"error: {error}", sys.stderr)
        return error.exit_code
    finally:
        warnings.formatwarning = before
        os.environ.pop("MPLBACKEND")
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return 0


def refuse_copies() -> None:
    """Raise ConfigError where a launcher has started several copies: each would do all the work, in one folder."""
    for launcher, variables in _LAUNCHERS.items():
        numbers = {name: os.environ.get(name, "") for name in variables}
        several = [f"{name}={x}" for name, x in numbers.items() if x.isdecimal() and int(x) > variables[name]]
        if several:
            raise ConfigError(
                f"{launcher} has started several processes ({', '.join(several)}); this program runs in one process, "
                "on one GPU: start it without the launcher"
            )


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print text with the control codes of terminals escaped.

    If the stream can no longer be written (a closed pipe, a full disk), the program goes on without its output.
    """
    stream = stream or sys.stdout
    try:
        print(_plain(text), file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Let a stream that cannot be written go to the null device."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it is closed, or none of the system's
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is stream:
                setattr(sys, name, _writable(None))
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:  # else the descriptor was closed, and is now open
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _plain(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _writable(stream: TextIO | None) -> TextIO:
    """The stream, writing `?` for characters that its encoding lacks; the null device if the stream is closed."""
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def _note(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one line, without the line of code that it comes from."""
    return f"note: {printable(message)}\n"
