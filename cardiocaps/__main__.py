"""The program `cardiocaps`, also `python -m cardiocaps`: runs the other programs by their names."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from cardiocaps import DISCLAIMER, __version__
from cardiocaps.config import COMPLETING, CommandLine

_PROGRAMS = {
    "train": ("cardiocaps.train", "train a network on echocardiogram videos and evaluate it"),
    "evaluate": ("cardiocaps.evaluate", "evaluate the networks of runs once more"),
    "predict": ("cardiocaps.predict", "predict for videos of your own"),
    "explain": ("cardiocaps.explain", "show where in its frames a network finds the class of a video"),
    "preview": ("cardiocaps.preview", "draw some videos of a data set, their views and reconstructions"),
    "export": ("cardiocaps.export", "write the network of a run to a file for other programs"),
    "data": ("cardiocaps.data.__main__", "say what a data set holds, and what is wrong with it"),
    "info": ("cardiocaps.info", "print versions, devices, what is installed, and the cache"),
    "experiments": (
        "cardiocaps.experiments.__main__",
        "train what the tables and figures of the paper compare",
    ),
    "phantom": ("cardiocaps.phantom.__main__", "write a synthetic study"),
    "from-dicom": ("cardiocaps.data.from_dicom", "make a data set without identifiers of a folder of DICOM files"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the program that is run; 2 if there is no such program."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if COMPLETING in os.environ:
        _complete_program()
    if arguments and arguments[0] in _PROGRAMS:
        module, _ = _PROGRAMS[arguments[0]]
        return import_module(module).main(arguments[1:])
    names = "\n".join(f"  {name:<13}{what}" for name, (_, what) in _PROGRAMS.items())
    parser = CommandLine(
        prog="cardiocaps",
        usage="%(prog)s COMMAND [options]",
        description=f"commands:\n{names}\n\n`%(prog)s COMMAND --help` lists the options of a command.",
        epilog=DISCLAIMER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cardiocaps {__version__}")
    parser.add_argument("command", choices=list(_PROGRAMS), metavar="COMMAND", help=argparse.SUPPRESS)
    parser.parse_args(arguments[:1])
    raise AssertionError("unreachable: a command was given")


def _complete_program() -> None:
    """Let the program that the command line names, if it does, say what may follow; the process then ends."""
    from argcomplete.lexers import split_line

    line, point = os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", "0"))
    _, _, _, words, _ = split_line(line, point)
    start = int(os.environ[COMPLETING])
    if len(words) > start and words[start] in _PROGRAMS:
        os.environ[COMPLETING] = str(start + 1)
        import_module(_PROGRAMS[words[start]][0]).main([])


if __name__ == "__main__":
    sys.exit(main())
