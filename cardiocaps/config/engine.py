"""The options of programs that work on videos in their own process, or in actors of Ray."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

from cardiocaps.config.settings import options
from cardiocaps.runtime.ray_cluster import ADDRESS_HELP, ray_cluster


def add_engine_options(parser: ArgumentParser, work: str, cpus: str) -> None:
    """Add --engine, --address and --workers.

    Args:
        parser: gets the options.
        work: what is done where, for example "videos are decoded".
        cpus: what an actor takes, for example "one CPU".
    """
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help=f"where {work}: in this process, or in actors of Ray (default: local)",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help=f"with --engine ray: {ADDRESS_HELP}")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=replace(options()["phantom_videos"], low=1, high=10_000).from_text,
        help=f"with --engine ray: number of actors, each with {cpus} (default: as many as fit)",
    )


def check_engine_options(parser: ArgumentParser, given: Namespace) -> None:
    """End the program if an option of Ray is given to the other engine."""
    if given.engine == "local" and (given.address is not None or given.workers is not None):
        parser.error("arguments --address and --workers: are of --engine ray")


@contextmanager
def engine_of(given: Namespace, cpus: int = 1) -> Iterator[ModuleType | None]:
    """The module `ray`, connected inside the block; None for the engine of this process.

    Args:
        given: the parsed options.
        cpus: that an actor takes.

    Raises:
        ConfigError: as `ray_cluster`.
        ResourceError: as `ray_cluster`.
    """
    if given.engine == "local":
        yield None
        return
    with ray_cluster(given.address, (given.workers or 1) * cpus) as ray:
        yield ray
