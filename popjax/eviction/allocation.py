"""Where a budget of cache entries falls: within a head, over a layer, or over the whole model.

Scores [B, K, S] a layer, float32 and not negative, become bool sets of the same shape. Every
function keeps exactly as many entries as the candidates' budget allows; equal scores go to the
lower layer, head and slot. Counts are data: another budget compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.masked_mlp import select_top

# Below every score, so that a slot which is no candidate is never taken.
_NEVER = -1.0


@struct.dataclass
class Candidates:
    """What competes: `slots` bool that may stay or go, and `count` [B] int32 that stay.

    slots: [B, S] where all heads hold the same slots, as after a prefill, else [L, B, K, S] or
    [B, K, S] of one layer. `count` is for one head on average; a row keeps count * K entries of
    each layer, together.
    """

    slots: jax.Array
    count: jax.Array

    def layer(self, i: int) -> Candidates:
        """Those of one of the layers that compete."""
        return dataclasses.replace(self, slots=self.slots[i]) if self.slots.ndim == 4 else self

    def by_head(self) -> jax.Array:
        """Slots [B, K or 1, S] of one layer."""
        return self.slots[:, None, :] if self.slots.ndim == 2 else self.slots

    def masked(self, scores: jax.Array) -> jax.Array:
        """Scores [B, K, S] of one layer with what is no candidate below everything."""
        # Minus zero would rank below every score too.
        scores = jnp.where(scores > 0, scores, 0.0)
        return jnp.where(self.by_head(), scores, _NEVER)


def per_head(scores: Sequence[jax.Array], candidates: Candidates) -> tuple[jax.Array, ...]:
    """The same number of the best entries in every head."""
    return tuple(
        select_top(candidates.layer(i).masked(layer), _each_head(candidates.count, layer))
        for i, layer in enumerate(scores)
    )


def per_layer(
    scores: Sequence[jax.Array], candidates: Candidates, floor: float = 0.0
) -> tuple[jax.Array, ...]:
    """The same number in every layer, its heads competing; each is sure of a share `floor`.

    The share is of what it would get alone (AdaKV: 0.2).
    """
    return tuple(_flattened(y, candidates.layer(i), floor) for i, y in enumerate(scores))


def over_layers(scores: Sequence[jax.Array], candidates: Candidates) -> tuple[jax.Array, ...]:
    """The best entries of all layers and heads together, as many as these would get alone."""
    rows = scores[0].shape[0]
    masked = [candidates.layer(i).masked(y) for i, y in enumerate(scores)]
    flat = jnp.concatenate([y.reshape(rows, -1) for y in masked], axis=1)
    heads = sum(layer.shape[1] for layer in scores)
    chosen = select_top(flat, candidates.count * heads)
    ends = [sum(y[0].size for y in scores[: i + 1]) for i in range(len(scores))]
    parts = jnp.split(chosen, ends[:-1], axis=1)
    return tuple(part.reshape(y.shape) for part, y in zip(parts, scores, strict=True))


def with_counts(
    scores: Sequence[jax.Array], candidates: Candidates, per_layer_counts: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Each layer's own number [B] of the best entries in every head of it."""
    pairs = enumerate(zip(scores, per_layer_counts, strict=True))
    return tuple(
        per_head([layer], dataclasses.replace(candidates.layer(i), count=count))[0]
        for i, (layer, count) in pairs
    )


def layer_shares(scores: jax.Array, candidates: Candidates) -> jax.Array:
    """Scores [B, K, S] over their sum in this layer, so that layers can be compared (Eq. 12)."""
    kept = jnp.where(candidates.by_head(), scores, 0.0)
    total = jnp.sum(kept, axis=(1, 2), keepdims=True)
    return kept / jnp.where(total > 0, total, 1.0)


def _flattened(scores: jax.Array, candidates: Candidates, floor: float) -> jax.Array:
    masked = candidates.masked(scores)
    if floor:
        sure = jnp.floor(candidates.count.astype(jnp.float32) * floor).astype(jnp.int32)
        first = select_top(masked, _each_head(sure, scores))
        masked = jnp.where(first, jnp.inf, masked)
    rows, heads = scores.shape[:2]
    chosen = select_top(masked.reshape(rows, -1), candidates.count * heads)
    return chosen.reshape(scores.shape)


def _each_head(count: jax.Array, scores: jax.Array) -> jax.Array:
    """Counts [B, K] of counts [B]."""
    return jnp.broadcast_to(count[:, None], scores.shape[:2])


__all__ = [
    "Candidates",
    "layer_shares",
    "over_layers",
    "per_head",
    "per_layer",
    "with_counts",
]
