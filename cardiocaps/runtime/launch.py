"""Starts the processes of a training on this machine, with torch's own launcher, the one of `torchrun`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from math import ceil

from cardiocaps.errors import ConfigError, ResourceError, printable
from cardiocaps.runtime.processes import cores, killed_by
from cardiocaps.runtime.program import print_line
from cardiocaps.runtime.ranks import Reported


def launch(
    module: str, arguments: Sequence[str], devices: int, nodes: int, rendezvous: str | None, seconds: float
) -> None:
    """Run `python -m module arguments` in `devices` processes on this node, and wait for them.

    If one of them fails, the others are stopped. A signal to this process is passed on to them.

    Args:
        nodes: on each of which this function is called.
        rendezvous: HOST:PORT of one of the nodes, where several of them meet.
        seconds: within which all nodes must call it.

    Raises:
        ConfigError: several nodes have no place to meet.
        ResourceError: the nodes do not meet; or a process ended in a way that it could not report itself.
        Reported: a process has failed, and has reported why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, _, port = (rendezvous or "").rpartition(":")
    if (nodes > 1 or rendezvous) and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f"rendezvous is {'null' if rendezvous is None else printable(rendezvous)}; expected HOST:PORT of one of "
            f"the {nodes} nodes"
        )
    # Each process would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // devices)))
    # Otherwise torch prints the stack of each connection that a process finds closed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id="cardiocaps",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        rdzv_configs={"join_timeout": ceil(seconds), "read_timeout": ceil(seconds)},
        # A machine may not know the address of its own name.
        local_addr="localhost" if nodes == 1 else None,
        max_restarts=0,
    )
    logging.disable()  # what it logs is said below, in a line
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as error:
        raise Reported(128 + error.sigval) from error
    except RendezvousError as error:
        raise ResourceError(
            f"the {nodes} nodes did not meet at {printable(rendezvous)} (--rendezvous) within {seconds:g} s"
        ) from error
    except ChildFailedError as error:
        # A killed process is the cause, whatever became of the others.
        rank, first = min(error.failures.items(), key=lambda one: (one[1].exitcode > 0, one[1].timestamp, one[0]))
        if first.exitcode < 0:
            raise ResourceError(
                f"rank {rank} was killed by {killed_by(-first.exitcode)}, and the other ranks were stopped; --resume "
                "goes on from the last checkpoint"
            ) from error
        if rank:
            print_line(f"rank {rank} ended with status {first.exitcode}", sys.stderr)
        raise Reported(first.exitcode) from error
    finally:
        logging.disable(logging.NOTSET)
