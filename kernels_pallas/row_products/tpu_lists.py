"""Products of vectors with chosen rows of their own, on a TPU: vector after vector.

    expand: h[n, i] = x[n] . w[rows[n, i]] where on[n, i]        contract: y[n] = sum of those rows

The kernels of `tpu` take one list for all vectors, of which the first so many count; here every
vector has one, with holes. w is [F, D/128, 128]. Leaves out several vectors that share rows: they
are read again for each, so whole matrices are cheaper from some number of vectors on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.row_products import tpu


def expand(
    x: jax.Array,
    weights: Sequence[jax.Array],
    rows: jax.Array,
    on: jax.Array,
    *,
    interpret: Any = False,
) -> list[jax.Array]:
    """h [N, capacity] in x's dtype of x [N, D] for each matrix; zeros where `on` [N, capacity] is
    not, whose rows are not read.
    """

    def one(given: tuple[jax.Array, ...]) -> list[jax.Array]:
        x, rows, on = given
        listed, count, order = _first(rows, on)
        hs = tpu.expand(x[None, :], weights, listed, count, size=1, interpret=interpret)
        back = jnp.argsort(order)
        return [h[0, back].astype(x.dtype) for h in hs]

    return jax.lax.map(one, (x, rows, on))


def contract(
    h: jax.Array, w: jax.Array, rows: jax.Array, on: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """y [N, D] float32 of h [N, capacity], of the rows that are on."""

    def one(given: tuple[jax.Array, ...]) -> jax.Array:
        h, rows, on = given
        listed, count, order = _first(rows, on)
        return tpu.contract(h[None, order], w, listed, count, size=1, interpret=interpret)[0]

    return jax.lax.map(one, (h, rows, on))


def _first(rows: jax.Array, on: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows that are on before the others, how many [1], and the places that they had."""
    order = jnp.argsort(~on, stable=True)
    return rows[order].astype(jnp.int32), jnp.sum(on, dtype=jnp.int32)[None], order
