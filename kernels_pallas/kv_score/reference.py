"""The mathematics of scoring cached keys by what a window of queries takes from them, in plain jnp.

    A^n = softmax(q^n k^T / sqrt(H))          over the keys a query sees          [W, S]
    score[s] = mean over n of c(A^n[:, s]) * norm^n(v_s)

c is the 2-norm or the mean of a column, norm^n(v) = sqrt(v G_n v^T) the length of a value after the
output projection of its query head. It holds A and the projected values whole; `xla` does not.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

COLUMNS = ("l2", "mean")
VALUES = ("none", "norm", "projected")
GROUPS = ("mean", "literal")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is static of a score: the options of `kv_score`, under the same names."""

    columns: str = "l2"
    values: str = "none"
    group: str = "mean"
    window: int | None = None
    softcap: float | None = None


def kv_score(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    gram: jax.Array | None,
    rule: Rule,
) -> jax.Array:
    """Scores [B, K, S] float32; see `kernels_pallas.kv_score.kv_score`."""
    (B, W, N, H), K = q.shape, k.shape[1]
    grouped = q.astype(jnp.float32).reshape(B, W, K, N // K, H)
    scores = jnp.einsum("BWKGH,BKSH->BKGWS", grouped, k.astype(jnp.float32)) * H**-0.5
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    seen = visible(query_positions, key_positions, rule.window)[:, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0.0)
    norms = None
    if rule.values != "none":
        values = v.astype(jnp.float32)[:, :, None]
        projected = values
        if rule.values == "projected" and gram is not None:
            projected = jnp.einsum("BKSH,KGHI->BKGSI", values[:, :, 0], by_head(gram, K))
        norms = jnp.sqrt(jnp.maximum(jnp.sum(projected * values, axis=-1), 0.0))
    found = combined(weights, norms, valid_queries(query_positions)[:, None, None, None], rule)
    return jnp.where(jnp.any(seen, axis=-2)[:, 0], found[:, :, 0], 0.0)


def combined(
    weights: jax.Array, norms: jax.Array | None, count: jax.Array, rule: Rule
) -> jax.Array:
    """Scores [..., 1, S] of one KV head or many, whether seen or not.

    weights [..., G, W, S], norms [..., G or 1, S] or None for ones, count [..., 1, 1] of queries.
    """
    if rule.group == "literal":
        weights = jnp.mean(weights, axis=-3, keepdims=True)
        norms = None if norms is None else jnp.mean(norms, axis=-2, keepdims=True)
    if rule.columns == "l2":
        columns = jnp.sqrt(jnp.sum(weights * weights, axis=-2))
    else:
        columns = jnp.sum(weights, axis=-2) / count
    return jnp.mean(columns if norms is None else columns * norms, axis=-2, keepdims=True)


def visible(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees [B, W, S]: both are there, the key is not later, nor too far back."""
    queries, keys = query_positions[:, :, None], key_positions[:, None, :]
    seen = (queries >= 0) & (keys >= 0) & (keys <= queries)
    return seen if window is None else seen & (queries - keys < window)


def valid_queries(query_positions: jax.Array) -> jax.Array:
    """How many queries of a row [B] are no padding, as float32, at least one."""
    return jnp.maximum(jnp.sum(query_positions >= 0, axis=1), 1).astype(jnp.float32)


def by_head(gram: jax.Array, K: int) -> jax.Array:
    """gram [N, H, H] as [K, G, H, H], by the KV head that a query head belongs to."""
    return gram.reshape(K, -1, *gram.shape[1:])
