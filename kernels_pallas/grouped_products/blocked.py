"""Grouped products block by block: each block of vectors with the one matrix that it needs.

A loop whose length is data: groups without vectors cost nothing. Blocks are taken in order from the
sorted vectors; one that reaches into the next group writes there what that group's own blocks write
over. Leaves zeroing what lies beyond the groups to the caller.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Below, a product is bound by reading the matrix; above, by arithmetic, and more of it is wasted.
_LEAST, _MOST = 8, 128
_FORMS = {"expand": "MD,FD->MF", "contract": "MF,FD->MD"}


def _product(operation: str, vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    """One block of vectors [M, ...] with its matrix [F, D]."""
    straight = functools.partial(jnp.einsum, _FORMS[operation])
    if operation == "contract":
        return straight(vectors, matrix)
    return jax.lax.platform_dependent(vectors, matrix, cpu=_turned, default=straight)


def _turned(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    """h [M, F] as w x^T turned around: a CPU reads the rows of a left operand as they lie, and
    takes 1.4 times as long for those of a right one.

    Without the barrier XLA would swap the operands back.
    """
    return jax.lax.optimization_barrier(jnp.einsum("FD,DM->FM", matrix, vectors.T)).T


def block_size(vectors: int, groups: int) -> int:
    """Vectors of a block: about those of a group, if all have as many."""
    size = _LEAST
    while size < _MOST and size * groups < vectors:
        size *= 2
    return size


def products(
    operation: str, x: jax.Array, weights: Sequence[jax.Array], sizes: jax.Array
) -> list[jax.Array]:
    """The products [M, ...] of x [M, ...] with each of several w [E, F, D], of equal shapes.

    They may be kept as tiles, [E, F, D/128, 128]: a matrix is put together when it is its turn, for
    a TPU would copy those of all groups ahead of the loop.
    """
    M, (_, F, *row) = x.shape[0], weights[0].shape
    blocks = _Blocks(M, sizes)
    step = blocks.step
    padded = jnp.pad(x, ((0, step), (0, 0)))
    width = F if operation == "expand" else math.prod(row)

    def one(state: tuple) -> tuple:
        block, outputs = state
        group, start = blocks.at(block)
        vectors = jax.lax.dynamic_slice_in_dim(padded, start, step)
        written = []
        for w, y in zip(weights, outputs, strict=True):
            matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False).reshape(F, -1)
            product = _product(operation, vectors, matrix)
            written.append(jax.lax.dynamic_update_slice_in_dim(y, product, start, 0))
        return block + 1, written

    empty = [jnp.zeros((M + step, width), x.dtype) for _ in weights]
    return [y[:M] for y in blocks.over(one, empty)]


def outer(rows: jax.Array, columns: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sum [E, F, D] over the vectors of each group of rows [M, F] times columns [M, D]."""
    blocks = _Blocks(rows.shape[0], sizes)
    step, ends = blocks.step, jnp.cumsum(sizes)
    sides = [jnp.pad(side, ((0, step), (0, 0))) for side in (rows, columns)]

    def one(state: tuple) -> tuple:
        block, total = state
        group, start = blocks.at(block)
        own = start + jnp.arange(step, dtype=start.dtype) < ends[group]
        left, right = (jax.lax.dynamic_slice_in_dim(side, start, step) for side in sides)
        product = jnp.einsum("MF,MD->FD", jnp.where(own[:, None], left, 0), right)
        return block + 1, total.at[group].add(product)

    return blocks.over(one, jnp.zeros((*sizes.shape, rows.shape[1], columns.shape[1]), rows.dtype))


class _Blocks:
    """Where the blocks of sorted vectors start, group after group."""

    def __init__(self, vectors: int, sizes: jax.Array) -> None:
        self.step = block_size(vectors, sizes.shape[0])
        self._counts = -(-sizes // self.step)
        self._ends = jnp.cumsum(self._counts)
        self._starts = jnp.cumsum(sizes) - sizes

    def at(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The group of a block and the place of its first vector."""
        group = jnp.searchsorted(self._ends, block, side="right").astype(jnp.int32)
        nth = block - (self._ends[group] - self._counts[group])
        return group, self._starts[group] + nth * self.step

    def over(self, one: Callable[[tuple], tuple], first: Any) -> Any:
        """What `one` makes of (block, what it made before) for all blocks in order."""
        total = self._ends[-1]
        return jax.lax.while_loop(lambda s: s[0] < total, one, (jnp.zeros_like(total), first))[1]
