"""PyramidKV (arXiv 2406.02069): SnapKV's scores, and budgets that fall from layer to layer.

Counts are those of the authors' code, the window apart, with kvpress's limit where the largest
would exceed what there is. They are rounded in pairs of layers, so that they add up exactly.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from popjax.eviction.allocation import Candidates, with_counts
from popjax.eviction.method import Scores, check_whole
from popjax.eviction.snapkv import SnapKV


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep alike many of the best entries in every head of a layer, fewer the later the layer is.

    beta: how many times fewer than the mean the last layer keeps (paper: 20). Raises ValueError for
    values outside their range.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        check_whole("beta", self.beta, 1)
        super().__post_init__()

    @property
    def repeats(self) -> bool:
        return False  # its counts are for heads that hold alike many entries

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        available = jnp.sum(candidates.slots, axis=1, dtype=jnp.int32)
        counts = linear_counts(candidates.count, available, len(scores), self.beta)
        return with_counts(self.pooled(scores, candidates), candidates, list(counts))


def linear_counts(mean: jax.Array, available: jax.Array, layers: int, beta: int) -> jax.Array:
    """Entries a head [L, B] int32: linear over layers, from 2 mean - mean / beta to mean / beta.

    mean and available [B] int32; where the first exceeds `available`, it is that, and the last so
    many more. Layers as far from either end have 2 mean together, so half of them are rounded.
    """
    middle = mean.astype(jnp.float32)
    most = jnp.minimum(middle * (2 - 1 / beta), available.astype(jnp.float32))
    fall = 2 * (most - middle) / max(layers - 1, 1)
    exact = most[None] - jnp.arange(layers // 2, dtype=jnp.float32)[:, None] * fall[None]
    low, high = jnp.maximum(2 * mean - available, 0), jnp.minimum(2 * mean, available)
    first = jnp.clip(jnp.floor(exact + 0.5).astype(jnp.int32), low[None], high[None])
    between = jnp.broadcast_to(mean, (layers % 2, *mean.shape))
    return jnp.concatenate([first, between, 2 * mean[None] - first[::-1]])


__all__ = ["PyramidKV", "linear_counts"]
