"""Scores smoothed along tokens, so that what stays are passages and not single tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def average(scores: jax.Array, slots: jax.Array, width: int) -> jax.Array:
    """Mean [B, K, S] of scores over `width` (odd) tokens around each, others than `slots` as zero.

    slots [B, S] or [B, K, S] bool: those that compete. Beyond the ends zeros are counted, as the
    average pooling of torch does by default.
    """
    if width == 1:
        return scores
    scores = jnp.where(slots[:, None, :] if slots.ndim == 2 else slots, scores, 0.0)
    sums = jax.lax.reduce_window(
        scores, jnp.float32(0), jax.lax.add, (1, 1, width), (1, 1, 1), "SAME"
    )
    return sums / width
