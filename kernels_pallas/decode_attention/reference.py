"""The mathematics of decode attention over a cache, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention [B, N, H] of q [B, N, H] over k, v [B, K, S, H]; zeros where nothing is seen."""
    B, N, H = q.shape
    grouped = q.astype(jnp.float32).reshape(B, k.shape[1], -1, H)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, k.astype(jnp.float32)) * H**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = query_positions[:, None] - key_positions
    seen = (key_positions >= 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    seen = seen[:, None, None, :]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0.0)
    out = jnp.einsum("BKGS,BKSH->BKGH", weights, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
