"""`python -m cardiocaps.phantom OUT --videos 300 --seed 10`: write a phantom study."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from cardiocaps.config import TRAINABLE_PHANTOM, CommandLine, options
from cardiocaps.phantom.layouts import LAYOUTS, LVH
from cardiocaps.phantom.variants import EASY, NO_SHIFT, SHIFT_BOUNDS, SHIFT_HELP, Shift, Variant
from cardiocaps.runtime.program import Interruption, print_line, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.phantom",
        description="Write a synthetic echocardiogram study (parasternal long axis): MJPEG videos, and a table, in "
        "the layout of a data set. One video in five is abnormal.",
        epilog="A shift changes the examination, not the patient: hearts and labels are those of the same command "
        "without it. After an interruption, the same command goes on where it stopped.",
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
    difficulty, test, abnormal = (options()[f"phantom_{name}"] for name in ("difficulty", "test", "abnormal"))
    parser.add_argument(
        "--difficulty",
        choices=difficulty.choices,
        default=difficulty.default,
        help=f"{difficulty.help} (default: {difficulty.default})",
    )
    parser.add_argument(
        "--test",
        metavar="N",
        type=test.from_text,
        help="test videos, which stay the same if --videos changes (default: 30 %% of the videos)",
    )
    parser.add_argument(
        "--abnormal",
        metavar="X",
        type=abnormal.from_text,
        default=abnormal.default,
        help=f"share of abnormal videos in training and validation, with --test (default: {abnormal.default})",
    )
    parser.add_argument("--test-only", action="store_true", help="write the test videos alone")
    shift = parser.add_argument_group("shift")
    for name, (low, high) in SHIFT_BOUNDS.items():
        number = replace(abnormal, low=low, high=high)
        shift.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="X",
            type=number.from_text,
            default=getattr(NO_SHIFT, name),
            help=f"{SHIFT_HELP[name]}; {number.allowed}",
        )
    shift.add_argument("--machine", action="store_true", help=SHIFT_HELP["machine"])
    parser.add_argument("--processes", metavar="N", type=processes, help="default: one for each CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace a phantom in OUT, and the preview")
    parser.add_argument(
        "--preview", metavar="FILE.png", type=path.from_text, help="also write a contact sheet with the calipers"
    )
    given = parser.parse_args(arguments)

    def body(_: Interruption) -> None:
        from cardiocaps.phantom.dataset import write_phantom
        from cardiocaps.phantom.patients import plan
        from cardiocaps.phantom.preview import check_preview, write_preview

        variant = Variant(
            given.difficulty,
            given.test,
            given.abnormal,
            Shift(**{name: getattr(given, name) for name in SHIFT_HELP}),
            given.test_only,
        )
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
            variant=variant,
        )
        seconds = time.monotonic() - start
        written = given.videos
        if given.test_only:
            written = given.test or len(plan(given.videos, given.seed, variant))
        done = f"{made} videos made in {seconds:.0f} s, {written} in all" if made else "complete already"
        print_line(f"{given.out}: {done}, and {LAYOUTS[given.layout].table}")
        if given.preview:
            write_preview(given.preview, given.videos, given.seed, variant)
            print_line(f"{given.preview}: contact sheet")
        if given.difficulty != EASY:
            _print_ceiling(given.videos, given.seed, variant)

    return run_program(body)


def _print_ceiling(videos: int, seed: int, variant: Variant) -> None:
    from cardiocaps.phantom.ceiling import ceiling
    from cardiocaps.phantom.patients import plan

    patients = [patient for patient in plan(videos, seed, variant) if patient.split == "test"]
    if len({patient.abnormal for patient in patients}) < 2:
        return  # a very small study
    found = ceiling(patients, variant)
    rows = (("Bayes bound, from the true lengths", found.bayes), ("another reader", found.second_reader))
    for title, report in rows:
        auroc, precision = (report.metrics[name] for name in ("auroc", "average_precision"))
        print_line(f"{title}, {len(patients)} test videos: AUROC {auroc}; average precision {precision}")


if __name__ == "__main__":
    sys.exit(main())
