"""`python -m cardiocaps.predict RUN… INPUT… --out DIR`: what the networks of runs say of videos without labels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cardiocaps import DISCLAIMER
from cardiocaps.config import CommandLine, add_options, options
from cardiocaps.config.engine import add_engine_options, check_engine_options, engine_of
from cardiocaps.runtime.program import Interruption, run_program

if TYPE_CHECKING:
    from cardiocaps.prediction.inputs import Input
    from cardiocaps.prediction.run import Scored

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
        type=_place,
        nargs="+",
        help="first the folders of runs, of which several make an ensemble; then videos, folders (searched with their "
        "subfolders), or CSV tables with a column of paths; each may be a URL that fsspec knows, such as s3://…",
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
    parser.add_argument("--parquet", action="store_true", help="also write DIR/predictions.parquet, the same rows")
    add_engine_options(parser, "videos are decoded and scored", "--threads CPUs, by default one")
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
    if given.engine == "ray" and given.report:
        parser.error("argument --report: pictures are drawn by the local engine; leave out --engine ray")
    check_engine_options(parser, given)
    changed = {name: getattr(given, name) for name in _CHANGEABLE if getattr(given, name) is not None}

    def body(_: Interruption) -> None:
        from cardiocaps.explanation.strip import illustration
        from cardiocaps.prediction.run import predict

        with engine_of(given, changed.get("threads") or 1) as ray:
            predict(
                runs,
                inputs,
                given.out,
                changed,
                on=None if ray is None else _on_ray(ray, runs, changed, given.workers),
                path_column=given.path_column,
                by_frame=given.by_frame,
                report=given.report,
                illustrated=illustration if given.maps else None,
                retry=given.retry_failed,
                parquet=given.parquet,
            )

    return run_program(body)


def _on_ray(
    ray: ModuleType, runs: Sequence[Path], changed: Mapping[str, Any], workers: int | None
) -> Callable[[Sequence[Input]], Iterator[Scored]]:
    """What scores videos in actors."""
    from cardiocaps.prediction.on_ray import scored_on_ray

    return lambda videos: scored_on_ray(ray, runs, changed, videos, workers)


def _place(text: str) -> Path | str:
    return text if "://" in text else options()["data"].from_text(text)


def _runs_and_inputs(paths: Sequence[Path | str]) -> tuple[list[Path], list[Path | str]]:
    """The runs come first: the folders that hold `run.json`."""
    runs: list[Path] = []
    for path in paths:
        if isinstance(path, str) or not (path / "run.json").is_file():
            break
        runs.append(path)
    return runs, list(paths[len(runs) :])


if __name__ == "__main__":
    sys.exit(main())
