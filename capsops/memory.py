"""Memory of large gradients, kept from one training step to the next.

The gradient of the transformation matrices is as large as they are, and a training loop frees it and asks for it anew
in every step. The system hands out such memory zeroed, page by page, which takes about as long as to compute the
gradient. So a block that is no longer in use is kept for the next gradient of the same size.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

# From this size on; the allocator of the system keeps smaller ones itself.
LEAST_BYTES = 1 << 25
# A block that so many gradients were not of the size of is given back.
MOST_PASSED_OVER = 64

_idle: deque[tuple[int, mmap.mmap]] = deque()  # when each was put there, counted in requests
_requests = 0
_idle_bytes = _used_bytes = _most_used_bytes = 0
# A tensor may end while the lock is held, in the same thread.
_lock = threading.RLock()


def release_memory() -> None:
    """Give the memory that is kept for coming gradients back to the system.

    Only what no tensor uses. Never is more held, in use and kept together, than was in use at one time.
    """
    global _idle_bytes
    with _lock:
        _idle.clear()
        _idle_bytes = 0


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor of the shape, dtype and device of x."""
    # Not for the tensors without memory that torch.compile traces with: their type is looked at first.
    plain = type(x) in (Tensor, torch.nn.Parameter)
    if not plain or x.nbytes < LEAST_BYTES or x.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return x.new_empty(x.shape)
    size = x.nbytes
    block = _take(size)
    view = memoryview(block)
    # The tensor holds the view, and nothing else does.
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
        while _idle and _used_bytes + _idle_bytes > _most_used_bytes:  # the oldest first
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
