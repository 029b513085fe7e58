"""Attention of one new token a row over its cache, reading only the slots that it may see.

The CPU kernels only, so far; `reference.py` is the mathematics they are tested against. Elsewhere
attention runs through XLA over all slots (`popjax.nn.ops.attention`).
"""

from __future__ import annotations

import math

import jax
import numpy as np

from kernels_pallas.native import call


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention [B, N, H] of q [B, N, H] on the CPU kernels.

    k, v [B*K, S, H] or [B, K, S, H], float32, bfloat16 or its bits as uint16; positions [B] and
    [B, S], -1 for an empty slot; a key is seen when it is not later and, with a window, fewer than
    `window` positions back. Scores are capped as softcap * tanh(score / softcap). A query that sees
    nothing gets zeros. Raises ValueError for a window below 1 or a softcap that is not positive and
    finite.
    """
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"decode_attention softcap is {softcap}, must be positive and finite: use None for none"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"decode_attention window is {window}, must be at least 1: use None for none"
        )
    S, H = k.shape[-2:]
    flat_k, flat_v = k.reshape(-1, S, H), v.reshape(-1, S, H)
    (out,) = call(
        "popjax_decode_attention",
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        q,
        flat_k,
        flat_v,
        query_positions,
        key_positions,
        window=np.int64(window or 0),
        softcap=np.float32(softcap or 0.0),
        scale=np.float32(1 / math.sqrt(H)),
    )
    return out
