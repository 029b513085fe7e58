"""The key/value cache: made empty, written at a slot, carried in and out of the model.

Keys are stored after rotation, with their true positions; an empty or padding slot has position -1
and is never attended. One slot counter serves the batch, since prompts are left-padded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from popjax.config import ModelConfig


@struct.dataclass
class LayerCache:
    """One layer's keys and values, both [B, K, S, H]: heads outermost, as the products read them."""

    k: jax.Array
    v: jax.Array


@struct.dataclass
class Cache:
    """The cache of every layer, the position of each slot [B, S] int32, and slots used (scalar)."""

    layers: tuple[LayerCache, ...]
    positions: jax.Array
    length: jax.Array


def empty(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of `capacity` slots a row with nothing in it."""
    layers = []
    for layer in config.layers:
        shape = (batch, layer.num_kv_heads, capacity, layer.head_dim)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    positions = jnp.full((batch, capacity), -1, jnp.int32)
    return Cache(tuple(layers), positions, jnp.zeros((), jnp.int32))


def write_layer(layer: LayerCache, k: jax.Array, v: jax.Array, slot: jax.Array) -> LayerCache:
    """The layer with new keys and values [B, T, K, H] in slots slot..slot+T-1."""
    start = (0, 0, slot, 0)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return LayerCache(
        jax.lax.dynamic_update_slice(layer.k, k.astype(layer.k.dtype), start),
        jax.lax.dynamic_update_slice(layer.v, v.astype(layer.v.dtype), start),
    )


def write_positions(cache: Cache, positions: jax.Array) -> jax.Array:
    """Slot positions [B, S] after writing the positions [B, T] of new tokens."""
    return jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))


def bytes_held(cache: Cache) -> int:
    """Bytes that the keys, values and positions occupy, read from the arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
