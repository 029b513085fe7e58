"""H2O (arXiv 2306.14048): heavy hitters, which all queries of the prompt attend to, and the latest.

The paper evicts at every token by what attention has added up to by then; here the sums are those
of the whole prompt and the eviction comes once, after prefill, so this is only like it. They are
plain sums: early tokens, which more queries see, are favoured, as in the paper (kvpress divides by
the number of queries).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from popjax.config import LayerConfig
from popjax.eviction.adakv import check_share
from popjax.eviction.allocation import Candidates, per_head
from popjax.eviction.method import AttentionActs, KvMethod, LayerEntries, Scores
from popjax.eviction.windowed import attended
from popjax.sparsity import Params

# Queries whose attention is held at a time, to a block of keys.
_QUERIES = 256


@dataclasses.dataclass(frozen=True)
class H2O(KvMethod):
    """Keep in every head the entries with the largest sum of attention over all prompt queries.

    recent: share of the budget, the window included, that goes to the last tokens instead (paper:
    one half). Raises ValueError for values outside their range.
    """

    recent: float = 0.5

    def __post_init__(self) -> None:
        check_share("recent", self.recent)
        super().__post_init__()

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return accumulated_attention(layer, acts)

    def combine(self, before: Any, now: Any) -> Any:
        return before + now

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        return statistic

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        whole = (candidates.count + self.window).astype(jnp.float32)
        latest = jnp.floor(whole * self.recent).astype(jnp.int32) - self.window
        # Slots are in the order of tokens; how many candidates there are from each one on:
        behind = jax.lax.cumsum(candidates.slots.astype(jnp.int32), axis=1, reverse=True)
        sure = behind <= jnp.minimum(latest, candidates.count)[:, None]
        raised = tuple(jnp.where(sure[:, None, :], jnp.inf, layer) for layer in scores)
        return per_head(raised, candidates)


def accumulated_attention(layer: LayerConfig, acts: AttentionActs) -> jax.Array:
    """Attention [B, K, S] float32 that each key gets from all queries of `acts` together.

    Averaged over the query heads that share a key. Queries go a block at a time: attention
    [N, T, S] is never held.
    """
    entries = LayerEntries(acts.k, acts.v, acts.key_positions)
    T = acts.q.shape[1]

    def added(queries: jax.Array, positions: jax.Array) -> jax.Array:
        mean = attended(layer, (queries, positions), entries)
        return mean * jnp.sum(positions >= 0, axis=1).astype(jnp.float32)[:, None, None]

    if T <= _QUERIES:
        return added(acts.q, acts.query_positions)
    more = -T % _QUERIES
    q = jnp.pad(acts.q, ((0, 0), (0, more), (0, 0), (0, 0)))
    positions = jnp.pad(acts.query_positions, ((0, 0), (0, more)), constant_values=-1)

    def block(i: jax.Array, total: jax.Array) -> jax.Array:
        parts = (
            jax.lax.dynamic_slice_in_dim(x, i * _QUERIES, _QUERIES, axis=1) for x in (q, positions)
        )
        return total + added(*parts)

    nothing = jnp.zeros(acts.k.shape[:3], jnp.float32)
    return jax.lax.fori_loop(0, (T + more) // _QUERIES, block, nothing)


__all__ = ["H2O", "accumulated_attention"]
