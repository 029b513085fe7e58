"""Measure this machine: bandwidth of plain reading, and the costs that forms are chosen by.

Interleaved and taken as medians, since machines are shared. Weights exceed the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import native
from kernels_pallas.gather_rows import memory
from kernels_pallas.native.cost import DTYPES, FEW, FORMS, MANY, OPERATIONS, Costs, Line
from kernels_pallas.row_products import contract, contract_rows, expand, expand_rows

# Eight matrices of 32 MB in float32: more than most last-level caches, done in a few milliseconds.
_MATRICES, _ROWS, _WIDTH = 8, 4096, 2048
_READ = 2**26  # floats of the plain read
_ROUNDS = 5
# As of CHESS and RescoreAll: rows scattered over the matrix.
SCATTERED = 0.4


def seconds(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median seconds of each call, taken in turns after one warm-up."""
    for call in calls.values():
        jax.block_until_ready(call())
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            taken[key].append(time.perf_counter() - started)
    return {key: statistics.median(times) for key, times in taken.items()}


def read_bandwidth(rounds: int = 9, width: int = _WIDTH, share: float = 1.0) -> float:
    """Bytes a second at which all threads read one large array and do no more, best of `rounds`.

    Below 1, only that `share` of its rows of `width` floats is read, by index: what the memory
    allows a kernel that reads scattered rows.
    """
    (data,) = _filled([(_READ // width, width)], "float32")
    chosen = _scattered(data.shape[0], share) if share < 1 else np.zeros(0, np.int32)
    rows, result = jnp.asarray(chosen), jax.ShapeDtypeStruct((1,), jnp.float32)
    best = float("inf")
    for _ in range(rounds + 1):  # the first one warms up
        started = time.perf_counter()
        jax.block_until_ready(native.call("popjax_read", [result], data, rows))
        best = min(best, time.perf_counter() - started)
    return (rows.size or data.shape[0]) * width * data.dtype.itemsize / best


def _scattered(rows: int, share: float) -> np.ndarray:
    order = np.random.default_rng(0).permutation(rows)
    return np.sort(order[: int(share * rows)]).astype(np.int32)


def measured_costs(rounds: int = _ROUNDS) -> Costs:
    """Seconds a weight of every operation, form and dtype, as `cost.prefers_native` weighs them."""
    found: dict[tuple[str, str, str], Line] = {}
    weights = _MATRICES * _ROWS * _WIDTH
    for dtype in DTYPES:
        calls = {}
        matrices = _matrices(dtype)
        for operation in OPERATIONS:
            for form in FORMS:
                for vectors in (1, FEW, MANY):
                    call = _product(operation, form, vectors, dtype, matrices)
                    calls[operation, form, vectors] = call
        taken = seconds(calls, rounds)
        for operation in OPERATIONS:
            for form in FORMS:
                times = (taken[operation, form, n] / weights for n in (1, FEW, MANY))
                found[operation, form, dtype] = Line(*times)
    return found


def scattered_bandwidth(rounds: int = _ROUNDS) -> dict[str, float]:
    """Bytes a second with the share SCATTERED of the rows by index: an operation each, and "read",
    which is reading them alone."""
    matrices = _matrices("float32")
    count = int(SCATTERED * _ROWS)
    rows = [jnp.asarray(_scattered(_ROWS, SCATTERED)[None]) for _ in matrices]
    x, h = jnp.ones((1, _WIDTH)), jnp.ones((1, count))
    up = jax.jit(
        lambda x, ws, rs: [
            expand_rows(x, w, r, implementation="native") for w, r in zip(ws, rs, strict=True)
        ]
    )
    down = jax.jit(
        lambda h, ws, rs: [
            contract_rows(h, w, r, implementation="native") for w, r in zip(ws, rs, strict=True)
        ]
    )
    calls = {"expand": lambda: up(x, matrices, rows), "contract": lambda: down(h, matrices, rows)}
    read = len(matrices) * count * _WIDTH * 4
    found = {str(name): read / took for name, took in seconds(calls, rounds).items()}
    return {**found, "read": read_bandwidth(rounds, share=SCATTERED)}


def _matrices(dtype: str) -> list[jax.Array]:
    return _filled([(_ROWS, _WIDTH)] * _MATRICES, dtype)


def _filled(shapes: list[tuple[int, ...]], dtype: str) -> list[jax.Array]:
    """Arrays in pages as large as those of weights."""
    arrays = memory.empty(shapes, [np.dtype(jnp.dtype(dtype))] * len(shapes))
    for array in arrays:
        array[...] = 0.01
    return jax.device_put(arrays)


def _product(
    operation: str, form: str, vectors: int, dtype: str, matrices: list[jax.Array]
) -> Callable[[], object]:
    product = {"expand": expand, "contract": contract}[operation]
    size = _WIDTH if operation == "expand" else _ROWS
    x = jnp.ones((vectors, size), jnp.dtype(dtype))
    call = jax.jit(lambda x, ws: [product(x, w, form) for w in ws])
    return lambda: call(x, matrices)
