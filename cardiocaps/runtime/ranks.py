"""The processes of one training, its ranks: how they meet, wait for the first of them, and agree.

A launcher (torchrun, or `cardiocaps.runtime.launch`) tells each process its rank by environment variables. Rank 0 alone
writes, prints and evaluates. What ranks tell each other before the training goes through the launcher's store, by
polling, so that a signal ends a wait; in the training they use collectives of `torch.distributed`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from cardiocaps.errors import CardioCapsError, ConfigError, ResourceError, printable

T = TypeVar("T")

_POLL_EVERY = 0.05  # seconds
_REPORT_WITHIN = 5.0  # seconds within which rank 0 reports an error that all ranks have
_STOPPED_WITHIN = 10.0  # seconds within which a launcher stops the ranks that have lost another one
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Reported(CardioCapsError):
    """Another process has reported this error: its message is empty, and only the exit status counts."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a training; by default it is the only one."""

    rank: int = 0
    world: int = 1  # number of processes
    local_rank: int = 0  # this process among those of its node
    local_world: int = 1  # number of processes of each node
    store: Any = None  # torch.distributed.Store that all ranks share; None for a single one

    @classmethod
    def from_environment(cls) -> Ranks:
        """What the launcher's variables say; a single rank without them.

        Raises:
            ConfigError: a variable is missing or not possible.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
            return cls()
        numbers = []
        for name in _VARIABLES:
            text = os.environ.get(name)
            if text is None or not text.isdecimal():
                raise ConfigError(f"the variable {name} is {text!r}; expected a number, as torchrun sets it")
            numbers.append(int(text))
        rank, world, local_rank, local_world = numbers
        if not (rank < world and local_rank < local_world and local_world and world % local_world == 0):
            shown = ", ".join(f"{name}={x}" for name, x in zip(_VARIABLES, numbers, strict=True))
            raise ConfigError(f"the launcher's variables are {shown}; expected as many processes on every node")
        return cls(rank, world, local_rank, local_world)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.world // self.local_world

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, by rank. Every rank must call it; the values travel as pickles between them."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def largest(self, number: int) -> int:
        """The largest number of all ranks. Every rank must call it."""
        if self.world == 1:
            return number
        import torch

        largest = torch.tensor(number)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """On rank 0, run the block and tell the others at its end; on the others, wait for rank 0, then run the block.

        An error in the block of rank 0 ends the others too.

        Raises:
            Reported: on the others, for an error of rank 0.
        """
        if self.world == 1:
            yield
        elif self.is_first:
            yield
            self.store.set("ahead", "0")
        else:
            while not self.store.check(["ahead"]):
                if self.store.check(["failed"]):
                    raise Reported(int(self.store.get("failed")))
                time.sleep(_POLL_EVERY)
            yield

    @contextmanager
    def one_report(self) -> Iterator[None]:
        """Report an error of the block once: that of rank 0, or of another rank with the number of that rank.

        Raises:
            Reported: rank 0 has the error too.
        """
        try:
            yield
        except Reported:
            raise
        except CardioCapsError as error:
            if self.store is not None and self.is_first:
                self.store.set("failed", str(error.exit_code))
            elif self.store is not None:
                self._leave_to_the_first()
                error.args = (f"rank {self.rank}: {error}",)
            raise

    def _leave_to_the_first(self) -> None:
        """Raise Reported if rank 0 has an error too."""
        until = time.monotonic() + _REPORT_WITHIN
        while time.monotonic() < until:
            try:
                if self.store.check(["failed"]):
                    raise Reported(int(self.store.get("failed")))
            except RuntimeError:  # rank 0 has ended, and the store with it
                raise Reported(1) from None
            time.sleep(_POLL_EVERY)

    @contextmanager
    def losses_reported(self, stopped: Callable[[], bool], advice: str) -> Iterator[None]:
        """Turn the error of torch in the block that another rank does not answer into one of a line.

        Args:
            stopped: whether a signal has arrived.
            advice: what to do; the message ends with it.

        Raises:
            ResourceError: another rank has ended, or its connection.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _is_lost_connection(error):
                raise
            # The launcher, which knows who has ended, stops this process; it would take its end for another failure.
            until = time.monotonic() + _STOPPED_WITHIN
            while time.monotonic() < until and not stopped():
                time.sleep(_POLL_EVERY)
            raise ResourceError(f"another rank of the training has ended, or cannot be reached; {advice}") from error


ONE = Ranks()
"""A training in one process."""


def _is_lost_connection(error: RuntimeError) -> bool:
    from torch import distributed

    signs = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "Timed out")
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)


@contextmanager
def connected(ranks: Ranks, device: str, same: Mapping[str, str], seconds: float) -> Iterator[Ranks]:
    """The ranks with the connections between them, which end with the block.

    Args:
        device: "cpu" or "cuda", on which the training computes.
        same: what must be the same on all ranks, versions for example: name -> value.
        seconds: within which all ranks must answer.

    Raises:
        ResourceError: an address or a rank does not answer.
        ConfigError: a rank has another value in `same`.
    """
    if ranks.world == 1:
        yield ranks
        return
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=seconds)
    address = printable(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    try:
        store, *_ = _stoppable(lambda: next(iter(rendezvous("env://", ranks.rank, ranks.world, timeout=limit))))
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"rank {ranks.rank} cannot meet the others at {address} (MASTER_ADDR:MASTER_PORT) within {seconds:g} s"
        ) from error
    ranks = Ranks(ranks.rank, ranks.world, ranks.local_rank, ranks.local_world, PrefixStore("ranks", store))
    with ranks.one_report():
        try:
            _compare(ranks, {**same, "LOCAL_WORLD_SIZE": str(ranks.local_world)}, seconds)
            # Two backends, because what ranks tell each other is on the CPU.
            backend, own = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", PrefixStore("collectives", store)
            _stoppable(
                lambda: distributed.init_process_group(backend, store=own, rank=ranks.rank, world_size=ranks.world)
            )
        except RuntimeError as error:
            raise ResourceError(
                f"rank {ranks.rank} cannot connect with the others; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose "
                f"the network ({_first_line(error)})"
            ) from error
        yield ranks
    # Not after an error: it would wait for ranks that have ended.
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _stoppable(wait: Callable[[], T]) -> T:
    """Run what waits for other ranks in C++, which no signal ends, beside the main thread, which a signal ends."""
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(wait())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result.result()


def _compare(ranks: Ranks, same: Mapping[str, str], seconds: float) -> None:
    """Exchange what must be the same on all ranks. Raises ConfigError or ResourceError, on all ranks."""
    ranks.store.set(f"same/{ranks.rank}", json.dumps(dict(same)))
    until = time.monotonic() + seconds
    of_rank: list[dict[str, str]] = []
    for rank in range(ranks.world):
        while not ranks.store.check([f"same/{rank}"]):
            if time.monotonic() > until:
                raise ResourceError(f"rank {rank} did not answer within {seconds:g} s")
            time.sleep(_POLL_EVERY)
        of_rank.append(json.loads(ranks.store.get(f"same/{rank}")))
    for rank, other in enumerate(of_rank):
        for name, expected in of_rank[0].items():
            if other.get(name) != expected:
                raise ConfigError(f"{name} is {other.get(name)} on rank {rank}; expected {expected}, as on rank 0")


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0][:200])
