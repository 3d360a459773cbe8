"""`python -m cardiocaps.predict RUN… INPUT… --out DIR`: what the networks of runs say of videos without labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cardiocaps import DISCLAIMER
from cardiocaps.config import CommandLine, add_options, options
from cardiocaps.runtime.program import Interruption, run_program

_CHANGEABLE = ("device", "threads", "decode_workers", "follow_links", "progress")
"""Settings of the runs that a prediction may change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.predict",
        usage="%(prog)s RUN... INPUT... --out DIR [options]",
        description="Predict for videos: a row for each of them in DIR/predictions.csv, with the probability of being "
        "abnormal, the decision, the regression and flags. The same command goes on after it was stopped.",
        epilog=DISCLAIMER,
    )
    path = options()["data"].from_text
    parser.add_argument(
        "paths",
        metavar="RUN... INPUT...",
        type=path,
        nargs="+",
        help="first the folders of runs, of which several make an ensemble; then videos, folders (searched with their "
        "subfolders), or CSV tables with a column of paths",
    )
    parser.add_argument("--out", metavar="DIR", type=path, required=True, help="folder of the results")
    parser.add_argument("--by-frame", action="store_true", help="also write DIR/frames.csv, a row for each frame")
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write DIR/report.html, a page to look at, with a picture of each video, and DIR/frames.csv",
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        help="with --report and one RUN: also show on the page where in its frames the network finds the class of a "
        "video, as python -m cardiocaps.explain does (Grad-CAM needs captum)",
    )
    parser.add_argument("--path-column", metavar="NAME", help="column of a table with the paths of the videos")
    parser.add_argument("--retry-failed", action="store_true", help="try videos again that could not be read before")
    add_options(parser, _CHANGEABLE, default="the run's own")
    given = parser.parse_args(argv)
    runs, inputs = _runs_and_inputs(given.paths)
    if not runs:
        parser.error(f"RUN is {given.paths[0]}; expected the folder of a run")
    if not inputs:
        parser.error("INPUT is missing; expected videos, folders or tables after the runs")
    if given.maps and not given.report:
        parser.error("argument --maps: shown in the report; give --report too")
    if given.maps and len(runs) > 1:
        parser.error("argument --maps: explains one network; give one RUN")
    changed = {name: getattr(given, name) for name in _CHANGEABLE if getattr(given, name) is not None}

    def body(_: Interruption) -> None:
        from cardiocaps.explanation.strip import illustration
        from cardiocaps.prediction.run import predict

        predict(
            runs,
            inputs,
            given.out,
            changed,
            path_column=given.path_column,
            by_frame=given.by_frame,
            report=given.report,
            illustrated=illustration if given.maps else None,
            retry=given.retry_failed,
        )

    return run_program(body)


def _runs_and_inputs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The runs come first: the folders that hold `run.json`."""
    number = next((i for i, path in enumerate(paths) if not (path / "run.json").is_file()), len(paths))
    return list(paths[:number]), list(paths[number:])


if __name__ == "__main__":
    sys.exit(main())
