"""The mathematics of attention over ranges of a pool and a tail, in plain jnp over the whole pool.

Leaves out everything that makes it cheap: `xla.py` reads only the ranges.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
    """Attention [B, T, N, H] of q [B, T, N, H]; zeros where nothing is seen.

    entries [E, 2H] (key | value), positions [E], starts and lengths [B, K], tail_k and tail_v
    [B, K, M, H], query_positions [B, T], tail_positions [B, M]; floats, no bits.
    """
    B, T, _, H = q.shape
    K = starts.shape[1]
    pool = jnp.broadcast_to(entries, (B, K, *entries.shape))
    keys = jnp.concatenate([pool[..., :H], tail_k], axis=2).astype(jnp.float32)
    values = jnp.concatenate([pool[..., H:], tail_v], axis=2).astype(jnp.float32)
    row = jnp.arange(len(entries))[None, None, :] - starts[:, :, None]
    held = jnp.where((row >= 0) & (row < lengths[:, :, None]), positions[None, None, :], -1)
    tail = jnp.broadcast_to(tail_positions[:, None, :], (B, K, tail_positions.shape[1]))
    key_positions = jnp.concatenate([held, tail], axis=2)[:, :, None, :]
    distance = query_positions[:, None, :, None] - key_positions
    seen = (key_positions >= 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    seen = seen[:, :, None]
    # A row that nobody sees may hold anything, and zero times NaN is NaN.
    used = (key_positions[:, :, 0] >= 0)[..., None]
    keys, values = jnp.where(used, keys, 0.0), jnp.where(used, values, 0.0)
    grouped = q.astype(jnp.float32).reshape(B, T, K, -1, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, keys) * H**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, values).reshape(q.shape).astype(q.dtype)
