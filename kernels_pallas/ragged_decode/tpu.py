"""Decode attention over ragged ranges of a pool and a dense tail, as one Pallas kernel for TPU.

A program attends for one KV head: the blocks of its range of the pool, then the occupied blocks of
its tail, with an online softmax in float32. How they arrive is in ring.py. The order of sums of a
head depends on the length of its range and the slots of its tail alone. Left out: several query
positions, which are for XLA.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.ragged_decode.ring import (
    ALIGNMENT,
    BLOCK,
    LANES,
    POSITION_ROWS,
    Memory,
    Reading,
    position_row,
    scratch,
    steps,
    taker,
)

_UNSEEN = -1e30
_DTYPES = (jnp.bfloat16, jnp.float32)


class _State(NamedTuple):
    """Softmax over what has been seen: largest score, weights [G, 1], weighted sums [G, H]."""

    most: Any
    total: Any
    sums: Any


def obstacle(q: Any, entries: Any, tail_k: Any, starts: Any) -> str | None:
    """Why this kernel cannot serve these arrays; None where it can.

    That starts [B, K] are multiples of `ALIGNMENT` is for the caller to see to: they are data.
    """
    H, (E, width), M = q.shape[-1], entries.shape, tail_k.shape[-2]
    if q.shape[1] != 1:
        return f"there are {q.shape[1]} queries a row, and it serves one"
    for name, array in (("queries", q), ("pool", entries), ("tail", tail_k)):
        if array.dtype not in _DTYPES and not (name == "tail" and array.dtype == jnp.uint16):
            return f"the {name} is {array.dtype}, and it reads bfloat16 and float32"
    if width != 2 * H or width % LANES:
        return f"a pool row of {width} values is not the 2 x H of H a multiple of {LANES // 2}"
    if not E or E % ALIGNMENT:
        return f"the pool has {E} rows: round them up to a multiple of {ALIGNMENT}"
    if not M or M % ALIGNMENT:
        return f"the tail has {M} slots: round its capacity up to a multiple of {ALIGNMENT}"
    if q.shape[2] % starts.shape[1]:
        return f"{q.shape[2]} query heads cannot share {starts.shape[1]} KV heads evenly"
    return None


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
    interpret: Any = False,
) -> jax.Array:
    """Attention [B, 1, N, H] of q [B, 1, N, H] over each head's range of the pool and its tail.

    entries [E, 2H], keys beside values; positions [E]; starts (multiples of `ALIGNMENT`), lengths
    [B, K]; tail_k, tail_v [B, K, M, H] or [B*K, M, H]; query_positions [B, 1]; tail_positions
    [B, M]. A pool entry of a range is taken to be earlier than the query: its position is read only
    with a sliding window. Raises NotImplementedError, with the reason, for what is not served.
    """
    reason = obstacle(q, entries, tail_k, starts)
    if reason is not None:
        raise NotImplementedError(f"the TPU kernel of ragged_decode cannot run: {reason}")
    (B, _, N, H), (M, _), K = q.shape, tail_k.shape[-2:], starts.shape[1]
    seen, first, end = _tail(query_positions, tail_positions, window)
    told = Reading(starts.reshape(-1), lengths.reshape(-1), first, end, query_positions[:, 0])
    # Without a window they are not read.
    rows = _rows_of_positions(positions if window is not None else positions[:0])
    tails = [_numbers(x).reshape(B * K, M, H) for x in (tail_k, tail_v)]
    kernel = functools.partial(_attend, K=K, window=window, softcap=softcap)
    grouped = q.reshape(B * K, N // K, H)
    return _call(kernel, told, grouped, seen, [entries, rows, *tails], interpret).reshape(q.shape)


def cost(q: Any, entries: Any, tail_k: Any) -> pl.CostEstimate:
    """Of q [B*K, G, H] over the whole pool and tail: counts are data, so the most there can be."""
    heads, G, H = q.shape
    keys = entries.shape[0] + heads * tail_k.shape[-2]
    moved = 2 * H * (entries.shape[0] * entries.dtype.itemsize)
    moved += 2 * tail_k.size * tail_k.dtype.itemsize + 2 * q.size * q.dtype.itemsize
    return pl.CostEstimate(flops=4 * G * H * keys, transcendentals=G * keys, bytes_accessed=moved)


def _tail(
    query: jax.Array, positions: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Seen slots [B, 1, M up to whole blocks] as 0 and 1; per row, the first block, and the end."""
    M = positions.shape[1]
    distance = query - positions
    seen = (positions >= 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    slots = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), seen.shape)
    end = jnp.max(jnp.where(seen, slots + 1, 0), axis=1)
    first = jnp.min(jnp.where(seen, slots, end[:, None]), axis=1) // BLOCK
    padded = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, -M % BLOCK)))
    return padded[:, None, :], first, end


