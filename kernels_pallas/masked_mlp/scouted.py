"""The feed-forward layer with a scout, through XLA or another implementation's products.

    a = act(x g^T) * (x u^T)      g, u: gate and up in few bits, of all channels
    y = (h * m) down              m: the best channels by a; h from the weights, or a beyond `exact`

Copies of four and six bits foretell from x rounded to eight (`row_products.rounded`), so that a CPU
does it in integers: a number is off by at most half of 1/127 of the largest of 32, a copy by half
of 1/7 or 1/31 of the largest of its group.

Left out: the CPU kernel, which does the same in one call (`native.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.masked_mlp.reference import gated_channels
from kernels_pallas.masked_mlp.selection import Selection, choose, scores, select_top
from kernels_pallas.row_products import QuantizedRows, dequantized, rounded


@struct.dataclass
class Foretold:
    """What a scout says of x: activations a [B, T, E], and masks [B or 1, T, E] of channels.

    on: all that are used; exact: those of them that are evaluated from the weights.
    """

    a: jax.Array
    on: jax.Array
    exact: jax.Array

    def rest(self) -> jax.Array:
        """a [B, T, E] where it is used as it is, zero elsewhere."""
        return jnp.where(self.on & ~self.exact, self.a, jnp.zeros((), self.a.dtype))


def foretell(
    x: jax.Array,
    scout: tuple[QuantizedRows, QuantizedRows],
    activation: str,
    selection: Selection,
    given: jax.Array | None,
) -> Foretold:
    """What the scout [E, D] says of x [B, T, D]; a mask `given` replaces the choice of `on`."""
    # Tied to x: a loop over steps must not take the widened copies out of it, and hold them.
    (x, *copies) = jax.lax.optimization_barrier((x, *scout))
    gate, up = (dequantized(w).astype(x.dtype) for w in copies)
    if scout[0].bits < 8:
        x = rounded(x).astype(x.dtype)
    a = gated_channels(x, gate, up, activation)
    on = choose(a, selection) if given is None else given
    if selection.exact is None:
        return Foretold(a, on, on)
    # A score below zero is never taken.
    score = jnp.where(on, scores(a, selection), -1.0)
    count = jnp.full(score.shape[:-1], selection.exact, jnp.int32)
    return Foretold(a, on, select_top(score, count))
