"""`python -m cardiocaps.preview DATA --out FILE.png`: some videos, their calipers and views, and reconstructions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from cardiocaps import DISCLAIMER
from cardiocaps.config import OF_TABLE, CommandLine, add_options, options
from cardiocaps.runtime.program import Interruption, run_program

_CHANGEABLE = (
    "dataset",
    "view",
    *OF_TABLE,
    "threshold",
    "preset",
    "follow_links",
    "device",
    "threads",
)
"""Settings that say how the data are read, and where the network runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.preview",
        usage="%(prog)s DATA --out FILE.png [options]",
        description="Draw some videos of a data set, normal and abnormal ones: a frame with its calipers, the three "
        "views that a network gets, and with --run how the run's network reconstructs the frame.",
        epilog=DISCLAIMER,
    )
    path = options()["data"].from_text
    parser.add_argument("data", metavar="DATA", type=path, help="folder of a data set, or a table of videos")
    parser.add_argument(
        "--out", metavar="FILE.png", type=path, required=True, help="the picture; replaced if it exists"
    )
    parser.add_argument("--run", metavar="RUN", type=path, help="folder of a run whose test videos are shown")
    parser.add_argument(
        "--videos",
        metavar="N",
        type=replace(options()["phantom_videos"], low=1, high=50).from_text,
        default=4,
        help="number of videos, from 1 to 50 (default: 4)",
    )
    add_options(parser, _CHANGEABLE, default="the run's own, or as in a training")
    given = parser.parse_args(argv)
    if given.out.suffix.lower() != ".png":
        parser.error(f"--out is {given.out}; expected a name that ends in .png")
    changed = {name: getattr(given, name) for name in _CHANGEABLE if getattr(given, name) is not None}
    if given.run is not None and "preset" in changed:
        parser.error(f"--preset is {changed['preset']}; expected none, because the run has its own")

    def body(_: Interruption) -> None:
        from cardiocaps.explanation.samples import preview

        preview(given.data, given.out, given.videos, changed, given.run)

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
