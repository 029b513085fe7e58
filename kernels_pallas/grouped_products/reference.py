"""The mathematics of grouped products in plain jnp: every vector with every group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expand(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """h [M, F] of x [M, D] and w [E, F, D]."""
    return _own(jnp.einsum("MD,EFD->MEF", x, w), sizes)


def contract(h: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """y [M, D] of h [M, F] and w [E, F, D]."""
    return _own(jnp.einsum("MF,EFD->MED", h, w), sizes)


def groups_of(sizes: jax.Array, count: int) -> jax.Array:
    """The group [M] of each of `count` vectors; E beyond the last group."""
    ends = jnp.cumsum(sizes)
    return jnp.searchsorted(ends, jnp.arange(count, dtype=ends.dtype), side="right")


def _own(each: jax.Array, sizes: jax.Array) -> jax.Array:
    """Of [M, E, n] the entries of each vector's own group; zeros beyond."""
    groups = groups_of(sizes, each.shape[0])
    own = jnp.take_along_axis(each, jnp.minimum(groups, each.shape[1] - 1)[:, None, None], axis=1)
    beyond = (groups == each.shape[1])[:, None]
    return jnp.where(beyond, jnp.zeros((), each.dtype), own[:, 0])
