"""The products on the CPU kernels: rows in float32, bfloat16, 8, 6 or 4 bits, sums in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.native import call
from kernels_pallas.row_products.quantized import Rows, stored


def expand(
    x: jax.Array,
    w: Rows,
    rows: jax.Array | None = None,
    counts: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """h [..., F] = x [..., D] w^T, or of chosen rows [..., capacity]; `dtype` defaults to x's."""
    flat = _flat(x)
    lists = _lists(rows, counts)
    size = w.shape[0] if rows is None else lists[0].shape[1]
    result = jax.ShapeDtypeStruct((flat.shape[0], size), dtype or x.dtype)
    (y,) = call("popjax_expand", [result], flat, *stored(w), *lists)
    return y.reshape(*x.shape[:-1], size)


def contract(
    h: jax.Array, w: Rows, rows: jax.Array | None = None, counts: jax.Array | None = None
) -> jax.Array:
    """y [..., D] = h [..., F] w, or the sum over chosen rows for h [..., capacity]."""
    flat = _flat(h)
    result = jax.ShapeDtypeStruct((flat.shape[0], w.shape[1]), h.dtype)
    (y,) = call("popjax_contract", [result], flat, *stored(w), *_lists(rows, counts))
    return y.reshape(*h.shape[:-1], w.shape[1])


def expand_many(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    """`expand` with several matrices [F_i, D] in one call: [..., F_i] each."""
    flat = _flat(x)
    results = [jax.ShapeDtypeStruct((flat.shape[0], w.shape[0]), x.dtype) for w in weights]
    ys = call("popjax_expand_many", results, flat, *weights)
    return [y.reshape(*x.shape[:-1], y.shape[1]) for y in ys]


def _flat(x: jax.Array) -> jax.Array:
    # Counted out, since reshape cannot infer the rows of an array of no columns.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _lists(rows: jax.Array | None, counts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if rows is None:
        return jnp.zeros((0, 0), jnp.int32), jnp.zeros((0,), jnp.int32)
    rows = _flat(rows.astype(jnp.int32))
    if counts is None:
        return rows, jnp.full(rows.shape[:1], rows.shape[1], jnp.int32)
    counts = counts.astype(jnp.int32).reshape(-1)
    # One list may go with a count a vector, and one count with a list a vector.
    lists = max(rows.shape[0], counts.shape[0])
    rows = jnp.broadcast_to(rows, (lists, rows.shape[1]))
    return rows, jnp.broadcast_to(counts, (lists,))
