"""Copy of chosen rows of a matrix, which packs a partition once per prompt.

Implementations: `xla` (jnp.take, any device, inside or outside jit), `host` (memory copies by
NumPy; concrete arrays on one CPU device), `pallas_tpu` (copies within a TPU's memory, of rows kept
as whole tiles [F, D/128, 128]) and `pallas_interpret` (the same, interpreted). XLA's CPU backend
copies rows element by element at about 2.5 GB/s; NumPy's copies run at memory speed, so `host` is
chosen where it can be. On a TPU XLA holds the result twice, the kernel once.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kernels_pallas.gather_rows import memory, tpu
from kernels_pallas.row_products.tpu import LANES, tile_rows

IMPLEMENTATIONS = ("xla", "host", "pallas_tpu", "pallas_interpret")
# Copies smaller than this are over before a second thread has begun.
_SPLIT_BYTES = 2**23
_WORKERS = os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="gather_rows")


def gather_rows(w: jax.Array, rows: jax.Array, implementation: str | None = None) -> jax.Array:
    """Rows [R, D] of w [F, D] at indices rows [R], in their order.

    An index outside 0..F-1 is taken for the nearest one inside. Raises ValueError for rows that
    are no list of integers, an unknown implementation, or `host` where arrays are not on one CPU.
    """
    return gather_all([w], [rows], implementation)[0]


def gather_all(
    weights: Sequence[jax.Array], rows: Sequence[jax.Array], implementation: str | None = None
) -> list[jax.Array]:
    """`gather_rows` of many matrices, each [F, D] with its own rows [R], side by side on a CPU.

    Raises as `gather_rows` does.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"gather_rows implementation {implementation!r} is unknown: "
            f"use one of {IMPLEMENTATIONS}"
        )
    for r in rows:
        if r.ndim != 1 or not jnp.issubdtype(r.dtype, jnp.integer):
            raise ValueError(f"gather_rows needs rows [R] of integers, got {r.dtype} {r.shape}")
    on_host = all(map(_on_one_cpu, weights))
    if implementation == "host" and not on_host:
        raise ValueError("gather_rows 'host' needs a concrete array on one CPU device: use 'xla'")
    pairs = list(zip(weights, rows, strict=True))
    if implementation is None and all(map(_tiles_on_a_tpu, weights)):
        implementation = "pallas_tpu"
    if implementation in ("pallas_tpu", "pallas_interpret"):
        return [_copied(w, r, implementation == "pallas_interpret") for w, r in pairs]
    if implementation == "xla" or not on_host:
        return [jnp.take(w, r, axis=0, mode="clip") for w, r in pairs]
    packed = _host_gather([(np.asarray(w), np.asarray(r)) for w, r in pairs])
    # device_put takes the buffer as it is; jnp.asarray would copy it once more.
    return jax.device_put(packed, [w.sharding for w in weights])


@functools.partial(jax.jit, static_argnums=2)
def _copied(w: jax.Array, rows: jax.Array, interpret: bool) -> jax.Array:
    if w.ndim != 3 or w.shape[-1] != LANES or w.shape[1] % tile_rows(w.dtype):
        raise ValueError(
            f"gather_rows 'pallas_tpu' copies rows kept as whole tiles [F,D/128,128], got "
            f"{w.shape} in {w.dtype}: use 'xla'"
        )
    # The kernel copies whatever lies at an index.
    inside = jnp.clip(rows.astype(jnp.int32), 0, w.shape[0] - 1)
    return tpu.gather(w, inside, interpret)


def _tiles_on_a_tpu(w: jax.Array) -> bool:
    return w.ndim == 3 and _on_one(w, "tpu")


def _on_one_cpu(w: jax.Array) -> bool:
    return _on_one(w, "cpu")


def _on_one(w: jax.Array, platform: str) -> bool:
    if isinstance(w, Tracer):
        return False
    devices = w.devices()
    return len(devices) == 1 and next(iter(devices)).platform == platform


def _host_gather(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    shapes = [(rows.size, *w.shape[1:]) for w, rows in pairs]
    packed = memory.empty(shapes, [w.dtype for w, _ in pairs])

    def copy(which: int, start: int, stop: int) -> None:
        (w, rows), out = pairs[which], packed[which]
        np.take(w, rows[start:stop], axis=0, out=out[start:stop], mode="clip")

    copies = []
    for i, out in enumerate(packed):
        # Most of the time goes into the first touch of fresh pages, which threads share.
        parts = _WORKERS if out.nbytes >= _SPLIT_BYTES else 1
        bounds = np.linspace(0, len(out), parts + 1).astype(int).tolist()
        copies += [_pool().submit(copy, i, *span) for span in itertools.pairwise(bounds)]
    for done in copies:
        done.result()
    return packed
