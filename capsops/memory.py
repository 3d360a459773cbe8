"""Memory of large gradients, kept from one training step to the next.

The gradient of the transformation matrices is as large as they are, and a training loop frees it and asks for it anew
in every step. The system hands out such memory zeroed, page by page, which takes about as long as to compute the
gradient. So a block that is no longer in use is kept for the next gradient of the same size.
"""

from __future__ import annotations

import mmap
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


def release_memory() -> None:
    """Give the memory that is kept for coming gradients back to the system.

    Only what no tensor uses. At most as much is kept as the gradients of one step once took.
    """
    _idle.clear()


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor of the shape, dtype and device of x."""
    # Not for the tensors without memory that torch.compile traces with: their type is looked at first.
    plain = type(x) in (Tensor, torch.nn.Parameter)
    if not plain or x.nbytes < LEAST_BYTES or x.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return x.new_empty(x.shape)
    size = x.nbytes
    block = _kept(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(block)
    # The tensor holds the view, and nothing else does.
    weakref.finalize(view, _keep, block).atexit = False
    storage = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape)  # type: ignore[call-overload, no-any-return]


def _kept(size: int) -> mmap.mmap | None:
    global _requests
    _requests += 1
    found = None
    for _ in range(len(_idle)):
        try:
            since, block = _idle.popleft()
        except IndexError:  # another thread was faster
            break
        if found is None and len(block) == size:
            found = block
        elif _requests - since <= MOST_PASSED_OVER:
            _idle.append((since, block))
    return found


def _keep(block: mmap.mmap) -> None:
    _idle.append((_requests, block))
