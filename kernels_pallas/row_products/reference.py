"""The mathematics of products with chosen rows of a matrix w [F, D], in plain jnp.

    expand:   h[..., i] = x[...] . w[rows[..., i]]
    contract: y[...]    = sum over i of h[..., i] w[rows[..., i]]

`counts` says how many entries of each list are valid; the others give zero and count for nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expand_rows(
    x: jax.Array, w: jax.Array, rows: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """h [N, capacity] of x [N, D], w [F, D] and lists of rows [1 or N, capacity]."""
    h = jnp.einsum("ND,NCD->NC", x, w[jnp.broadcast_to(rows, (x.shape[0], rows.shape[1]))])
    return jnp.where(valid(rows, counts), h, 0)


def contract_rows(
    h: jax.Array, w: jax.Array, rows: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """y [N, D] of h [N, capacity], w [F, D] and lists of rows [1 or N, capacity]."""
    taken = w[jnp.broadcast_to(rows, h.shape)]
    return jnp.einsum("NC,NCD->ND", jnp.where(valid(rows, counts), h, 0), taken)


def valid(rows: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Which entries [1 or N, capacity] of the lists count."""
    if counts is None:
        return jnp.ones(rows.shape, bool)
    return jnp.arange(rows.shape[1])[None, :] < counts.reshape(-1)[:, None]
