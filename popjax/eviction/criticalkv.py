"""CriticalKV (arXiv 2502.03805): half by attention, the rest by attention times projected values.

On SnapKV's scores, as kvpress has it: `scope` "head" is its CriticalKVPress, "layer" its
CriticalAdaKVPress, where AdaKV's allocation by attention says how many entries each head keeps.
The first half is of the entries beside the window [inferred]; kvpress counts the window into it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import select_top
from popjax.config import LayerConfig
from popjax.eviction.adakv import AdaKV, check_share
from popjax.eviction.allocation import Candidates, per_layer
from popjax.eviction.method import LayerEntries, Scores
from popjax.eviction.windowed import attended
from popjax.sparsity import Params

SCOPES = ("head", "layer")
# Keys whose projected values [B, K, keys, D] are held at a time.
_KEYS = 128


@dataclasses.dataclass(frozen=True)
class CriticalKV(AdaKV):
    """Keep a share `first` of a head's entries by attention a, the rest by (a + epsilon) * norm.

    norm is the mean of ||v W_O^n||_1 over the query heads n of a KV head. scope: every "head" keeps
    as many, or those of a "layer" compete by attention, with AdaKV's `floor`. Its scores have two
    planes, [2, B, K, S]: attention and norm, since the second stage needs to know the first one's
    choice. Raises ValueError for values outside their range.
    """

    scope: str = "head"
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        check_share("first", self.first)
        check_share("epsilon", self.epsilon)
        if self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r} is unknown: use one of {SCOPES}")
        super().__post_init__()

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        attention = attended(layer, statistic, entries)
        return jnp.stack([attention, projected_lengths(entries.v, params["o"])])

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        attention = self.pooled(tuple(planes[0] for planes in scores), candidates)
        pairs = enumerate(zip(attention, scores, strict=True))
        return tuple(
            self._two_stages(mass, planes[1], candidates.layer(i)) for i, (mass, planes) in pairs
        )

    def _two_stages(
        self, attention: jax.Array, norms: jax.Array, candidates: Candidates
    ) -> jax.Array:
        """Which entries [B, K, S] of one layer stay."""
        count = jnp.broadcast_to(candidates.count[:, None], attention.shape[:2])
        if self.scope == "layer":
            (alone,) = per_layer([attention], candidates, self.floor)
            count = jnp.sum(alone, axis=-1, dtype=jnp.int32)
        half = jnp.floor(count.astype(jnp.float32) * self.first).astype(jnp.int32)
        sure = select_top(candidates.masked(attention), half)
        product = (attention + self.epsilon) * norms
        return select_top(candidates.masked(jnp.where(sure, jnp.inf, product)), count)


def projected_lengths(v: jax.Array, o: jax.Array) -> jax.Array:
    """Mean over the query heads n of a KV head of ||v W_O^n||_1, [B, K, S] float32.

    v [B, K, S, H]; o [N, H, D], each query head's rows of W_O. A block of keys at a time.
    """
    (B, K, S, _), (N, H, D) = v.shape, o.shape
    step = min(_KEYS, S)
    # Of halves every product is exact in float32, and CPUs lack some products of halves.
    weights = o.astype(jnp.float32).reshape(K, N // K, H, D)
    # Without HIGHEST an accelerator multiplies float32 in passes of fewer bits, enough for halves.
    kind = jnp.promote_types(v.dtype, o.dtype)
    exact = jax.lax.Precision.HIGHEST if kind == jnp.float32 else None

    def write(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * step, S - step)
        values = jax.lax.dynamic_slice_in_dim(v, start, step, axis=2)
        total = jnp.zeros((B, K, step), jnp.float32)
        for g in range(N // K):
            projected = jnp.einsum(
                "BKSH,KHD->BKSD", values.astype(jnp.float32), weights[:, g], precision=exact
            )
            total += jnp.sum(jnp.abs(projected), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(out, total / (N // K), start, axis=2)

    return jax.lax.fori_loop(0, -(-S // step), write, jnp.zeros((B, K, S), jnp.float32))


__all__ = ["SCOPES", "CriticalKV", "projected_lengths"]
