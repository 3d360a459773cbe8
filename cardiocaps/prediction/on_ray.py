"""Decodes and scores videos in the actors of a Ray cluster, each of which has the networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from cardiocaps.config import read_run
from cardiocaps.prediction.ensemble import load
from cardiocaps.prediction.inputs import Input
from cardiocaps.prediction.results import FAILED
from cardiocaps.prediction.run import Scored, scored
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.progress import shown
from cardiocaps.runtime.ray_data import mapped_on_ray

_AT_A_TIME = 16
"""Videos that an actor takes at a time, at least."""


def scored_on_ray(
    ray: ModuleType,
    runs: Sequence[Path],
    changed: Mapping[str, Any],
    videos: Sequence[Input],
    workers: int | None = None,
) -> Iterator[Scored]:
    """Decode videos and score them, in the order in which they are done, each of them once.

    Args:
        ray: the module, connected to a cluster.
        runs: folders of runs, which all machines see.
        changed: settings that differ from the runs'. An actor takes `threads` CPUs (None: one), and a GPU if
            it uses one.
        workers: number of actors; None: as many as the cluster has room for.

    Raises:
        ConfigError: a machine does not see the runs, or none has as many CPUs, or a GPU, as an actor needs.
        CheckpointError: an output is not finite.
        CardioCapsError: some videos have no row, because every actor that had them was lost.
    """
    config = replace(read_run(runs[0]), **changed)
    threads = config.threads or 1
    assert config.batch_size is not None and config.frames_per_clip is not None
    items = [
        {"name": one.name, "path": str(one.path.absolute()), "root": str(one.root.absolute()), "url": one.url}
        for one in videos
    ]
    told = {**changed, "threads": threads, "decode_workers": config.decode_workers or threads, "progress": False}
    found = mapped_on_ray(
        ray,
        items,
        _Scorer,
        ([run.absolute() for run in runs], told),
        at_a_time=max(_AT_A_TIME, -(-config.batch_size // config.frames_per_clip)),
        cpus=threads,
        uses_gpu=config.device != "cpu",
        needs_gpu=config.device == "cuda",
        workers=workers,
    )
    for number, content in shown(found, len(videos), "predicting") if config.progress else found:
        row = content["row"]
        yield Scored(videos[number], row["reason"] if row["status"] == FAILED else None, row, content["frames"])


class _Scorer:
    """What an actor does: it loads the networks of the runs, and scores videos."""

    def __init__(self, runs: Sequence[Path], changed: Mapping[str, Any]) -> None:
        self._config = replace(read_run(runs[0]), **changed)
        self._at_end = ExitStack()
        self._ensemble = load(runs, self._at_end.enter_context(machine_for(self._config)), changed)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of the videos."""
        videos = [Input(one["name"], Path(one["path"]), Path(one["root"]), one["url"]) for one in items]
        for one in scored(self._ensemble, videos, self._config, "predicting"):
            yield {"row": one.row, "frames": one.frames}
