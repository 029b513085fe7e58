"""Partial probing of a prompt: the part of it that channel importance is estimated from.

The paper (arXiv 2602.06822 section 3.4) names "partial probing" without a size; the template here
is Probe Pruning's default as its code documents it: the half of the sequence positions with the
largest summed residual norm, then the 5 % of batch rows with the largest norm there (at least one).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import select_top
from popjax.methods.method import LayerActs
from popjax.sparsity import Params

ROWS = 0.05


def probe_acts(params: Params, acts: LayerActs) -> LayerActs:
    """The acts of probed tokens only: x [rows, T/2, D], everything else of the prompt left out.

    Shapes are static (half of the padded length); a shorter prompt probes half of its real tokens,
    so padding never changes which tokens are probed.
    """
    norms = jnp.sqrt(jnp.sum(acts.residual.astype(jnp.float32) ** 2, axis=-1))
    norms = jnp.where(acts.valid, norms, 0.0)
    B, T = norms.shape
    # Left-padded rows share the end of the axis, so positions are ranked where any row has a token.
    by_position = jnp.sum(norms, axis=0)
    tokens = jnp.sum(jnp.any(acts.valid, axis=0))
    count = (tokens + 1) // 2
    order = jnp.argsort(-by_position, stable=True)[: math.ceil(T / 2)]
    taken = jnp.arange(order.shape[0]) < count
    by_row = jnp.sum(jnp.where(taken[None, :], norms[:, order], 0.0), axis=1)
    rows = max(1, math.floor(ROWS * B + 0.5))
    chosen = jnp.argsort(~select_top(by_row, rows), stable=True)[:rows]

    def part(array: jax.Array) -> jax.Array:
        return array[chosen][:, order]

    valid = part(acts.valid) & taken[None, :]
    return LayerActs(part(acts.x), part(acts.residual), valid, params, acts.activation, acts.shards)
