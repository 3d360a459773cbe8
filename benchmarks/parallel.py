"""A step of one capsule layer in several processes: a copy of W in each (DistributedDataParallel), or W split over all.

    python -m benchmarks.parallel                     two processes, the paper's shape, attention routing
    python -m benchmarks.parallel --ranks 3 --capsules 28800 --routing dynamic

A step is the forward and the backward pass of the layer for the same global batch, without an optimiser. Printed are
its median time, and the bytes that a rank gives to collective operations in a step, which they have to send. Processes
talk over gloo and share the threads of this machine, so the times compare the exchange alone:

    DDP              each rank has its items of the batch and the whole W; the gradient of W is averaged
    split            each rank has all items and its capsules, with their W (`CapsuleLayer(process_group=)`)
    split behind DDP each rank has its items, `capsules_of_rank` and `items_of_rank` pass to the split and back
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WAYS = ("DDP", "split", "split behind DDP")


@contextmanager
def _counted(sent: list[int]) -> Iterator[None]:
    """Add the bytes that this rank gives to collective operations of torch.distributed to sent[0]."""
    import torch.distributed as dist

    def counts(name: str, operand: int) -> Callable[..., Any]:
        original = getattr(dist, name)

        def collective(*args: Any, **options: Any) -> Any:
            sent[0] += args[operand].nbytes
            return original(*args, **options)

        return collective

    originals = {name: getattr(dist, name) for name in ("all_gather", "all_to_all_single")}
    for name in originals:
        setattr(dist, name, counts(name, 1))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _rank(
    rank: int, ranks: int, store: str, threads: int, sizes: list[int], routing: str, steps: int, out: Any
) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from capsops import parallel
    from capsops.nn import CapsuleLayer

    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    B, N, K, J, D = sizes
    sent = [0]

    def counting_hook(group: Any, bucket: Any) -> Any:
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    counting_hook.__annotations__ = allreduce_hook.__annotations__  # DistributedDataParallel insists on its types

    own_items = B // ranks
    for way in WAYS:
        split = way != "DDP"
        layer = CapsuleLayer(N, K, J, D, routing, process_group=dist.group.WORLD if split else None)
        route: Any = layer
        if not split:
            route = DistributedDataParallel(layer)
            route.register_comm_hook(None, counting_hook)
        part = parallel.part_of_rank(N) if way == "split" else slice(None)
        items = B if way == "split" else own_items
        u = torch.randn(items, part.stop - part.start if way == "split" else N, K).mul_(K**-0.5).requires_grad_()
        times = []
        for step in range(steps + 1):
            dist.barrier()
            sent[0] = 0
            start = time.perf_counter()
            with _counted(sent):
                if way == "split behind DDP":
                    v = parallel.items_of_rank(route(parallel.capsules_of_rank(u)), own_items)
                else:
                    v = route(u)
                v.square().sum().backward()
            dist.barrier()
            if step:
                times.append(time.perf_counter() - start)
            u.grad = None
            layer.zero_grad()
        if rank == 0:
            out.put((way, statistics.median(times), sent[0]))
        del layer, route, u, v
    dist.destroy_process_group()


def measure(ranks: int, sizes: list[int], routing: str, steps: int) -> Iterator[tuple[str, float, int]]:
    """For each way: its name, the median seconds of a step, and the bytes that a rank sends in one."""
    import torch
    from torch import multiprocessing

    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    threads = max(1, torch.get_num_threads() // ranks)
    with tempfile.TemporaryDirectory() as folder:
        job = multiprocessing.spawn(
            _rank, (ranks, f"{folder}/store", threads, sizes, routing, steps, out), nprocs=ranks, join=False
        )
        for _ in WAYS:
            while out.empty():
                if job.join(timeout=0.1) and out.empty():
                    raise RuntimeError("a process ended without a result")
            yield out.get()
        while not job.join():
            pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--routing", choices=("attention", "dynamic", "uniform", "self-attention"), default="attention")
    parser.add_argument("--batch", type=int, default=8, help="items of all ranks; a multiple of the ranks")
    parser.add_argument("--capsules", type=int, default=460800, help="N; K, J and D are the paper's 8, 2 and 16")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one more for warming up")
    a = parser.parse_args()
    if a.ranks < 1 or a.batch < a.ranks or a.batch % a.ranks or a.capsules < 1 or a.steps < 1:
        parser.error(f"--batch is {a.batch}; expected a multiple of --ranks {a.ranks}, and all numbers at least 1")
    print(f"B={a.batch}, N={a.capsules:,}, K=8, J=2, D=16, {a.routing}; {a.ranks} ranks", flush=True)
    for way, seconds, sent in measure(a.ranks, [a.batch, a.capsules, 8, 2, 16], a.routing, a.steps):
        print(f"{way:<17} {1e3 * seconds:9.1f} ms a step {sent:>13,} bytes from a rank", flush=True)


if __name__ == "__main__":
    main()