def _numbers(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _rows_of_positions(positions: jax.Array) -> jax.Array:
    """positions [E] as [rows, 1, 128], of which a copy may start at any row."""
    E = positions.shape[0]
    size = max(pl.cdiv(E, LANES), POSITION_ROWS) * LANES
    held = positions if size == E else jnp.pad(positions, (0, size - E), constant_values=-1)
    return held.reshape(-1, 1, LANES)


def _call(
    kernel: Any, told: Reading, q: jax.Array, seen: jax.Array, held: list[jax.Array], interpret: Any
) -> jax.Array:
    """out [B*K, G, H] of q alike, seen [B, 1, slots], and the pool, its positions and the tails."""
    heads, G, H = q.shape
    K = heads // seen.shape[0]
    # Where a key is half a tile wide, a row is multiplied whole, its value by zeros.
    wide = q if H % LANES == 0 else jnp.pad(q, ((0, 0), (0, 0), (0, H)))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(told),
        grid=(heads,),
        in_specs=[
            pl.BlockSpec((None, *wide.shape[1:]), lambda h, *_: (h, 0, 0)),
            pl.BlockSpec((None, *seen.shape[1:]), lambda h, *_: (lax.div(h, K), 0, 0)),
            *[pl.BlockSpec(memory_space=pl.ANY)] * len(held),
        ],
        out_specs=pl.BlockSpec((None, G, H), lambda h, *_: (h, 0, 0)),
        scratch_shapes=scratch(H, held[0].dtype, held[-1].dtype),
    )
    call = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=spec,
        # One head after another: the ring runs on from each into the next.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(q, held[0], held[-1]),
        interpret=interpret,
    )
    if interpret:
        return call(*told, wide, seen, *held)

    def pinned(told: Reading, wide: Any, seen: Any, pool: list[Any], tails: list[Any]) -> Any:
        # Else XLA, to which the call reads all of it, may bring the whole pool to VMEM every time.
        pool = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in pool]
        return call(*told, wide, seen, *pool, *tails)

    return jax.jit(pinned)(told, wide, seen, held[:2], held[2:])


def _attend(*refs: Any, K: int, window: int | None, softcap: float | None) -> None:
    """One program: the attention [G, H] of the queries [G, H or 2H] of one KV head."""
    told = len(Reading._fields)
    read, (q, seen) = Reading(*refs[:told]), refs[told : told + 2]
    *arrays, out = refs[told + 2 : told + 7]
    memory = Memory(*arrays, *refs[told + 7 :], windowed=window is not None)
    h, (G, H) = pl.program_id(0), out.shape
    b, (pool, end) = lax.div(h, K), steps(read, h, K)
    take = taker(read, memory, K)

    def of_pool(step: Any, state: _State) -> _State:
        slot, count = take(step), read.lengths[h] - step * BLOCK
        rows = _cleared(memory.ring[slot], count)
        visible = lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) < count
        if window is not None:
            start = read.starts[h] + step * BLOCK
            visible &= _in_window(memory, slot, start, read.query[b], window)
        keys, values = (rows[:, :H], rows[:, H:]) if H % LANES == 0 else (rows, rows)
        return _absorbed(state, q[...], keys, values, visible, H, softcap)

    def of_tail(step: Any, state: _State) -> _State:
        slot, start = take(step), (read.first[b] + step - pool) * BLOCK
        visible = seen[:, pl.ds(pl.multiple_of(start, BLOCK), BLOCK)] != 0
        values = _cleared(memory.ring_v[slot], read.end[b] - start)
        return _absorbed(state, q[:, :H], memory.ring_k[slot], values, visible, H, softcap)

    most, total = jnp.full((G, 1), _UNSEEN), jnp.zeros((G, 1), jnp.float32)
    sums = jnp.zeros((G, H if H % LANES == 0 else 2 * H), jnp.float32)
    state = lax.fori_loop(0, pool, of_pool, _State(most, total, sums))
    state = state._replace(sums=state.sums[:, -H:])  # of a row multiplied whole, the value's part
    state = lax.fori_loop(pool, end, of_tail, state)
    out[...] = (state.sums / jnp.where(state.total == 0, 1.0, state.total)).astype(out.dtype)


def _in_window(memory: Memory, slot: Any, start: Any, query: Any, window: int) -> Any:
    """Which of a block [1, BLOCK] that begins at row `start` of the pool are inside the window."""
    rows = memory.ring_positions[slot]
    width = POSITION_ROWS * LANES
    flat = jnp.concatenate([rows[i] for i in range(POSITION_ROWS)], axis=1)
    back = start - position_row(memory, start) * LANES
    turned = pltpu.roll(jnp.broadcast_to(flat, (8, width)), lax.rem(width - back, width), 1)
    positions = turned[:1, :BLOCK]
    distance = query - positions
    return (positions >= 0) & (distance >= 0) & (distance < window)


def _cleared(rows: Any, count: Any) -> Any:
    """The rows [BLOCK, H] from `count` on set to zero, so that nothing unread can be multiplied."""
    index = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where(index < count, rows, jnp.zeros((), rows.dtype))


def _absorbed(
    state: _State, q: Any, keys: Any, values: Any, visible: Any, H: int, softcap: float | None
) -> _State:
    """The state after keys and values [BLOCK, H or 2H], of which `visible` [1, BLOCK] are seen."""
    dtype = jnp.promote_types(q.dtype, keys.dtype)
    scores = _dot(q.astype(dtype), keys.astype(dtype), 1) * H**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    most = jnp.maximum(
        state.most, jnp.max(jnp.where(visible, scores, _UNSEEN), axis=1, keepdims=True)
    )
    weights = jnp.where(visible, jnp.exp(scores - most), 0.0)
    shrunk = jnp.exp(state.most - most)
    return _State(
        most,
        state.total * shrunk + jnp.sum(weights, axis=1, keepdims=True),
        state.sums * shrunk + _dot(weights.astype(dtype), values.astype(dtype), 0),
    )


def _dot(a: Any, b: Any, contracted: int) -> Any:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=exact, preferred_element_type=jnp.float32)
