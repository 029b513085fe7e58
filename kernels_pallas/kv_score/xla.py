"""Scores of cached keys in two passes over blocks of keys, for XLA.

The first pass finds the normaliser of every query's softmax, the second the columns. Between them
lies one number a query; a block's attention and projected values are the largest arrays there are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.kv_score.reference import (
    Rule,
    by_head,
    combined,
    valid_queries,
    visible,
)

# Values of the largest array of a block: 4 MB in float32, which the caches of processors hold, and
# 16 MB, which that of an H100 does (50 MB), where every operation on a block is a launch.
BLOCK_VALUES, GPU_BLOCK_VALUES = 2**20, 2**22
_LEAST_BLOCK, _MOST_BLOCK = 128, 2048
# Below every score, and finite: minus infinity less itself is no number.
_LOWEST = -1e30


def kv_score(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    gram: jax.Array | None,
    rule: Rule,
    block_values: int = BLOCK_VALUES,
) -> jax.Array:
    """Scores [B, K, S] float32; see `kernels_pallas.kv_score.kv_score`."""
    (B, W, N, H), (K, S) = q.shape, k.shape[1:3]
    if not (B * W * N * S):
        return jnp.zeros((B, K, S), jnp.float32)
    per_key = B * N * max(W, H if rule.values == "projected" else 1)
    step = block_keys(per_key, S, block_values)
    steps = -(-S // step)
    queries = q.reshape(B, W, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    count = valid_queries(query_positions)[:, None, None, None]

    def attended(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores [B, K, G, W, block] of a block and the mask [B, W, block] of what is seen."""
        keys = _block(k, start, step)
        scores = _dot("BKRH,BKSH->BKRS", queries, keys) * jnp.float32(H**-0.5)
        if rule.softcap is not None:
            scores = rule.softcap * jnp.tanh(scores / rule.softcap)
        places = lax.dynamic_slice_in_dim(key_positions, start, step, axis=1)
        return scores.reshape(B, K, -1, W, step), visible(query_positions, places, rule.window)

    def normalise(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        most, total = carry
        start = jnp.minimum(i * step, S - step)
        scores, seen = attended(start)
        # The last block reaches back so as not to reach beyond the end: those keys were counted.
        uncounted = start + jnp.arange(step) >= i * step
        seen = (seen & uncounted[None, None])[:, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        higher = jnp.maximum(most, jnp.max(scores, axis=-1))
        added = jnp.sum(jnp.exp(scores - higher[..., None]), axis=-1)
        return higher, total * jnp.exp(most - higher) + added

    def write(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * step, S - step)
        scores, seen = attended(start)
        weights = jnp.exp(jnp.where(seen[:, None, None], scores, -jnp.inf) - logs[..., None])
        norms = _norms(_block(v, start, step), gram, rule)
        found = combined(weights, norms, count, rule)[:, :, 0]
        found = jnp.where(jnp.any(seen, axis=1)[:, None], found, 0.0)
        return lax.dynamic_update_slice_in_dim(out, found, start, axis=2)

    shape = (B, K, N // K, W)
    empty = jnp.full(shape, _LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)
    most, total = lax.fori_loop(0, steps, normalise, empty)
    # A query that sees nothing keeps a finite one, under which all its weights are exp(-inf).
    logs = most + jnp.log(jnp.where(total > 0, total, 1.0))
    return lax.fori_loop(0, steps, write, jnp.zeros((B, K, S), jnp.float32))


def block_keys(per_key: int, S: int, most: int) -> int:
    """Keys of a block whose largest array holds at most so many values: a power of two, or all."""
    fitting = 2 ** (max(most // per_key, 1).bit_length() - 1)
    return min(max(_LEAST_BLOCK, min(fitting, _MOST_BLOCK)), S)


def _norms(values: jax.Array, gram: jax.Array | None, rule: Rule) -> jax.Array | None:
    """Norms [B, K, G or 1, S] of a block of values [B, K, S, H], None where they do not count."""
    if rule.values == "none":
        return None
    exact = values.astype(jnp.float32)
    # Keys as the last axis: a sum over heads' channels is then one of whole vectors.
    turned = exact.swapaxes(2, 3)[:, :, None]
    projected = turned
    if rule.values == "projected" and gram is not None:
        # Of the values as they lie: turned first, XLA would turn all of them, before the loop.
        projected = _dot("KGIH,BKSH->BKGIS", by_head(gram, values.shape[1]), exact)
    return jnp.sqrt(jnp.maximum(jnp.sum(projected * turned, axis=3), 0.0))


def _block(x: jax.Array, start: jax.Array, step: int) -> jax.Array:
    """Keys start to start + step of x [B, K, S, H]."""
    # XLA's CPU backend cuts no bfloat16: it would convert all of x, before the loop if it may.
    x, start = lax.optimization_barrier((x, start))
    return lax.dynamic_slice_in_dim(x, start, step, axis=2)


def _dot(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Products summed in float32; those of float32 are too, not passes of fewer bits."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(form, a, b, precision=exact, preferred_element_type=jnp.float32)
