"""Host arrays in pages of their own, which go back to the system the moment they are freed.

From the heap, tens of megabytes would stay behind: the C library keeps freed blocks of less than
32 MiB, and the device arrays made between two of them stop it from joining the holes.
"""

import mmap
from math import prod

import numpy as np

# Below this, whole pages cost more than holes in the heap.
_MIN_BYTES = 1 << 18


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-ordered array, page-aligned if it is large."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < _MIN_BYTES:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype).reshape(shape)
