"""`python -m cardiocaps.experiments table1 … | all`: train the systems that tables and figures of the paper compare.

All systems are trained under the same conditions. Then the tables and figures are written.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps import DISCLAIMER
from cardiocaps.config import CommandLine, TrainConfig, add_options, options, settings_that_affect
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.plan import FIRST_SEED, FORMS, PHANTOM, PUBLISHED_SEEDS
from cardiocaps.runtime.program import Interruption, print_line, run_program
from cardiocaps.runtime.ray_cluster import ADDRESS_HELP

if TYPE_CHECKING:
    from cardiocaps.experiments.engines.engine import Engine

ENGINES = ("local", "ray", "submitit")

# Settings that each system decides, and settings of a single run.
_BY_SYSTEM = ("model", "form", "routing", "affine", "renormalise", "class_weight", "regression_weight", "backend")
_PROCESSES = ("devices", "nodes", "strategy", "rendezvous", "connect_timeout")
_BY_RUN = ("seed", "split_seed", "init", "freeze", "logger", "task", *_PROCESSES, *settings_that_affect("place"))


def parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m cardiocaps.experiments",
        description="Train every system that the named tables and figures compare, each with several seeds, and write "
        "them. Without --data and without --phantom-videos, the phantom has 682 videos, 300 of them for the test. "
        "Finished jobs are not repeated: after an interruption, the same command goes on.",
        epilog=DISCLAIMER,
    )
    parser.add_argument(
        "exhibits",
        metavar="EXHIBIT",
        nargs="+",
        choices=[*EXHIBITS, "all"],
        help=f"what to write: {', '.join(EXHIBITS)}, or all",
    )
    number = options()["phantom_videos"]  # its reader of integers, with other bounds
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=replace(number, low=1, high=100).from_text,
        default=3,
        help=f"seeds for each system, from {FIRST_SEED} on (default: 3)",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=FORMS[0],
        help="rows of tables I to VI and figures 3 to 5: corrected; published, as in the code published with the "
        f"paper (seeds {' and '.join(map(str, PUBLISHED_SEEDS))}); or both (default: {FORMS[0]})",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=replace(number, low=1, high=256).from_text,
        help="systems trained at a time, each with its share of the CPU (default: 1; of a cluster, as many as fit)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="where the systems are trained: in processes of this machine, as tasks of Ray, or as jobs of SLURM "
        "(default: local)",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help=f"with --engine ray: {ADDRESS_HELP}")
    parser.add_argument(
        "--slurm",
        metavar="KEY=VALUE",
        type=_parameter,
        action="append",
        default=[],
        help="with --engine submitit: a parameter of submitit, for example slurm_partition=gpu, timeout_min=600 or "
        "gpus_per_node=1; can be given several times",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=options()["data"].from_text,
        help="folder of the experiments (default: experiments/PRESET, or, for another phantom than the usual one, for "
        "example experiments/PRESET-hard-seed11)",
    )
    add_options(parser, [name for name in options() if name not in (*_BY_SYSTEM, *_BY_RUN)])
    return parser


def _with_phantom(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command line, with those of PHANTOM if it names neither data nor a phantom's size."""
    if any(given[name] is not None for name in ("data", "phantom_videos", "phantom_test")):
        return dict(given)
    own = {**PHANTOM, "phantom_dir": Path("-".join([str(PHANTOM["phantom_dir"]), *_kind_of_phantom(given)]))}
    return {**given, **{name: value for name, value in own.items() if given[name] is None}}


def _kind_of_phantom(given: Mapping[str, Any]) -> list[str]:
    """What tells phantoms of one size apart, for the names of their folders; nothing for the default."""
    forms = {"phantom_difficulty": "{}", "phantom_seed": "seed{}", "phantom_abnormal": "abnormal{:g}"}
    return [
        form.format(given[name]) for name, form in forms.items() if given[name] not in (None, options()[name].default)
    ]


def _default_out(config: TrainConfig, given: Mapping[str, Any]) -> Path:
    return Path("experiments", "-".join([config.preset, *([] if config.data else _kind_of_phantom(given))]))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if a system failed; else as `cardiocaps.train.main`."""
    line = parser()
    given = _with_phantom(vars(line.parse_args(argv)))
    names, seeds, form, at_once, out = (given.pop(name) for name in ("exhibits", "seeds", "form", "jobs", "out"))
    kind, address, slurm = (given.pop(name) for name in ("engine", "address", "slurm"))
    if address is not None and kind != "ray":
        line.error("argument --address: is of --engine ray")
    if slurm and kind != "submitit":
        line.error("argument --slurm: is of --engine submitit")

    def body(_: Interruption) -> None:
        from cardiocaps.experiments.run import run

        config = TrainConfig(**{name: value for name, value in given.items() if value is not None}, seed=FIRST_SEED)
        exhibits = _all(config) if "all" in names else list(dict.fromkeys(names))
        folder = out or _default_out(config, given)
        of_form = [] if form == FORMS[0] else ["--form", form]
        on = [] if kind == "local" else ["--engine", kind]
        jobs = [] if at_once is None and kind != "local" else ["--jobs", str(at_once or 1)]
        typed = [*names, "--seeds", str(seeds), *of_form, *jobs, *on, *_as_typed(given)]
        command = " ".join(["python -m cardiocaps.experiments", *typed])
        with _engine(kind, at_once, config.threads, address, dict(slurm)) as engine:
            run([EXHIBITS[name] for name in exhibits], config, seeds, engine, folder, command, form)

    return run_program(body)


def _all(config: TrainConfig) -> list[str]:
    """The exhibits that an experiment with these settings can make; prints which it leaves out and why."""
    reasons = {name: exhibit.why_not(config) for name, exhibit in EXHIBITS.items()}
    for name, reason in reasons.items():
        if reason is not None:
            print_line(f"without {name}: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


@contextmanager
def _engine(
    kind: str, at_once: int | None, threads: int | None, address: str | None, slurm: Mapping[str, str | int]
) -> Iterator[Engine]:
    if kind == "ray":
        from cardiocaps.experiments.engines.ray import RayEngine

        with RayEngine.connected(address, at_once, threads) as engine:
            yield engine
    elif kind == "submitit":
        from cardiocaps.experiments.engines.submitit import SubmititEngine

        yield SubmititEngine(at_once, slurm)
    else:
        from cardiocaps.experiments.engines.local import LocalEngine

        yield LocalEngine(at_once or 1)


def _parameter(text: str) -> tuple[str, str | int]:
    """KEY=VALUE; numbers become int, as submitit wants them."""
    key, sign, value = text.partition("=")
    if not (sign and key.isidentifier() and value):
        raise ArgumentTypeError(f"{text!r}; expected KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


def _as_typed(given: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a command line, without paths, which can identify the user."""
    for name, value in given.items():
        option = options()[name]
        if value is None or (option.kind is Path and name != "data"):
            continue
        if option.kind is bool:
            yield option.flag if value else option.flag.replace("--", "--no-", 1)
        elif option.kind is dict:
            yield from (f"{option.flag} {key}={number:.10g}" for key, number in value.items())
        else:
            yield f"{option.flag} {'FOLDER' if option.kind is Path else shlex.quote(str(value))}"


if __name__ == "__main__":
    sys.exit(main())
