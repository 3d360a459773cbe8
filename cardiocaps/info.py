"""`python -m cardiocaps.info`: versions, devices, what was built, what is installed, and the cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cardiocaps import DISCLAIMER
from cardiocaps.config import CommandLine
from cardiocaps.runtime.program import Interruption, print_line, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    given = command_line().parse_args(argv)

    def body(_: Interruption) -> None:
        from cardiocaps.training.installed import as_text, installed

        found = installed()
        print_line(json.dumps(found, indent=2) if given.json else as_text(found))

    return run_program(body)


def command_line() -> CommandLine:
    """The parser of the program."""
    parser = CommandLine(
        prog="python -m cardiocaps.info",
        description="Print the versions, the devices, what of capsops was built and what runs here, the packages of "
        "each extra, the readers of videos, and the cache. `capsops info` has more about the kernels.",
        epilog=DISCLAIMER,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
