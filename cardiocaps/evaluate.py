"""`python -m cardiocaps.evaluate RUN`: evaluate a run's best network on the test split once more.

The same code evaluates at the end of training, so the numbers are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cardiocaps import DISCLAIMER
from cardiocaps.config import OF_TABLE, CommandLine, add_options, options
from cardiocaps.runtime.program import Interruption, run_program

_CHANGEABLE = (
    "data",
    "dataset",
    "view",
    "val_fold",
    "test_fold",
    *OF_TABLE,
    "threshold",
    "follow_links",
    "group_column",
    "allow_split_patients",
    "max_bad_share",
    "cache_dir",
    "device",
    "threads",
    "workers",
)
"""Settings of the run that an evaluation may change: where the data lie, how they are read, and the machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.evaluate",
        description="Evaluate a run's best network on its test split once more and print the table; "
        "of several runs, their mean too.",
        epilog=DISCLAIMER,
    )
    path = options()["data"].from_text
    parser.add_argument("runs", metavar="RUN", type=path, nargs="+", help="folder of a run")
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="evaluate on other data than the run was trained on too, and say what has changed",
    )
    parser.add_argument("--out", metavar="PATH", type=path, help="also write the results to this new folder")
    add_options(parser, _CHANGEABLE, default="the run's own")
    given = parser.parse_args(argv)
    if given.out and len(given.runs) > 1:
        parser.error("argument --out: holds the results of one run; give one RUN")
    changed = {name: getattr(given, name) for name in _CHANGEABLE if getattr(given, name) is not None}

    def body(_: Interruption) -> None:
        from cardiocaps.evaluation.run import evaluate_runs

        evaluate_runs(given.runs, changed, given.out, allow_changed_data=given.allow_changed_data)

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
