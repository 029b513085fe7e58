"""Caches of contexts that nobody ran: random keys and values, whole or evicted, ready to decode.

A decode step's time does not depend on what the cache holds, and prefilling 32k tokens on a CPU
takes many minutes. Leaves out timing (`bench_kv.py`).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax.buckets import bucket
from popjax.config import ModelConfig
from popjax.eviction import KvMethod, pool
from popjax.eviction.method import budgeted, counts, seen_later
from popjax.generate import PROGRAMS, DecodeState, Options
from popjax.methods import Method
from popjax.nn.transformer import Inputs
from popjax.sampling import SamplingConfig, row_keys
from popjax.sparsity import Params, Partitions


def uneven_lengths(method: KvMethod, config: ModelConfig, tokens: int, seed: int = 0) -> np.ndarray:
    """Entries [L, K] that a method might keep of `tokens`: its exact total, unevenly spread.

    Shares of layers and heads are log-normal; none is below what always stays, or above `tokens`.
    """
    rng = np.random.default_rng(seed)
    _, (total,) = counts(method, config, [tokens])
    shared = np.asarray(budgeted(config))
    lengths = np.full((config.num_layers, config.layers[0].num_kv_heads), min(method.least, tokens))
    for layer, row, takes_part in zip(config.layers, lengths, shared, strict=True):
        if not takes_part:
            row[:] = seen_later(layer.window, tokens)
    weights = rng.lognormal(size=lengths.shape) * shared[:, None]
    while (left := total - int(lengths.sum())) > 0:
        open_heads = weights * (lengths < tokens)
        share = (open_heads / open_heads.sum()).reshape(-1)
        lengths = np.minimum(lengths + rng.multinomial(left, share).reshape(lengths.shape), tokens)
    return lengths.astype(np.int32)


def random_kept(
    method: KvMethod, config: ModelConfig, tokens: int, dtype: Any, seed: int = 0
) -> kv.Kept:
    """What a method might keep of one prompt of `tokens`, laid out as an eviction would."""
    lengths, align = uneven_lengths(method, config, tokens, seed), pool.alignment("native")
    rows = -(-lengths // align) * align
    starts = np.cumsum(rows).reshape(rows.shape) - rows
    capacity = pool.capacity(int(lengths.sum()) + (align - 1) * lengths.size, align)
    rng, positions = np.random.default_rng(seed), np.full(capacity, -1, np.int32)
    for start, length in zip(starts.flat, lengths.flat, strict=True):
        chosen = rng.choice(tokens, length, replace=False)
        positions[start : start + length] = np.sort(chosen)
    heads = 2 * config.layers[0].head_dim
    entries = jax.random.normal(jax.random.key(seed), (capacity, heads), dtype)
    places = (jnp.asarray(x[:, None], jnp.int32) for x in (starts, lengths))
    return kv.Kept(entries, jnp.asarray(positions), *places)


def random_cache(
    config: ModelConfig, tokens: int, room: int, dtype: Any, seed: int = 0
) -> kv.Cache:
    """A dense cache of one row that holds `tokens` and has `room` for more."""
    cache = kv.empty(config, 1, tokens + room, dtype)
    keys = jax.random.split(jax.random.key(seed), config.num_layers)
    layers = []
    for layer, key in zip(cache.layers, keys, strict=True):
        k, v = (jax.random.normal(one, layer.k.shape, dtype) for one in jax.random.split(key))
        layers.append(kv.LayerCache(k, v))
    return dataclasses.replace(
        cache, layers=tuple(layers), positions=_positions(tokens, room), length=jnp.int32(tokens)
    )


def _positions(tokens: int, room: int) -> jax.Array:
    """Slot positions [1, tokens + room] of a cache whose first `tokens` slots are taken."""
    slots = np.arange(tokens + room, dtype=np.int32)
    return jnp.asarray(np.where(slots < tokens, slots, -1)[None])


class Decoding:
    """Decode steps after a context of `tokens`, timed again and again from the same state.

    The cache is dense, or what a method `kept`. One state is rewound for every run, since it is
    donated: a copy for each would need a second cache beside the first.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokens: int,
        new_tokens: int,
        *,
        options: Options,
        kept: kv.Kept | None = None,
        method: Method | None = None,
        partition: Partitions | None = None,
    ) -> None:
        self.arguments = (params, partition, None, SamplingConfig().values((), config.vocab_size))
        self.static = {"config": config, "method": method or Method(), "options": options}
        self.static["flags"] = SamplingConfig().flags()
        self.tokens, self.new_tokens, self.kept = tokens, new_tokens, kept
        self.held, self.room = tokens if kept is None else 0, bucket(new_tokens)
        dtype = params["embed"]["table"].dtype
        if kept is None:
            cache = random_cache(config, tokens, self.room, dtype)
        else:
            cache = kv.empty(config, 1, self.room, dtype)
        inputs = Inputs(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), tokens - 1, jnp.int32))
        logits, values = jnp.zeros((1, config.vocab_size), jnp.float32), self.arguments[-1]
        flags = {"flags": self.static["flags"], "options": options, "room": self.room}
        self.state: DecodeState = PROGRAMS.start(
            cache, logits, inputs, row_keys(0, 1), None, values, **flags
        )

    def seconds(self) -> float:
        """Seconds a step of new_tokens - 1 steps, compilation aside."""
        positions = _positions(self.held, self.room)
        cache = dataclasses.replace(
            self.state.cache, positions=positions, length=jnp.int32(self.held)
        )
        state = dataclasses.replace(
            self.state,
            step=jnp.int32(1),
            last=jnp.zeros((1,), jnp.int32),
            positions=jnp.full((1,), self.tokens, jnp.int32),
            cache=cache,
        )
        arguments = (state, *self.arguments, self.kept, jnp.int32(self.new_tokens))
        decode = PROGRAMS.decode.compiled(*arguments, **self.static)
        jax.block_until_ready(arguments)
        started = time.perf_counter()
        self.state = decode(*arguments)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - started) / (self.new_tokens - 1)


__all__ = ["Decoding", "random_cache", "random_kept", "uneven_lengths"]
