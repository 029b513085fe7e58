"""Products of groups of vectors with a matrix each: rows sorted by group, w [E, F, D].

Where a TPU keeps the rows of w as whole tiles it is [E, F, D/128, 128], here and below.

    expand: h = x w[e]^T (rows of w[e] as outputs)        contract: y = h w[e] (rows summed)

Group e are the next `sizes[e]` vectors; what follows the last group gives zeros. Many vectors on a
TPU or GPU are XLA's ragged product. Few, as in a decode step, are worked block by block, which
reads the matrices of groups that are not empty: the ragged product of a TPU would first transpose
those of all groups. So are any on a CPU, where a ragged product is a masked one for every group
(twenty times as long, measured).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_products import blocked, reference

# Up to here a TPU or GPU works vectors by blocks.
_FEW = 256
# Which axes of the vectors and of w [E, F, D] are summed over, 1 of the former in both products.
_SUMMED = {"expand": 2, "contract": 1}


def expand(x: jax.Array, weights: Sequence[jax.Array], sizes: jax.Array) -> list[jax.Array]:
    """h [M, F] of x [M, D], sorted by group, with each of several w [E, F, D]; sizes [E] int32."""
    return _products("expand", x, list(weights), sizes)


def contract(h: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """y [M, D] of h [M, F], sorted by group, with w [E, F, D]; sizes [E] int32."""
    return _products("contract", h, [w], sizes)[0]


def _products(
    operation: str, x: jax.Array, weights: list[jax.Array], sizes: jax.Array
) -> list[jax.Array]:
    return cast(list[jax.Array], _grouped(operation, x, weights, sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    operation: str, x: jax.Array, weights: list[jax.Array], sizes: jax.Array
) -> list[jax.Array]:
    def ragged(x: jax.Array, sizes: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        return [_ragged(operation, x, w, sizes) for w in weights]

    def one_by_one(x: jax.Array, sizes: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        return blocked.products(operation, x, weights, sizes)

    if x.shape[0] <= _FEW:
        outputs = one_by_one(x, sizes, *weights)
    else:
        outputs = jax.lax.platform_dependent(x, sizes, *weights, cpu=one_by_one, default=ragged)
    # Beyond the groups a product may leave whatever was there.
    return [_inside(y, sizes) for y in outputs]


def _inside(each: jax.Array, sizes: jax.Array) -> jax.Array:
    """each [M, n] with zeros beyond the groups."""
    grouped = jnp.arange(each.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(grouped[:, None], each, jnp.zeros((), each.dtype))


def _forward(
    operation: str, x: jax.Array, weights: list[jax.Array], sizes: jax.Array
) -> tuple[list[jax.Array], Any]:
    return _products(operation, x, weights, sizes), (x, weights, sizes)


def _backward(operation: str, saved: Any, gradients: list[jax.Array]) -> tuple[Any, ...]:
    """Gradients by x and each w. A loop of unknown length has none of its own."""
    x, weights, sizes = saved
    inside = [_inside(gradient, sizes) for gradient in gradients]
    other = "contract" if operation == "expand" else "expand"
    pairs = list(zip(inside, weights, strict=True))
    by_x = sum(_products(other, gradient, [w], sizes)[0] for gradient, w in pairs)
    # Rows of w are channels: outputs of expand, inputs of contract.
    sides = [(g, x) if operation == "expand" else (x, g) for g in inside]
    by_w = [blocked.outer(rows, columns, sizes) for rows, columns in sides]
    return by_x, [each.reshape(w.shape) for each, w in zip(by_w, weights, strict=True)], None


_grouped.defvjp(_forward, _backward)


def _ragged(operation: str, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (_SUMMED[operation],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(x, w.reshape(*w.shape[:2], -1), sizes, numbers)


__all__ = ["contract", "expand", "reference"]
