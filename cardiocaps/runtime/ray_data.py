"""Items given to the actors of a Ray cluster, as a pipeline of Ray Data.

An actor takes some items at a time, and their results come back. Ray starts an actor again whose process or node is
lost, and gives its items to an actor once more.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from cardiocaps import __version__
from cardiocaps.errors import CardioCapsError, CheckpointError, ConfigError, OutputError, printable
from cardiocaps.runtime.packages import check_version, require_package
from cardiocaps.runtime.ray_cluster import nodes_for, room

_RETRIES = 3
"""How often items are given to another actor before they count as what brings the actors down."""

_ERRORS = {kind.__name__: kind for kind in (CardioCapsError, CheckpointError, ConfigError, OutputError)}

JSON = Mapping[str, Any]


class Work(Protocol):
    """What an actor does: the results of some items, in their order. An exception ends everything."""

    def __call__(self, items: Sequence[JSON]) -> Iterable[JSON]: ...


def mapped_on_ray(
    ray: ModuleType,
    items: Sequence[JSON],
    make: Callable[..., Work],
    arguments: Sequence[Any],
    *,
    at_a_time: int,
    cpus: int,
    uses_gpu: bool = False,
    needs_gpu: bool = False,
    workers: int | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of items and their results, in the order in which they are done, each once.

    Args:
        ray: the module, connected to a cluster.
        items: in types of JSON.
        make: `make(*arguments)` makes what an actor does, once in each actor. All of it can be pickled.
        at_a_time: items that an actor takes at a time; a lost actor's are done again.
        cpus: that an actor takes.
        uses_gpu: whether it takes a GPU, if the cluster has some.
        needs_gpu: whether a cluster without one is an error.
        workers: number of actors; None: as many as the cluster has room for.

    Raises:
        ConfigError: no machine has as many CPUs, or a GPU, as an actor needs; a machine has another version; or raised
            by an actor.
        CardioCapsError: an actor raised any exception; or some items have no result, because every actor that had them
            was lost.
    """
    if not items:
        return
    data = require_package("ray.data", "ray[data]", "engine: 'ray'", extra="cluster")
    arrow = require_package("pyarrow", "pyarrow", "engine: 'ray'", extra="cluster")
    gpus, nodes = nodes_for(ray, uses_gpu, needs_gpu)
    most = room(nodes, cpus, gpus)
    workers = min(workers or most, -(-len(items) // at_a_time))

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # items that bring down every actor cost only their own results
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # no tracebacks
    texts = list(map(json.dumps, items))
    blocks = [
        arrow.table({"number": range(i, min(i + at_a_time, len(texts))), "text": texts[i : i + at_a_time]})
        for i in range(0, len(texts), at_a_time)
    ]
    with warnings.catch_warnings():
        # Of Ray's own settings, and of max_task_retries (until 2.64).
        warnings.simplefilter("ignore", DeprecationWarning)
        results = data.from_arrow(blocks).map_batches(
            _Actor,
            fn_constructor_args=(make, arguments, __version__),
            batch_size=None,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=_RETRIES,
        )
    done: set[int] = set()
    for number, result in _results(results):
        if number not in done:  # else Ray made its block anew
            done.add(number)
            yield number, result
    if len(done) < len(items):
        raise CardioCapsError(
            f"Ray returned the results of {len(done)} of {len(items)} videos: the actors that had the others were lost "
            f"{_RETRIES + 1} times; the same command tries them again"
        )


def _results(batches: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for batch in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
        for number, text in zip(batch["number"].to_pylist(), batch["text"].to_pylist(), strict=True):
            content = json.loads(text)
            if "error" in content:
                raise _ERRORS.get(content["kind"], CardioCapsError)(content["error"])
            yield number, content["result"]


class _Actor:
    """What Ray Data makes in the process of an actor, and calls with a table of items."""

    def __init__(self, make: Callable[..., Work], arguments: Sequence[Any], version: str) -> None:
        self._make, self._arguments, self._version = make, arguments, version
        self._work: Work | None = None

    def __call__(self, batch: Any) -> Any:
        """The results of the items of a batch, as JSON; or the error that ends everything."""
        import pyarrow

        items = list(map(json.loads, batch["text"].to_pylist()))
        try:
            check_version(self._version, "work")
            if self._work is None:
                self._work = self._make(*self._arguments)
            texts = [json.dumps({"result": result}) for result in self._work(items)]
        except Exception as error:  # Ray would drop the batch, as one whose actors were all lost
            said = str(error)
            if not isinstance(error, CardioCapsError):
                said = f"an actor failed: {type(error).__name__}: {printable(said.strip().partition(chr(10))[0])}"
            texts = [json.dumps({"error": said, "kind": type(error).__name__})] * len(items)
        return pyarrow.table({"number": batch["number"], "text": texts})
