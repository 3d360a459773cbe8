"""python -m cardiocaps.data.phantom OUT --videos 300 --seed 10"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cardiocaps.data.phantom.dataset import TABLE, write_phantom
from cardiocaps.errors import CardioCapsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or the error's own (cardiocaps/errors.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m cardiocaps.data.phantom",
        description="Write a synthetic echocardiogram study (parasternal long axis) in EchoNet-LVH's layout: "
        "MJPEG videos in Batch1 to Batch4 and MeasurementsList.csv. One video in five is abnormal.",
        epilog="A run that was cut off goes on where it stopped when it is started again in the same way.",
        allow_abbrev=False,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new, empty, or an unfinished phantom")
    parser.add_argument("--videos", type=int, default=300, help="number of videos, at least 10 (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=10, help="the same seed gives the same files (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, help="number of processes (default: one for each CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace a phantom in OUT, and the preview")
    parser.add_argument("--preview", metavar="FILE.png", type=Path, help="also write a contact sheet with the calipers")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        if options.preview:
            from cardiocaps.data.phantom.preview import check_preview, write_preview

            check_preview(options.preview, overwrite=options.overwrite)
        made = write_phantom(
            options.out,
            options.videos,
            options.seed,
            overwrite=options.overwrite,
            progress=sys.stderr.isatty(),
            processes=options.processes,
        )
        if options.preview:
            write_preview(options.preview, options.videos, options.seed)
    except CardioCapsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    if made:
        print(f"{options.out}: {made} videos made in {seconds:.0f} s, {options.videos} in all, and {TABLE}")
    else:
        print(f"{options.out}: complete already, {options.videos} videos and {TABLE}")
    if options.preview:
        print(f"{options.preview}: contact sheet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
