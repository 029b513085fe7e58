"""Products of groups of vectors with a matrix each: rows sorted by group, w [E, F, D].

    expand: h = x w[e]^T (rows of w[e] as outputs)        contract: y = h w[e] (rows summed)

Group e are the next `sizes[e]` vectors; what follows the last group gives zeros. Many vectors on a
TPU or GPU are XLA's ragged product. Few, as in a decode step, are worked block by block, which
reads the matrices of groups that are not empty: the ragged product of a TPU would first transpose
those of all groups. So are any on a CPU, where a ragged product is a masked one for every group
(twenty times as long, measured).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_products import blocked, reference

# Up to here a TPU or GPU works vectors by blocks.
_FEW = 256
# Which axes of the vectors and of w [E, F, D] are summed over, 1 of the former in both products.
_SUMMED = {"expand": 2, "contract": 1}


def expand(x: jax.Array, weights: Sequence[jax.Array], sizes: jax.Array) -> list[jax.Array]:
    """h [M, F] of x [M, D], sorted by group, with each of several w [E, F, D]; sizes [E] int32."""
    return _grouped("expand", x, weights, sizes)


def contract(h: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """y [M, D] of h [M, F], sorted by group, with w [E, F, D]; sizes [E] int32."""
    (y,) = _grouped("contract", h, [w], sizes)
    return y


def _grouped(
    operation: str, x: jax.Array, weights: Sequence[jax.Array], sizes: jax.Array
) -> list[jax.Array]:
    def ragged(x: jax.Array, sizes: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        return [_ragged(operation, x, w, sizes) for w in weights]

    def one_by_one(x: jax.Array, sizes: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        return blocked.products(operation, x, weights, sizes)

    if x.shape[0] <= _FEW:
        outputs = one_by_one(x, sizes, *weights)
    else:
        outputs = jax.lax.platform_dependent(x, sizes, *weights, cpu=one_by_one, default=ragged)
    grouped = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    # Beyond the groups a product may leave whatever was there.
    return [jnp.where(grouped[:, None], y, jnp.zeros((), y.dtype)) for y in outputs]


def _ragged(operation: str, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (_SUMMED[operation],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(x, w, sizes, numbers)


__all__ = ["contract", "expand", "reference"]
