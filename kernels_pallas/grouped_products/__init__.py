"""Products of groups of vectors with a matrix each: rows sorted by group, w [E, F, D].

    expand: h = x w[e]^T (rows of w[e] as outputs)        contract: y = h w[e] (rows summed)

Group e are the next `sizes[e]` vectors; what follows the last group gives zeros. On TPUs and GPUs
this is XLA's ragged product, which reads the matrices of groups that are not empty. On a CPU that
would be one masked product for every group, so there blocks of vectors are worked one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_products import blocked, reference

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
