"""Decodes and scores videos in the actors of a Ray cluster, as a pipeline of Ray Data.

Each actor has the networks and takes some videos at a time, of which their rows come back. Ray starts an actor again
whose process or node is lost, and gives its videos to an actor once more.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from cardiocaps.config import TrainConfig, read_run
from cardiocaps.errors import CardioCapsError, CheckpointError, ConfigError
from cardiocaps.prediction.ensemble import Ensemble, load
from cardiocaps.prediction.inputs import Input
from cardiocaps.prediction.results import FAILED
from cardiocaps.prediction.run import Scored, scored
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.progress import shown

_AT_A_TIME = 16
"""Videos that an actor takes at a time, at least: a lost actor's are decoded once more."""

_RETRIES = 3
"""How often videos are given to another actor before they count as what brings the actors down."""


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
    if not videos:
        return
    data = require_package("ray.data", "ray[data]", "engine: 'ray'", extra="cluster")
    arrow = require_package("pyarrow", "pyarrow", "engine: 'ray'", extra="cluster")
    config = replace(read_run(runs[0]), **changed)
    threads = config.threads or 1
    gpus, most = _room(ray, config, threads)
    assert config.batch_size is not None and config.frames_per_clip is not None
    step = max(_AT_A_TIME, -(-config.batch_size // config.frames_per_clip))
    workers = min(workers or most, -(-len(videos) // step))

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # videos that bring down every actor cost only their own rows
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # no tracebacks
    rows = [
        {
            "number": i,
            "name": one.name,
            "path": str(one.path.absolute()),
            "root": str(one.root.absolute()),
            "url": one.url,
        }
        for i, one in enumerate(videos)
    ]
    schema = arrow.schema(
        [("number", arrow.int64()), *((name, arrow.string()) for name in ("name", "path", "root", "url"))]
    )
    blocks = [arrow.Table.from_pylist(rows[i : i + step], schema=schema) for i in range(0, len(rows), step)]
    told = {**changed, "threads": threads, "decode_workers": config.decode_workers or threads, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of Ray's own settings, and of max_task_retries (until 2.64)
        lines = data.from_arrow(blocks).map_batches(
            _Scorer,
            fn_constructor_args=([run.absolute() for run in runs], told),
            batch_size=None,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=gpus,
            max_task_retries=_RETRIES,
        )
    done: set[int] = set()
    found = _rows(lines)
    for number, content in shown(found, len(videos), "predicting") if config.progress else found:
        if number in done:  # a block that Ray made anew
            continue
        done.add(number)
        row = content["row"]
        yield Scored(videos[number], row["reason"] if row["status"] == FAILED else None, row, content["frames"])
    if len(done) < len(videos):
        raise CardioCapsError(
            f"Ray returned the rows of {len(done)} of {len(videos)} videos: the actors that had the others were lost "
            f"{_RETRIES + 1} times; the same command tries them again"
        )


def _room(ray: ModuleType, config: TrainConfig, threads: int) -> tuple[int, int]:
    """The GPUs of an actor, and for how many actors the cluster has room."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if max(cpus, default=0) < threads:
        raise ConfigError(
            f"threads is {threads}; expected at most {max(cpus, default=0)}, the CPUs of Ray's largest node"
        )
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if config.device == "cuda" and not gpus:
        raise ConfigError("device is 'cuda'; expected auto or cpu, because no node of Ray has a GPU")
    fitting = sum(count // threads for count in cpus)
    return (1, min(gpus, fitting)) if gpus and config.device != "cpu" else (0, fitting)


def _rows(lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for batch in lines.iter_batches(batch_size=None, batch_format="pyarrow"):
        for number, text in zip(batch["number"].to_pylist(), batch["text"].to_pylist(), strict=True):
            content = json.loads(text)
            if "error" in content:
                kinds: dict[str, type[CardioCapsError]] = {
                    "ConfigError": ConfigError,
                    "CheckpointError": CheckpointError,
                }
                raise kinds.get(content["kind"], CardioCapsError)(content["error"])
            yield number, content


class _Scorer:
    """An actor: the networks of the runs on its machine."""

    def __init__(self, runs: Sequence[Path], changed: Mapping[str, Any]) -> None:
        self.runs, self.changed = runs, changed
        self.config: TrainConfig | None = None
        self.ensemble: Ensemble | None = None
        self.at_end = ExitStack()

    def __call__(self, batch: Any) -> Any:
        """The rows of the videos of a batch, as JSON; or the error that ends the prediction."""
        import pyarrow

        rows = batch.to_pylist()
        try:
            texts = [json.dumps({"row": one.row, "frames": one.frames}) for one in self._scored(rows)]
        except CardioCapsError as error:  # Ray would show a traceback, and try again
            texts = [json.dumps({"error": str(error), "kind": type(error).__name__})] * len(rows)
        return pyarrow.table({"number": [row["number"] for row in rows], "text": texts})

    def _scored(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Scored]:
        if self.ensemble is None or self.config is None:
            self.config = replace(read_run(self.runs[0]), **self.changed)
            machine = self.at_end.enter_context(machine_for(self.config))
            self.ensemble = load(self.runs, machine, self.changed)
        videos = [Input(row["name"], Path(row["path"]), Path(row["root"]), row["url"]) for row in rows]
        return scored(self.ensemble, videos, self.config, "predicting")
