"""Host memory for packed rows, kept from one prompt to the next.

Touching fresh pages costs more than copying rows into them (0.6 s a GB on a virtual machine,
against 0.1), so the memory of rows that nobody uses any more serves the next prompt. All matrices
of a prompt lie in one block. At most one block is idle: a request it does not fit frees it,
`release` does it now.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np

# Reentrant: the collector may give a block back while this thread is in here.
_LOCK = threading.RLock()
_IDLE: list[mmap.mmap] = []
# Less than this in all comes from the heap, where fresh pages cost little.
SMALL_BYTES = 2**23
# XLA's CPU client shares a buffer without a copy only when it is aligned to this many bytes.
_ALIGNMENT = 64
# A block this much larger than what is asked for still serves: prompts and methods differ a little.
_SLACK = 1.25


def empty(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Uninitialised aligned arrays in one block, whose memory comes back when all are collected."""
    sizes = [math.prod(shape) * d.itemsize for shape, d in zip(shapes, dtypes, strict=True)]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
    root = _block(starts[-1])
    return [
        root[start : start + size].view(dtype).reshape(shape)
        for start, size, shape, dtype in zip(starts, sizes, shapes, dtypes, strict=False)
    ]


def _block(nbytes: int) -> np.ndarray:
    if nbytes < max(SMALL_BYTES, 1):
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        return raw[-raw.ctypes.data % _ALIGNMENT :]
    block = _taken(nbytes)
    # Every view of this array keeps it alive, since numpy's views refer to the first array over
    # foreign memory. So when it goes, nobody reads the block: not even the device it was lent to.
    root = np.frombuffer(block, np.uint8)
    weakref.finalize(root, _give_back, block).atexit = False
    return root


def idle_bytes() -> int:
    """Bytes held for the next prompt and used by nobody."""
    with _LOCK:
        return sum(map(len, _IDLE))


def release() -> None:
    """Give idle memory back to the system."""
    with _LOCK:
        _IDLE.clear()


def _taken(nbytes: int) -> mmap.mmap:
    with _LOCK:
        block = _IDLE.pop() if _IDLE else None
    if block is not None and nbytes <= len(block) <= nbytes * _SLACK:
        return block
    del block  # before the new one is made beside it
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    with _LOCK:
        _IDLE[:] = [block]
