"""The whole feed-forward layer as one call of the CPU kernels: only the rows in use are read."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masked_mlp.selection import Selection
from kernels_pallas.native import call
from kernels_pallas.row_products.quantized import QuantizedRows, Rows, stored

# Copies of gate and up in few bits.
Scout = tuple[QuantizedRows, QuantizedRows]
# Their places are the numbers of cpu.cc.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
_POINTS = ("all", "product", "gate", "given", "scout")


def masked_mlp(
    x: jax.Array,
    gate: Rows,
    up: Rows,
    down: Rows,
    *,
    activation: str,
    selection: Selection | None = None,
    given: jax.Array | None = None,
    scout: Scout | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """FFN output [B, T, D] and the mask used [B or 1, T, E], None where every channel was on.

    x [B, T, D]; gate, up, down [E, D] of one kind; a mask `given` [B or 1, T, E] replaces the
    selection, which a `scout` makes before a row is read; how many of the chosen are then `exact`
    holds for either. A shared choice needs T = 1, since it is made once.
    """
    B, T, D = x.shape
    E = gate.shape[0]
    flat, mask = x.reshape(B * T, D), jnp.zeros((0, E), bool)
    point, rows = "all", 1
    if given is not None:
        point, mask = "given", jnp.broadcast_to(given, (given.shape[0], T, E))
        if given.shape[0] * T not in (1, B * T):
            mask = jnp.broadcast_to(given, (B, T, E))
        rows = mask.shape[0] * T
        mask = mask.reshape(rows, E)
    elif selection is not None:
        point, rows = selection.point, 1 if selection.shared else B * T
        point = point if scout is None else "scout"
    refined = scout is not None and selection is not None and selection.exact is not None
    scouted = point == "scout" or (refined and point == "given")
    used = selection if selection is not None and (given is None or scouted) else Selection()
    # How many a second choice takes of those that the first one took.
    late = used.exact if scouted else None if used.tried is None else used.k_selected
    empty = jnp.zeros((0,), jnp.float32)
    matrices, scales = zip(*map(stored, (gate, up, down)), strict=True)
    copies = scout if scouted and scout is not None else (empty, empty)
    values, steps = zip(*map(stored, copies), strict=True)
    y, chosen = call(
        "popjax_masked_mlp",
        [jax.ShapeDtypeStruct(flat.shape, x.dtype), jax.ShapeDtypeStruct((rows, E), bool)],
        flat,
        *matrices,
        used.places(E).astype(jnp.int32),
        empty if used.weight is None else used.weight,
        empty if used.threshold is None else used.threshold,
        mask,
        *scales,
        *values,
        *steps,
        empty if used.expected is None else used.expected,
        point=np.int32(_POINTS.index(point)),
        activation=np.int32(ACTIVATIONS.index(activation)),
        keep=np.int64(used.first),
        exact=np.int64(-1 if late is None else late),
    )
    if point == "all":
        return y.reshape(x.shape), None
    shape = (1, T, E) if rows == 1 else (B, T, E)
    return y.reshape(x.shape), given if given is not None else chosen.reshape(shape)


def select_top(scores: jax.Array, count: int) -> jax.Array:
    """Bool mask [..., C] of the `count` largest non-negative scores, ties to the lower index."""
    flat = scores.astype(jnp.float32).reshape(math.prod(scores.shape[:-1]), scores.shape[-1])
    result = jax.ShapeDtypeStruct(flat.shape, bool)
    (mask,) = call("popjax_top", [result], flat, keep=np.int64(count))
    return mask.reshape(scores.shape)
