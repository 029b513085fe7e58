"""Products of vectors with all or chosen rows of a channel-major matrix w [F, D].

    expand: h = x w^T (rows as outputs)        contract: y = h w (rows summed)

Implementations: `xla` (any device), `native` (the CPU kernels), `auto` (whichever is expected to
be faster). A list of rows is read by index on
`native` and gathered on `xla`, which on a CPU costs more than reading everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.native.cost import prefers_native
from kernels_pallas.row_products import native, reference, xla
from kernels_pallas.row_products.quantized import (
    STORED_BITS,
    QuantizedRows,
    bits_of,
    dequantized,
    most_steps,
    quantized,
    quantized_rows,
    rounded,
)

IMPLEMENTATIONS = ("xla", "native", "auto")


def expand(
    x: jax.Array, w: jax.Array, implementation: str = "xla", dtype: jnp.dtype | None = None
) -> jax.Array:
    """h [..., F] = x w^T for x [..., D] and w [F, D], in `dtype` (that of x)."""
    if _native("expand", x, w, implementation):
        return native.expand(x, w, dtype=dtype)
    return xla.expand(x, w, dtype)


def contract(h: jax.Array, w: jax.Array, implementation: str = "xla") -> jax.Array:
    """y [..., D] = h w for h [..., F] and w [F, D]."""
    if _native("contract", h, w, implementation):
        return native.contract(h, w)
    return xla.contract(h, w)


def expand_many(
    x: jax.Array, weights: Sequence[jax.Array], implementation: str = "xla"
) -> list[jax.Array]:
    """`expand` of x [..., D] with each of several matrices [F_i, D]; one call on the kernels."""
    if all(_native("expand", x, w, implementation) for w in weights):
        return native.expand_many(x, weights)
    return [xla.expand(x, w) for w in weights]


def expand_rows(
    x: jax.Array,
    w: jax.Array | QuantizedRows,
    rows: jax.Array,
    counts: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """h [N, capacity] = x [N, D] times rows [1 or N, capacity] of w [F, D].

    counts [1 or N] says how many entries of a list are valid; the others give zero. `native` raises
    for a row outside 0..F-1 or named twice in a list.
    """
    if implementation == "xla":
        return reference.expand_rows(x, _dense(w), rows, counts)
    return native.expand(x, w, rows, counts)


def contract_rows(
    h: jax.Array,
    w: jax.Array | QuantizedRows,
    rows: jax.Array,
    counts: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """y [N, D] = sum of h [N, capacity] times rows [1 or N, capacity] of w [F, D].

    counts and errors are those of `expand_rows`.
    """
    if implementation == "xla":
        return reference.contract_rows(h, _dense(w), rows, counts)
    return native.contract(h, w, rows, counts)


def _native(operation: str, vector: jax.Array, w: jax.Array, implementation: str) -> bool:
    if implementation == "native":
        return True
    vectors = vector.size // max(vector.shape[-1], 1)
    return implementation == "auto" and prefers_native(operation, vectors, w.dtype)


def _dense(w: jax.Array | QuantizedRows) -> jax.Array:
    return dequantized(w) if isinstance(w, QuantizedRows) else w


__all__ = [
    "IMPLEMENTATIONS",
    "STORED_BITS",
    "QuantizedRows",
    "bits_of",
    "contract",
    "contract_rows",
    "dequantized",
    "expand",
    "expand_many",
    "expand_rows",
    "most_steps",
    "quantized",
    "quantized_rows",
    "rounded",
]
