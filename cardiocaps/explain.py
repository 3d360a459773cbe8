"""`python -m cardiocaps.explain RUN INPUT… --out DIR`: where in its frames a network finds the class of a video."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cardiocaps import DISCLAIMER
from cardiocaps.config import CommandLine, add_options, options
from cardiocaps.runtime.program import Interruption, run_program

_CHANGEABLE = ("device", "threads", "decode_workers", "follow_links", "progress")
"""Settings of the run that an explanation may change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.explain",
        usage="%(prog)s RUN INPUT... --out DIR [options]\n       %(prog)s RUN --measure --out DIR [options]",
        description="Show where in its frames a network finds the class of a video: a row for each video in "
        "DIR/explanations.csv, and a picture. The same command goes on after it was stopped.",
        epilog=DISCLAIMER,
    )
    path = options()["data"].from_text
    parser.add_argument("run", metavar="RUN", type=path, help="the folder of a run")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        type=path,
        nargs="*",
        help="videos, folders (searched with their subfolders), or CSV tables with a column of paths",
    )
    parser.add_argument("--out", metavar="DIR", type=path, required=True, help="folder of the results")
    parser.add_argument(
        "--method",
        action="append",
        choices=["capsules", "gradcam"],
        default=[],
        help="capsules: what the primary capsules of CardioCaps send; gradcam: Grad-CAM. May be given twice (default: "
        "all that the network allows)",
    )
    parser.add_argument(
        "--class",
        dest="explained",
        choices=["decided", "normal", "abnormal"],
        default="decided",
        help="the class that is explained (default: decided, the one on whose side of the threshold the video lies)",
    )
    parser.add_argument("--arrays", action="store_true", help="also write the maps of all frames to a .npz file")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="without INPUT, for a run on the phantom: measure how well the maps point at the left ventricle, and "
        "write DIR/measures.csv",
    )
    parser.add_argument("--path-column", metavar="NAME", help="column of a table with the paths of the videos")
    parser.add_argument("--retry-failed", action="store_true", help="try videos again that could not be read before")
    add_options(parser, _CHANGEABLE, default="the run's own")
    given = parser.parse_args(argv)
    if not (given.run / "run.json").is_file():
        parser.error(f"RUN is {given.run}; expected the folder of a run")
    if given.measure and given.inputs:
        parser.error(f"INPUT is {given.inputs[0]}; expected none, because --measure takes the run's phantom")
    if not given.inputs and not given.measure:
        parser.error("INPUT is missing; expected videos, folders or tables after the run")
    changed = {name: getattr(given, name) for name in _CHANGEABLE if getattr(given, name) is not None}

    def body(_: Interruption) -> None:
        if given.measure:
            from cardiocaps.explanation.measure import measure

            measure(given.run, given.out, changed, given.method)
            return
        from cardiocaps.explanation.run import explain

        explain(
            given.run,
            given.inputs,
            given.out,
            changed,
            methods=given.method,
            explained=given.explained,
            arrays=given.arrays,
            path_column=given.path_column,
            retry=given.retry_failed,
        )

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
