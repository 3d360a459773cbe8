"""Python in a new process within a few hundredths of a second, because the process is forked from a server.

`[*forked_python(), "-c", PROGRAM]` is a command like `[sys.executable, "-c", PROGRAM]`, which takes seconds to import
torch. The server has imported torch already, and no package of this project, so the program still runs all of their
code. The program has the arguments, environment, folder, streams and signals of the command, and the command ends as
the program does. Do not use it for a program whose test sets a variable that Python or an imported package reads
only at its start, such as OMP_NUM_THREADS.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from types import ModuleType
from typing import Any

_folder: Any = None


def forked_python(*imported: str) -> list[str]:
    """Return the beginning of a command; `-c PROGRAM` or `-m MODULE` and arguments follow.

    Args:
        imported: modules that the server shall import too, when it is first asked to.
    """
    global _folder
    if _folder is None:
        import atexit
        import subprocess
        import tempfile

        _folder = tempfile.TemporaryDirectory()
        command = [sys.executable, __file__, "serve", f"{_folder.name}/socket"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        atexit.register(server.communicate)
    # -S and -I: the command itself starts without the packages of the environment.
    return [sys.executable, "-I", "-S", __file__, "ask", f"{_folder.name}/socket", ",".join(imported)]


def _ask(address: str, imported: str, *arguments: str) -> None:
    """Have the server start a program with the streams of this process; pass signals on; end as the program does."""
    forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    streams = [number for number in range(3) if _is_open(number)]
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(address)
    request = {
        "imported": imported.split(",") if imported else [],
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "streams": streams,
    }
    socket.send_fds(server, [json.dumps(request).encode()], streams)
    program = int(server.recv(100))
    for signum in forwarded:
        signal.signal(signum, lambda signum, _: os.kill(program, signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    status = int(server.recv(100))
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _serve(address: str) -> None:
    """Start the programs that are asked for, until the process that started the server ends."""
    import torch  # noqa: F401

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    gc.freeze()  # otherwise every program would copy the memory of all objects at its end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system removes the forked processes when they end
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        request = json.loads(message)
        for name in request["imported"]:
            __import__(name)
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program:
                _watch(program, connection)
            connection.close()
            _run(request, streams)
            return
        connection.close()
        for stream in streams:
            os.close(stream)


def _watch(program: int, connection: socket.socket) -> None:
    """Kill the program if the process that asked for it ends first; report how the program ends."""
    os.closerange(0, 3)
    connection.send(str(program).encode())
    ended = os.pidfd_open(program)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(program, signal.SIGKILL)
        os._exit(0)
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())
    os._exit(0)


def _run(request: dict[str, Any], streams: list[int]) -> None:
    """Run a program as Python's command line does. An exception of the program leaves this function."""
    environment, given = request["environment"], dict(zip(request["streams"], streams, strict=True))
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        stream = None
        if number in given:
            os.dup2(given[number], number)
            os.close(given[number])
            stream = open(number, mode, encoding=environment.get("PYTHONIOENCODING"), closefd=False)  # noqa: SIM115
        else:
            os.close(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    kind, program, *arguments = request["arguments"]
    sys.path[0] = request["folder"]
    if kind == "-m":
        sys.argv = ["-m", *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    assert kind == "-c", f"forked_python: the option is {kind}; expected -c or -m"
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    {"ask": _ask, "serve": _serve}[sys.argv[1]](*sys.argv[2:])
