"""Host arrays in pages of their own, which go back to the system the moment they are freed.

From the heap, tens of megabytes would stay behind: the C library keeps freed blocks of less than
32 MiB, and the device arrays made between two of them stop it from joining the holes.
"""

import mmap
from collections.abc import Iterable
from math import prod
from typing import Any

import jax
import numpy as np

# Below this, whole pages cost more than holes in the heap.
_MIN_BYTES = 1 << 18


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-ordered array, page-aligned if it is large."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < _MIN_BYTES:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype).reshape(shape)


# XLA's CPU client takes a buffer without a copy only where it is aligned to this many bytes.
_ALIGNMENT = 64


class Arena:
    """One block for all weights of a model, in pages as large as the system gives (2 MiB).

    Decoding reads every weight once a token; from pages of 4 KiB that is up to a third slower, and
    arrays must lie side by side for large pages to hold them. The block is freed with the last of
    its arrays.
    """

    def __init__(self, arrays: Iterable[Any]) -> None:
        """Room for arrays (anything with shape and dtype) of these sizes, in any order."""
        size = sum(_padded(prod(array.shape) * array.dtype.itemsize) for array in arrays)
        block = _private(max(size, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        self._bytes, self._used = np.frombuffer(block, np.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next array, uninitialised and C-ordered."""
        num_bytes = prod(shape) * dtype.itemsize
        start, self._used = self._used, self._used + _padded(num_bytes)
        assert self._used <= self._bytes.size, "an array that the arena was not made for"
        return self._bytes[start : start + num_bytes].view(dtype).reshape(shape)


def settle(arrays: list[Any]) -> None:
    """Replace each array of one CPU device in the list by its copy in an `Arena`, one at a time."""
    arena = Arena(arrays)
    for i, array in enumerate(arrays):
        copy = arena.empty(array.shape, array.dtype)
        np.copyto(copy, np.asarray(array))
        arrays[i] = jax.device_put(copy)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _private(num_bytes: int) -> mmap.mmap:
    # Python's default, shared memory, never gets large pages on common settings.
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
