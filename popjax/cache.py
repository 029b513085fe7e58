"""The key/value cache: made empty, written at a slot, carried in and out of the model.

Keys are stored after rotation, with their true positions; an empty or padding slot has position -1
and is never attended. One slot counter serves the batch, since prompts are left-padded. What
outlived an eviction lies apart, in `Kept`; which entries do is decided in `eviction/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from popjax.config import ModelConfig

_BITS = jnp.uint16


@struct.dataclass
class LayerCache:
    """One layer's keys and values, both [B, K, S, H]: heads outermost, as products read them."""

    k: jax.Array
    v: jax.Array


@struct.dataclass
class Kept:
    """Entries that outlived an eviction, of all layers side by side in one pool.

    entries [E, 2H]: a rotated key and its value; positions [E] int32, those of the prompt. The
    entries of a layer, row and head are `lengths` [L, B, K] rows from `starts` [L, B, K] on, int32.
    One pool, since its size follows from the budget alone: how a budget falls on layers and heads
    is data, and compiles nothing. Rows of a batch may name the same entries.
    """

    entries: jax.Array
    positions: jax.Array
    starts: jax.Array
    lengths: jax.Array

    def layer(self, i: int) -> Kept:
        """The same pool with starts and lengths [B, K] of one layer."""
        return dataclasses.replace(self, starts=self.starts[i], lengths=self.lengths[i])

    def for_rows(self, rows: int) -> Kept:
        """The entries of one row for a batch: all rows name the same ones, none is copied."""
        layers, _, heads = self.starts.shape
        starts, lengths = (
            jnp.broadcast_to(held, (layers, rows, heads)) for held in (self.starts, self.lengths)
        )
        return dataclasses.replace(self, starts=starts, lengths=lengths)


@struct.dataclass
class Cache:
    """The cache of every layer, the position of each slot [B, S] int32, and slots used (scalar).

    After an eviction `kept` holds what is left of the prompt, and the layers only what came since.
    The layers named `emptier` hold nothing of positions before `begin` [B].
    """

    layers: tuple[LayerCache, ...]
    positions: jax.Array
    length: jax.Array
    kept: Kept | None = None
    begin: jax.Array | None = None
    emptier: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def keys_of(self, i: int, positions: jax.Array) -> jax.Array:
        """Slot positions [B, S] as layer i has them."""
        if self.begin is None or i not in self.emptier:
            return positions
        return jnp.where(positions >= self.begin[:, None], positions, -1)

    def kept_of(self, i: int) -> Kept | None:
        """Layer i of `kept`, where there is any."""
        return None if self.kept is None else self.kept.layer(i)


def empty(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of `capacity` slots a row with nothing in it."""
    layers = []
    for layer in config.layers:
        shape = (batch, layer.num_kv_heads, capacity, layer.head_dim)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    positions = jnp.full((batch, capacity), -1, jnp.int32)
    return Cache(tuple(layers), positions, jnp.zeros((), jnp.int32))


def repeated(cache: Cache, rows: int) -> Cache:
    """The cache of one row for a batch of `rows`, each of which goes on for itself."""

    def wide(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (rows, *x.shape[1:]))

    return dataclasses.replace(
        cache,
        layers=jax.tree.map(wide, cache.layers),
        positions=wide(cache.positions),
        kept=None if cache.kept is None else cache.kept.for_rows(rows),
        begin=None if cache.begin is None else wide(cache.begin),
    )


def write_layer(layer: LayerCache, k: jax.Array, v: jax.Array, slot: jax.Array) -> LayerCache:
    """The layer with new keys and values [B, T, K, H] in slots slot..slot+T-1."""

    def written(held: jax.Array, new: jax.Array) -> jax.Array:
        lead = held.shape[:-2]
        new = bits(new.astype(jnp.bfloat16)) if held.dtype == _BITS else new.astype(held.dtype)
        new = new.swapaxes(1, 2).reshape(*lead, new.shape[1], new.shape[3])
        return jax.lax.dynamic_update_slice(held, new, (0,) * len(lead) + (slot, 0))

    # Without the barrier XLA's CPU backend may write each array twice, once for the loop and once
    # into the attention product, and copy the whole cache to keep the two apart.
    return jax.lax.optimization_barrier(LayerCache(written(layer.k, k), written(layer.v, v)))


def merged(cache: Cache, as_bits: bool = True) -> Cache:
    """The cache with keys and values as [B*K, S, H], the form that a decode loop carries.

    In that form the batched products of attention take the carried array itself; from [B, K, S, H]
    XLA's CPU backend (jax 0.10) copies the whole cache four times a step. bfloat16 is carried as
    its bits, uint16: that backend would convert all of it to float32 and back to write one slot.
    Without `as_bits` it stays as it is: on a TPU the change of type is a copy of the whole cache.
    """
    form = bits if as_bits else lambda x: x
    return _reshaped(cache, lambda x: form(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])))


def split(cache: Cache) -> Cache:
    """Inverse of `merged`."""
    batch = cache.positions.shape[0]
    return _reshaped(cache, lambda x: floats(x).reshape(batch, x.shape[0] // batch, *x.shape[1:]))


def floats(x: jax.Array) -> jax.Array:
    """Keys or values as numbers, where a decode loop carries them as bits."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == _BITS else x


def bits(x: jax.Array) -> jax.Array:
    """Inverse of `floats` for bfloat16; other numbers as they are."""
    return jax.lax.bitcast_convert_type(x, _BITS) if x.dtype == jnp.bfloat16 else x


def _reshaped(cache: Cache, form: Callable[[jax.Array], jax.Array]) -> Cache:
    return dataclasses.replace(cache, layers=jax.tree.map(form, cache.layers))


def write_positions(cache: Cache, positions: jax.Array) -> jax.Array:
    """Slot positions [B, S] after writing the positions [B, T] of new tokens."""
    return jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))


def bytes_held(cache: Cache) -> int:
    """Bytes that keys, values, positions and the places of kept entries occupy, from the arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
