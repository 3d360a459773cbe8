"""`python -m cardiocaps.data DATA…`: what data sets hold, and what is wrong with them. No video is decoded.

`python -m cardiocaps.data build-cache DATA…` decodes what trainings will read, in this process or on Ray.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from cardiocaps import DISCLAIMER
from cardiocaps.config import OF_TABLE, CommandLine, TrainConfig, add_options, options
from cardiocaps.config.engine import add_engine_options, check_engine_options, engine_of
from cardiocaps.errors import printable
from cardiocaps.runtime.program import Interruption, print_line, run_program

_BUILD_CACHE = "build-cache"

_READING = (
    "task",
    "regression_target",
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


_DECODING = (*_READING, "frame_choice", "limit", "cache_dir", "decode_workers", "video_reader", "progress")
"""Settings of a training that decide which frames are decoded, and how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [_BUILD_CACHE]:
        return _build_cache(arguments[1:])
    given = command_line().parse_args(arguments)
    settings = _settings(given, _READING)

    def body(_: Interruption) -> None:
        from cardiocaps.data.described import as_text, describe

        configs = [TrainConfig(data=path, **settings).resolved() for path in given.data]
        found = [describe(config) for config in configs]
        print_line(json.dumps(found, indent=2) if given.json else "\n\n".join(map(as_text, found)))

    return run_program(body)


def _build_cache(arguments: Sequence[str]) -> int:
    parser = CommandLine(
        prog=f"python -m cardiocaps.data {_BUILD_CACHE}",
        usage="%(prog)s DATA... [options]",
        description="Decode the frames that a training with the same options will read, so that it begins at once. "
        "Videos that are in the cache already are not decoded again; so the same command goes on after it was stopped.",
        epilog=DISCLAIMER,
    )
    _add_data(parser)
    add_engine_options(parser, "videos are decoded", "one CPU")
    add_options(parser, _DECODING)
    given = parser.parse_args(arguments)
    check_engine_options(parser, given)
    settings = _settings(given, _DECODING)

    def body(_: Interruption) -> None:
        from cardiocaps.data.cache import default_folder
        from cardiocaps.data.on_ray import on_ray
        from cardiocaps.data.open import decoded, read_study

        configs = [TrainConfig(data=path, **settings).resolved() for path in given.data]
        with engine_of(given) as ray:
            for config in configs:
                study = read_study(config)
                study.target(config.regression_target)  # raises if it has none of this name
                found = decoded(config, study, None if ray is None else on_ray(ray, given.workers))
                new = sum(frames.decoded for frames in found.frames.values())
                size = sum(frames.file.stat().st_size for frames in found.frames.values())
                folder = config.cache_dir or default_folder()
                print_line(found.study.summary())
                where = f"{len(found.frames)} videos of {printable(config.data)} are in {printable(folder)}"
                print_line(f"{where}, {size / 1e6:.1f} MB; {new} of them were decoded now")

    return run_program(body)


def command_line() -> CommandLine:
    """The parser of the program."""
    parser = CommandLine(
        prog="python -m cardiocaps.data",
        usage="%(prog)s DATA... [options]",
        description="Say what data sets are, as a training with the same options would read them: layout, videos, "
        "labels and splits, targets, problems, patients in several splits, and the size of the cache. No video is "
        f"decoded, so damaged videos are not found. `%(prog)s {_BUILD_CACHE} DATA...` decodes them.",
        epilog=DISCLAIMER,
    )
    _add_data(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: a list with an entry for each DATA")
    add_options(parser, _READING)
    return parser


def _settings(given: Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _add_data(parser: CommandLine) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        type=options()["data"].from_text,
        nargs="+",
        help="folder of a data set, or a table of videos (.csv, .parquet)",
    )


if __name__ == "__main__":
    sys.exit(main())
