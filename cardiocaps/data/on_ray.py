"""Decodes videos into the cache in the actors of a Ray cluster, whose machines share its folder and the videos."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cardiocaps.data.cache import Decoder, Engine, Entry, Frames, Result, from_json, to_json
from cardiocaps.errors import ConfigError, OutputError, printable
from cardiocaps.runtime.files import LAG, appears
from cardiocaps.runtime.ray_data import mapped_on_ray

_AT_A_TIME = 16
"""Videos that an actor takes at a time."""


def on_ray(ray: ModuleType, workers: int | None = None) -> Engine:
    """An engine for `cache.build`: each actor decodes in one CPU.

    Args:
        ray: the module, connected to a cluster.
        workers: number of actors; None: as many as the cluster has room for.

    The engine raises:
        ConfigError: a machine does not see the folder of the cache.
        OutputError: this machine does not see what the others have written.
        CardioCapsError: some videos brought down every actor that had them.
    """

    @contextmanager
    def decoding(decoder: Decoder, known: Mapping[Path, Entry | None]) -> Iterator[Iterator[tuple[Path, Result]]]:
        decoder = replace(decoder, folder=decoder.folder.absolute())
        paths = list(known)
        items = [
            {"path": str(path.absolute()), "known": None if entry is None else to_json(entry)}
            for path, entry in known.items()
        ]

        def results() -> Iterator[tuple[Path, Result]]:
            for number, content in mapped_on_ray(
                ray, items, _Decoding, (decoder,), at_a_time=_AT_A_TIME, cpus=1, workers=workers
            ):
                yield paths[number], _seen(decoder, _result(content))

        yield results()

    return decoding


class _Decoding:
    """What an actor does."""

    def __init__(self, decoder: Decoder) -> None:
        if not decoder.folder.is_dir():
            raise ConfigError(
                f"cache_dir is {printable(decoder.folder)}, which {socket.gethostname()} does not see; expected a "
                "folder that all machines share, under the same path"
            )
        self._decoder = decoder

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            found = self._decoder(Path(item["path"]), from_json(item["known"]))
            if isinstance(found, str):
                yield {"reason": found}
            else:
                own = {"file": str(found.file), "numbers": found.numbers.tolist()}
                yield own | {"entry": to_json(found.video), "blank": found.blank, "decoded": found.decoded}


def _result(content: dict[str, Any]) -> Result:
    if "reason" in content:
        return str(content["reason"])
    entry = from_json(content["entry"])
    assert entry is not None
    numbers = np.array(content["numbers"], np.int64)
    return Frames(entry, Path(content["file"]), numbers, content["blank"], content["decoded"])


def _seen(decoder: Decoder, found: Result) -> Result:
    """A result whose file this machine sees; waits as long as a shared file system may lag. Raises OutputError."""
    if isinstance(found, Frames) and not appears(decoder.folder, lambda: decoder.has(found), LAG):
        raise OutputError(
            f"cache_dir is {printable(decoder.folder)}: what a machine of Ray has written there is not to be seen here "
            f"after {LAG:.0f} s; expected a folder that all machines share"
        )
    return found
