"""Eviction repeated while decoding: what stayed of before and what came since compete anew.

The last tokens are run once more over the cache, for their queries alone. Heads hold entries of
different positions by then, so positions are [B, K, S]. Leaves out when it happens (`run.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from popjax.cache import Cache, Kept, LayerCache
from popjax.config import ModelConfig
from popjax.eviction import pool
from popjax.eviction.allocation import Candidates
from popjax.eviction.method import KvMethod, LayerEntries, budgeted, reach, still_seen
from popjax.methods.method import Method
from popjax.nn.transformer import Inputs, Outputs, Transformer
from popjax.sparsity import Params, Partitions


def watch(
    params: Params,
    inputs: Inputs,
    cache: Cache,
    partition: Partitions | None,
    *,
    config: ModelConfig,
    method: Method,
    eviction: KvMethod,
) -> tuple[Any, ...]:
    """What the eviction method observes of each layer while given tokens [B, W] decode again.

    The cache ends before these tokens, whose own entries are written over alike ones.
    """
    model = Transformer(config, method, eviction=eviction)
    given = ({"params": params}, inputs, cache, partition, None)
    return cast(Outputs, model.apply(*given, method="decode")).seen


def view(kept: Kept | None, layer: LayerCache, positions: jax.Array, *, most: int) -> LayerEntries:
    """One layer's entries, those of the pool, `most` a head, then those of the dense cache [B, S].

    k, v [B, K, most + S, H], positions [B, K, most + S] with -1 where a head holds fewer.
    """
    B, K, S, _ = layer.k.shape
    dense = jnp.broadcast_to(positions[:, None, :], (B, K, S))
    if kept is None:
        return LayerEntries(layer.k, layer.v, dense)
    rank = jnp.arange(most, dtype=jnp.int32)[None, None, :]
    rows = jnp.minimum(kept.starts[:, :, None] + rank, kept.entries.shape[0] - 1)
    held = jnp.where(rank < kept.lengths[:, :, None], kept.positions[rows], -1)
    k, v = jnp.split(kept.entries[rows], 2, axis=-1)
    return LayerEntries(
        jnp.concatenate([k, layer.k], axis=2),
        jnp.concatenate([v, layer.v], axis=2),
        jnp.concatenate([held, dense], axis=2),
    )


def choose_again(
    scores: tuple[jax.Array, ...],
    positions: tuple[jax.Array, ...],
    lengths: jax.Array,
    budgets: jax.Array,
    *,
    method: KvMethod,
    config: ModelConfig,
    align: int,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array]:
    """As `evict.choose`, where every layer and head has positions of its own, [B, K, S] each.

    lengths [B]: tokens so far; a row that holds fewer than its budget keeps all it has.
    """
    kept_layers = [
        still_seen(held, lengths, layer.window)
        for held, layer in zip(positions, config.layers, strict=True)
    ]
    shared = [i for i, takes_part in enumerate(budgeted(config)) if takes_part]
    seen = jnp.stack([still_seen(positions[i], lengths, reach(config)) for i in shared])
    by_head = jax.vmap(method.protected, in_axes=(1, None), out_axes=1)
    sure = seen & jnp.stack([by_head(positions[i], lengths) for i in shared])
    count = budgets - jnp.sum(sure[0, :, 0], axis=-1, dtype=jnp.int32)
    chosen = method.allocate(scores, Candidates(seen & ~sure, jnp.maximum(count, 0)))
    for i, mine, always in zip(shared, chosen, sure, strict=True):
        kept_layers[i] = mine | always
    finite = jnp.stack([jnp.all(jnp.isfinite(layer)) for layer in scores])
    keep = tuple(kept_layers)
    return keep, *pool.places(keep, align), finite


def window_inputs(tokens: jax.Array, cache: Cache, fed: int, count: int) -> tuple[Inputs, Cache]:
    """The last `count` of `fed` new tokens [B, M], and the cache as it was before them."""
    end = int(cache.length)
    inputs = Inputs(tokens[:, fed - count : fed], cache.positions[:, end - count : end])
    return inputs, dataclasses.replace(cache, length=cache.length - count)


__all__ = ["choose_again", "view", "watch", "window_inputs"]
