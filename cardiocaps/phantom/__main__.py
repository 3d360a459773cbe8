"""`python -m cardiocaps.phantom OUT --videos 300 --seed 10`: write a phantom study."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from cardiocaps.config import TRAINABLE_PHANTOM, CommandLine, options
from cardiocaps.phantom.layouts import LAYOUTS, LVH
from cardiocaps.runtime.program import Interruption, print_line, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.phantom",
        description="Write a synthetic echocardiogram study (parasternal long axis): MJPEG videos, and a table, in "
        "the layout of a data set. One video in five is abnormal.",
        epilog="After an interruption, the same command goes on where it stopped.",
    )
    path, videos, seed = (options()[name] for name in ("phantom_dir", "phantom_videos", "phantom_seed"))
    processes = options()["threads"].from_text
    parser.add_argument("out", metavar="OUT", type=path.from_text, help="new or empty folder, or unfinished phantom")
    parser.add_argument(
        "--videos",
        metavar="N",
        type=videos.from_text,
        default=300,
        help=f"{videos.allowed}; fewer than {TRAINABLE_PHANTOM} cannot be trained on (default: 300)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=seed.from_text, default=10, help="the same gives the same files (default: 10)"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LVH,
        help="echonet-lvh: a row for each measured length; echonet-dynamic: a row for each video, with the volumes of "
        f"its ventricle and the ejection fraction (default: {LVH})",
    )
    parser.add_argument("--processes", metavar="N", type=processes, help="default: one for each CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace a phantom in OUT, and the preview")
    parser.add_argument(
        "--preview", metavar="FILE.png", type=path.from_text, help="also write a contact sheet with the calipers"
    )
    given = parser.parse_args(arguments)

    def body(_: Interruption) -> None:
        from cardiocaps.phantom.dataset import write_phantom
        from cardiocaps.phantom.preview import check_preview, write_preview

        start = time.monotonic()
        if given.preview:
            check_preview(given.preview, overwrite=given.overwrite)
        made = write_phantom(
            given.out,
            given.videos,
            given.seed,
            overwrite=given.overwrite,
            progress=True,
            processes=given.processes,
            layout=given.layout,
        )
        seconds = time.monotonic() - start
        done = f"{made} videos made in {seconds:.0f} s, {given.videos} in all" if made else "complete already"
        print_line(f"{given.out}: {done}, and {LAYOUTS[given.layout].table}")
        if given.preview:
            write_preview(given.preview, given.videos, given.seed)
            print_line(f"{given.preview}: contact sheet")

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
