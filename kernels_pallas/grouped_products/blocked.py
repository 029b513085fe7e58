"""Grouped products block by block: each block of vectors with the one matrix that it needs.

A loop whose length is data: groups without vectors cost nothing. Blocks are taken in order from the
sorted vectors; one that reaches into the next group writes there what that group's own blocks write
over. Leaves zeroing what lies beyond the groups to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Below, a product is bound by reading the matrix; above, by arithmetic, and more of it is wasted.
_LEAST, _MOST = 8, 128
_FORMS = {"expand": "MD,FD->MF", "contract": "MF,FD->MD"}


def block_size(vectors: int, groups: int) -> int:
    """Vectors of a block: about those of a group, if all have as many."""
    size = _LEAST
    while size < _MOST and size * groups < vectors:
        size *= 2
    return size


def products(
    operation: str, x: jax.Array, weights: Sequence[jax.Array], sizes: jax.Array
) -> list[jax.Array]:
    """The products [M, ...] of x [M, ...] with each of several w [E, F, D], of equal shapes."""
    M, E = x.shape[0], sizes.shape[0]
    step = block_size(M, E)
    counts = -(-sizes // step)
    blocks_end, ends = jnp.cumsum(counts), jnp.cumsum(sizes)
    padded = jnp.pad(x, ((0, step), (0, 0)))
    width = weights[0].shape[1 if operation == "expand" else 2]

    def one(state: tuple) -> tuple:
        block, outputs = state
        group = jnp.searchsorted(blocks_end, block, side="right").astype(jnp.int32)
        nth = block - (blocks_end[group] - counts[group])
        start = (ends[group] - sizes[group]) + nth * step
        vectors = jax.lax.dynamic_slice_in_dim(padded, start, step)
        written = []
        for w, y in zip(weights, outputs, strict=True):
            matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
            product = jnp.einsum(_FORMS[operation], vectors, matrix)
            written.append(jax.lax.dynamic_update_slice_in_dim(y, product, start, 0))
        return block + 1, written

    empty = [jnp.zeros((M + step, width), x.dtype) for _ in weights]
    total = blocks_end[-1]
    _, outputs = jax.lax.while_loop(lambda s: s[0] < total, one, (jnp.zeros_like(total), empty))
    return [y[:M] for y in outputs]
