"""`python -m cardiocaps.data DATA…`: what data sets hold, and what is wrong with them. No video is decoded."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cardiocaps import DISCLAIMER
from cardiocaps.config import OF_TABLE, CommandLine, TrainConfig, add_options, options
from cardiocaps.runtime.program import Interruption, print_line, run_program

_READING = (
    "dataset",
    "view",
    "val_fold",
    "test_fold",
    *OF_TABLE,
    "threshold",
    "protocol",
    "split",
    "split_seed",
    "group_column",
    "allow_split_patients",
    "follow_links",
    "max_bad_share",
    "preset",
    "frames_per_clip",
)
"""Settings of a training that decide how its data are read, and how large its cache is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    given = command_line().parse_args(argv)
    settings = {name: getattr(given, name) for name in _READING if getattr(given, name) is not None}

    def body(_: Interruption) -> None:
        from cardiocaps.data.described import as_text, describe

        configs = [TrainConfig(data=path, **settings).resolved() for path in given.data]
        found = [describe(config) for config in configs]
        print_line(json.dumps(found, indent=2) if given.json else "\n\n".join(map(as_text, found)))

    return run_program(body)


def command_line() -> CommandLine:
    """The parser of the program."""
    parser = CommandLine(
        prog="python -m cardiocaps.data",
        usage="%(prog)s DATA... [options]",
        description="Say what data sets are, as a training with the same options would read them: layout, videos, "
        "labels and splits, targets, problems, patients in several splits, and the size of the cache. No video is "
        "decoded, so damaged videos are not found.",
        epilog=DISCLAIMER,
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        type=options()["data"].from_text,
        nargs="+",
        help="folder of a data set, or a table of videos (.csv, .parquet)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: a list with an entry for each DATA")
    add_options(parser, _READING)
    return parser


if __name__ == "__main__":
    sys.exit(main())
