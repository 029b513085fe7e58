"""Host memory for packed rows, kept from one prompt to the next.

Touching fresh pages costs more than copying rows into them (0.6 s a GB on a virtual machine,
against 0.1), so the memory of rows that nobody uses any more serves the next prompt. At most one
prompt's worth lies idle: a request that no idle block fits frees them all, `release` does it now.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref

import numpy as np

# Reentrant: the collector may give a block back while this thread is in here.
_LOCK = threading.RLock()
_IDLE: dict[int, list[mmap.mmap]] = {}
# Smaller arrays come from the heap, which keeps and reuses their pages by itself.
SMALL_BYTES = 2**23
# XLA's CPU client shares a buffer without a copy only when it is aligned to this many bytes.
_ALIGNMENT = 64


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised aligned array; the memory of a large one comes back when it is collected."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0 or nbytes < SMALL_BYTES:
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + nbytes].view(dtype).reshape(shape)
    block = _taken(nbytes)
    # Every view of this array keeps it alive, since numpy's views refer to the first array over
    # foreign memory. So when it goes, nobody reads the block: not even the device it was lent to.
    root = np.frombuffer(block, np.uint8)
    weakref.finalize(root, _give_back, nbytes, block).atexit = False
    return root.view(dtype).reshape(shape)


def idle_bytes() -> int:
    """Bytes held for the next prompt and used by nobody."""
    with _LOCK:
        return sum(nbytes * len(blocks) for nbytes, blocks in list(_IDLE.items()))


def release() -> None:
    """Give idle memory back to the system."""
    with _LOCK:
        _IDLE.clear()


def _taken(nbytes: int) -> mmap.mmap:
    with _LOCK:
        if _IDLE.get(nbytes):
            return _IDLE[nbytes].pop()
        _IDLE.clear()
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(nbytes: int, block: mmap.mmap) -> None:
    with _LOCK:
        _IDLE.setdefault(nbytes, []).append(block)
