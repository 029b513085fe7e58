"""Attention over ranges of a pool and a tail as one call of the CPU kernels."""

from __future__ import annotations

import math

import jax
import numpy as np

from kernels_pallas.native import call


def ragged_decode(
    q: jax.Array,
    entries: jax.Array,
    positions: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    query_positions: jax.Array,
    tail_positions: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention [B, 1, N, H] of q [B, 1, N, H] in its dtype; zeros where nothing is seen.

    entries [E, 2H] (key | value), positions [E], starts and lengths [B, K], tail_k and tail_v
    [B, K, M, H], query_positions [B, 1], tail_positions [B, M]; entries and tail float32, bfloat16
    or its bits as uint16. Raises where a range leaves the pool.
    """
    B, _, N, H = q.shape
    K, M = starts.shape[1], tail_positions.shape[1]
    (out,) = call(
        "popjax_ragged_decode",
        [jax.ShapeDtypeStruct((B, N, H), q.dtype)],
        q.reshape(B, N, H),
        entries,
        positions,
        starts,
        lengths,
        tail_k.reshape(B * K, M, H),
        tail_v.reshape(B * K, M, H),
        query_positions.reshape(B),
        tail_positions,
        window=np.int64(window or 0),
        softcap=np.float32(softcap or 0.0),
        scale=np.float32(1 / math.sqrt(H)),
    )
    return out.reshape(q.shape)
