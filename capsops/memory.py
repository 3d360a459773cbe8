"""A cache for the memory of large gradients, which a training loop frees and allocates again in every step.

The gradient of the transformation matrices is as large as they are. The system zeroes fresh memory of this size page by
page, which takes about as long as computing the gradient. So a block that is no longer in use is kept for the next
gradient of the same size.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

# The smallest block that is cached; the system's allocator caches smaller ones itself.
LEAST_BYTES = 1 << 25
# Free an idle block after this many requests for other sizes.
MOST_PASSED_OVER = 64

_idle: deque[tuple[int, mmap.mmap]] = deque()  # each with the number of requests before it became idle
_requests = 0
_idle_bytes = _used_bytes = _most_used_bytes = 0
# Reentrant, because the garbage collector may free a tensor, which takes the lock, while this thread holds it.
_lock = threading.RLock()


def release_memory() -> None:
    """Return the memory that is kept for later gradients, and that no tensor uses, to the system.

    Memory in use plus memory kept never exceeds the largest amount that was in use at one time.
    """
    global _idle_bytes
    with _lock:
        _idle.clear()
        _idle_bytes = 0


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor of the shape, dtype and device of x."""
    return _empty_like(x) if _cached(x) else x.new_empty(x.shape)


def allocator(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What does the same as `empty_like`, in less time, for x and tensors of its shape, strides, dtype and device."""
    if _cached(x):
        return _empty_like
    # torch.empty_like keeps the strides. It takes half as long as new_empty.
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.is_contiguous()
    return torch.empty_like if plain else empty_like


def _cached(x: Tensor) -> bool:
    # The type is tested first: torch.compile traces with tensors of other types, which have no memory.
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return plain and x.nbytes >= LEAST_BYTES and x.device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE")


def _empty_like(x: Tensor) -> Tensor:
    size = x.nbytes
    block = _take(size)
    view = memoryview(block)
    # Only the tensor holds the view. When the view dies, the block becomes idle.
    weakref.finalize(view, _keep, block).atexit = False
    storage = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape)  # type: ignore[call-overload, no-any-return]


def _take(size: int) -> mmap.mmap:
    global _requests, _idle_bytes, _used_bytes, _most_used_bytes
    with _lock:
        _requests += 1
        _used_bytes += size
        _most_used_bytes = max(_most_used_bytes, _used_bytes)
        found = None
        for _ in range(len(_idle)):
            since, block = _idle.popleft()
            if found is None and len(block) == size:
                found = block
            elif _requests - since <= MOST_PASSED_OVER:
                _idle.append((since, block))
                continue
            _idle_bytes -= len(block)
        while _idle and _used_bytes + _idle_bytes > _most_used_bytes:  # free the oldest first
            _idle_bytes -= len(_idle.popleft()[1])
    try:
        return found or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        with _lock:
            _used_bytes -= size
        raise MemoryError(f"capsops: no memory for a gradient of {size} bytes") from error


def _keep(block: mmap.mmap) -> None:
    global _idle_bytes, _used_bytes
    with _lock:
        _idle.append((_requests, block))
        _idle_bytes += len(block)
        _used_bytes -= len(block)
