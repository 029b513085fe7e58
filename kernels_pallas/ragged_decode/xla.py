"""Attention over ranges of a pool and a tail through XLA, reading the ranges and no other row.

All heads advance together, a chunk of each at a time, as often as the longest one needs, with a
softmax that is corrected as it goes. A head that has come to its end adds exact zeros, so its
result does not depend on how long the others are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 256  # entries of a head taken at a time


class _Queries(NamedTuple):
    """Scaled queries [B, K, T*G, H] in float32, and what each may see."""

    values: jax.Array
    positions: jax.Array  # [B, T*G]
    window: int | None
    softcap: float | None


class _State(NamedTuple):
    """The softmax so far: largest score, sum of weights [B, K, T*G], and values [.., H]."""

    top: jax.Array
    total: jax.Array
    values: jax.Array


class _Chunk(NamedTuple):
    """Keys and values [B, K, C, H] in float32 with their positions [B, K, C], -1 for none."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


def ragged_decode(
    q: jax.Array,
    entries: jax.Array,
    positions: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    query_positions: jax.Array,
    tail_positions: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention [B, T, N, H] of q [B, T, N, H] in its dtype; zeros where nothing is seen.

    entries [E, 2H] (key | value), positions [E], starts and lengths [B, K], tail_k and tail_v
    [B, K, M, H], query_positions [B, T], tail_positions [B, M]; entries and tail may be bfloat16
    bits as uint16.
    """
    B, T, N, H = q.shape
    K = starts.shape[1]
    scaled = q.astype(jnp.float32) * H**-0.5
    grouped = scaled.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    queries = _Queries(grouped, jnp.repeat(query_positions, N // K, axis=1), window, softcap)
    shape = grouped.shape[:3]
    lowest = jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32)
    zeros = jnp.zeros(shape, jnp.float32)
    state = _State(lowest, zeros, jnp.zeros(grouped.shape, jnp.float32))
    if len(entries):

        def of_pool(first: jax.Array, size: int) -> _Chunk:
            return _pool_chunk(entries, positions, starts, lengths, first, size)

        state = _over(queries, state, of_pool, len(entries), jnp.max(lengths))
    if M := tail_k.shape[2]:

        def of_tail(first: jax.Array, size: int) -> _Chunk:
            return _tail_chunk(tail_k, tail_v, tail_positions, first, size)

        used = jnp.max(jnp.where(tail_positions >= 0, jnp.arange(1, M + 1)[None, :], 0))
        state = _over(queries, state, of_tail, M, used)
    out = state.values / jnp.where(state.total > 0, state.total, 1.0)[..., None]
    return out.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def _over(
    queries: _Queries,
    state: _State,
    chunk: Callable[[jax.Array, int], _Chunk],
    most: int,
    used: jax.Array,
) -> _State:
    """The state after the first `used` entries of every head, of which there are at most `most`."""
    size = min(CHUNK, most)
    if size == most:
        return _absorbed(queries, state, chunk(jnp.int32(0), size))

    def unfinished(carry: tuple[jax.Array, _State]) -> jax.Array:
        return carry[0] < used

    def advanced(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        first, before = carry
        return first + size, _absorbed(queries, before, chunk(first, size))

    return jax.lax.while_loop(unfinished, advanced, (jnp.int32(0), state))[1]


def _absorbed(queries: _Queries, state: _State, chunk: _Chunk) -> _State:
    """The state with one more chunk."""
    scores = jnp.einsum("BKQH,BKCH->BKQC", queries.values, chunk.keys)
    if queries.softcap is not None:
        scores = queries.softcap * jnp.tanh(scores / queries.softcap)
    distance = queries.positions[:, None, :, None] - chunk.positions[:, :, None, :]
    seen = (chunk.positions[:, :, None, :] >= 0) & (distance >= 0)
    if queries.window is not None:
        seen &= distance < queries.window
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    kept = jnp.exp(state.top - top)
    values = jnp.einsum("BKQC,BKCH->BKQH", weights, chunk.values)
    return _State(
        top,
        state.total * kept + jnp.sum(weights, axis=-1),
        state.values * kept[..., None] + values,
    )


def _pool_chunk(
    entries: jax.Array,
    positions: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    size: int,
) -> _Chunk:
    """Entries first .. first + size - 1 of every head [B, K]."""
    begin = jnp.clip(starts + first, 0, len(entries) - size)  # the pool's last chunk moves back
    entries, begin = _kept_in_loop(entries, begin)
    rows = begin[..., None] + jnp.arange(size)[None, None, :]
    cut = jax.vmap(jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(entries, at, size)))(begin)
    held = jax.vmap(jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(positions, at, size)))(begin)
    within = (rows >= (starts + first)[..., None]) & (rows < (starts + lengths)[..., None])
    keys, values = jnp.split(cut, 2, axis=-1)
    return _clean(keys, values, jnp.where(within, held, -1))


def _tail_chunk(
    tail_k: jax.Array, tail_v: jax.Array, tail_positions: jax.Array, first: jax.Array, size: int
) -> _Chunk:
    """Slots first .. first + size - 1 of every row's tail."""
    B, K, M, _ = tail_k.shape
    tail_k, tail_v, begin = _kept_in_loop(tail_k, tail_v, jnp.minimum(first, M - size))
    keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=2) for x in (tail_k, tail_v))
    held = jax.lax.dynamic_slice_in_dim(tail_positions, begin, size, axis=1)
    held = jnp.where((begin + jnp.arange(size) >= first)[None, :], held, -1)
    return _clean(keys, values, jnp.broadcast_to(held[:, None, :], (B, K, size)))


def _kept_in_loop(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, of which XLA then prepares nothing before the loop.

    Its CPU backend (jax 0.10) would convert all of a bfloat16 pool to float32 there. The last one
    changes in the loop and ties the others to it.
    """
    return jax.lax.optimization_barrier(arrays)


def _clean(keys: jax.Array, values: jax.Array, positions: jax.Array) -> _Chunk:
    """Keys and values as float32; a row without a position may hold NaN, which zero times keeps."""
    used = (positions >= 0)[..., None]
    keys, values = (jnp.where(used, _numbers(x), 0.0) for x in (keys, values))
    return _Chunk(keys, values, positions)


def _numbers(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(jnp.float32)
