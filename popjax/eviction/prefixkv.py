"""PrefixKV (arXiv 2412.03409): every layer keeps the tokens that hold the same share of attention.

The authors' code profiles a few prompts offline, stores how much of each layer goes, and thins out
by fixed places in decode. Here the counts are found for each prompt online, from its own attention,
and meet the budget exactly, which replaces the profile [inferred]; decode evicts nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import select_top
from popjax.config import LayerConfig
from popjax.eviction.allocation import Candidates, with_counts
from popjax.eviction.h2o import accumulated_attention
from popjax.eviction.method import AttentionActs, LayerEntries, Scores
from popjax.eviction.sinks import WithSinks
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class PrefixKV(WithSinks):
    """Keep in each layer the tokens with the most attention, as many as reach one share in all.

    Attention is summed over all prompt queries and averaged over a layer's heads, which share the
    choice. The first 4 tokens and the last one stay (authors' code) and are no part of the share
    [inferred]. Raises ValueError for values outside their range.
    """

    window: int = 1

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return accumulated_attention(layer, acts)

    def combine(self, before: Any, now: Any) -> Any:
        return before + now

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        return jnp.broadcast_to(jnp.mean(statistic, axis=1, keepdims=True), statistic.shape)

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        counts = prefix_counts([layer[:, 0] for layer in scores], candidates)
        return with_counts(scores, candidates, counts)


def prefix_counts(scores: list[jax.Array], candidates: Candidates) -> list[jax.Array]:
    """Entries [B] int32 of each layer, whose scores are [B, S]: the least that hold a share p each.

    An entry stays while those ranked before it hold less than p, that is while it and those after
    hold more than 1 - p. So the entries with most from there on stay, count * L of them: the
    bisection of `select_top` finds p, and equal shares go to the lower layer.
    """
    left = jnp.concatenate([_left(layer, candidates.slots) for layer in scores], axis=1)
    chosen = select_top(left, candidates.count * len(scores))
    parts = chosen.reshape(chosen.shape[0], len(scores), -1)
    return list(jnp.sum(parts, axis=2, dtype=jnp.int32).T)


def _left(scores: jax.Array, slots: jax.Array) -> jax.Array:
    """Share [B, S] of a layer's sum from each rank on, best first; negative past the candidates."""
    ranked = jnp.sort(jnp.where(slots, scores, -1.0), axis=1, descending=True)
    sums = jax.lax.cumsum(jnp.maximum(ranked, 0.0), axis=1, reverse=True)
    total = sums[:, :1]
    # Sums of parts that are rounded apart may rise by a little; a prefix needs that none does.
    shares = jax.lax.cummin(sums / jnp.where(total > 0, total, 1.0), axis=1)
    return jnp.where(ranked >= 0, shares, -1.0)


__all__ = ["PrefixKV", "prefix_counts"]
