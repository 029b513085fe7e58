"""Decode attention over ragged ranges of a pool and a dense tail, for NVIDIA Hopper.

A program takes every sixteenth block of 32 entries of one KV head, first of its range of the pool,
then of its tail, through a ring in shared memory. Each warp takes every fourth entry and keeps a
softmax of its own on the scalar units, where numbers stay float32; the four are merged at the end,
and the sixteen programs of a head by XLA. So the order of sums depends on the head's own entries
alone. A block is copied whole: up to 31 entries more than there are, never multiplied.

XLA's form of the same (xla.py), compiled for an H100, reads a chunk of every head, writes its keys
and values in float32 and reads these again: five times the bytes of a bfloat16 pool, and a step of
a loop for each chunk. Here they are read once; the parts of a head, written and read, come to 8 %
of them at 1600 entries, and to more for fewer. These are bytes of compiled programs, not times.
Left out: several query positions, and more than eight queries a KV head, which are for the matrix
units.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

OLDEST = (0, 12)
ALIGNMENT = 16
BLOCK = 32  # a run of 128 bytes of positions, the least that a warpgroup copies
SPLITS = 16  # programs a head: with eight heads as good as one for each multiprocessor of an H100
MOST_QUERIES = 8
HEAD_SIZES = (64, 128)
_WARPS, _LANES = 4, 32
_DEPTH = 3
_AT_ONCE = 16  # entries between two corrections of the sums
_UNSEEN = -1e30
_OVER = plgpu.OOBFillMode.ZEROS  # past the end of an array, where nothing counts


class _State(NamedTuple):
    """Of one query, for each warp: largest score, sum of weights [4], and of values [4, H]."""

    most: Any
    total: Any
    sums: Any


def obstacle(q: Any, entries: Any, tail_k: Any, starts: Any) -> str | None:
    """Why this kernel cannot serve these arrays; None where it can.

    That starts [B, K] are multiples of `ALIGNMENT` is for the caller to see to: they are data.
    """
    H, M, queries = q.shape[-1], tail_k.shape[-2], q.shape[2] / starts.shape[1]
    if jax.__version_info__ < OLDEST:
        return f"it is written for Mosaic GPU of jax 0.12 on, and this is jax {jax.__version__}"
    if q.shape[1] != 1:
        return f"there are {q.shape[1]} queries a row, and it serves one"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the queries are {q.dtype}, and it reads bfloat16 and float32"
    if entries.dtype not in (jnp.bfloat16, jnp.float32) or tail_k.dtype != entries.dtype:
        return (
            f"the pool is {entries.dtype} and the tail {tail_k.dtype}, and it reads both in "
            "bfloat16 or both in float32"
        )
    if H not in HEAD_SIZES:
        return f"the head size is {H}, and it serves {' and '.join(map(str, HEAD_SIZES))}"
    if queries not in range(1, MOST_QUERIES + 1):
        return f"{queries:g} queries share a KV head, and it serves 1 to {MOST_QUERIES}"
    for what, size in (("pool has {} rows", len(entries)), ("tail has {} slots", M)):
        if size < BLOCK or size % ALIGNMENT:
            return (
                f"the {what.format(size)}: round them up to a multiple of {ALIGNMENT}, {BLOCK} "
                "at least"
            )
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
) -> jax.Array:
    """Attention [B, 1, N, H] of q [B, 1, N, H] over each head's range of the pool and its tail.

    entries [E, 2H], keys beside values; positions [E]; starts (multiples of `ALIGNMENT`), lengths
    [B, K]; tail_k, tail_v [B, K, M, H] or [B*K, M, H]; query_positions [B, 1]; tail_positions
    [B, M]. Raises NotImplementedError, with the reason, for what is not served.
    """
    reason = obstacle(q, entries, tail_k, starts)
    if reason is not None:
        raise NotImplementedError(f"the GPU kernel of ragged_decode cannot run: {reason}")
    (_, _, N, H), (B, K), M = q.shape, starts.shape, tail_k.shape[-2]
    heads, G = B * K, N // K
    scaled = q.astype(jnp.float32).reshape(heads, G, 1, H) * H**-0.5
    # A copy for each warp, so that queries lie in registers as entries do.
    repeated = jnp.broadcast_to(scaled, (heads, G, _WARPS, H))
    slots = jnp.arange(1, M + 1, dtype=jnp.int32)[None, :]
    used = jnp.max(jnp.where(tail_positions >= 0, slots, 0), axis=1)
    told = [starts.reshape(-1), lengths.reshape(-1), used, query_positions[:, 0]]
    tails = [x.reshape(heads, M, H) for x in (tail_k, tail_v)]
    body = functools.partial(_attend, K=K, window=window, softcap=softcap)
    sums, rest = _kernel(body, heads, G, H, entries, M)(
        *told, repeated, entries, positions, *tails, tail_positions
    )
    return _merged(sums, rest[..., 0], rest[..., 1]).reshape(q.shape).astype(q.dtype)


def _kernel(body: Any, heads: int, G: int, H: int, entries: Any, M: int) -> Any:
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((SPLITS, heads, G, H), jnp.float32),
            jax.ShapeDtypeStruct((SPLITS, heads, G, 2), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((_DEPTH, BLOCK, H), entries.dtype),
            plgpu.SMEM((_DEPTH, BLOCK, H), entries.dtype),
            plgpu.SMEM((_DEPTH, BLOCK), jnp.int32),
            plgpu.SMEM((G, _WARPS, H), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=_DEPTH),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(SPLITS, heads),
        grid_names=("split", "head"),
        kernel_name="ragged_decode",
        cost_estimate=cost(heads, G, H, entries, M),
        compiler_params=plgpu.CompilerParams(
            # Layouts are said below, not inferred. The one order that matters, reading a block
            # before a copy overwrites it, is said too, once a block.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )


def cost(heads: int, G: int, H: int, entries: Any, M: int) -> pl.CostEstimate:
    """Of the whole pool and tail: counts are data, so the most there can be."""
    rows = entries.shape[0] + heads * M
    moved = rows * (2 * H * entries.dtype.itemsize + 4) + 4 * SPLITS * heads * G * (H + 2)
    return pl.CostEstimate(flops=4 * G * H * rows, transcendentals=G * rows, bytes_accessed=moved)


def _merged(sums: jax.Array, most: jax.Array, total: jax.Array) -> jax.Array:
    """Attention [heads, G, H] of the parts [SPLITS, heads, G, ..] of every head."""
    factor = jnp.exp(most - jnp.max(most, axis=0, keepdims=True))
    whole = jnp.sum(total * factor, axis=0)
    summed = jnp.sum(sums * factor[..., None], axis=0)
    return summed / jnp.where(whole == 0, 1.0, whole)[..., None]


def _attend(*refs: Any, K: int, window: int | None, softcap: float | None) -> None:
    """One program: its part of the blocks of a KV head."""
    starts, lengths, used, query, q, *arrays = refs[:10]
    out, rest, *stages, queries, barriers, ready = refs[10:]
    split, h = lax.axis_index("split"), lax.axis_index("head")
    b, (G, _, H) = lax.div(h, K), queries.shape
    plgpu.copy_gmem_to_smem(q.at[h], queries, ready)
    now, held, slots = query[b], lengths[h], used[b]
    pool = lax.div(held + (BLOCK - 1), BLOCK)
    mine = lax.div(pool + lax.div(slots + (BLOCK - 1), BLOCK) - split + (SPLITS - 1), SPLITS)
    take = _ring(arrays, stages, barriers, (h, b, starts[h], pool), split, mine)
    plgpu.barrier_wait(ready)
    layout = _layout(H)
    vectors = [plgpu.layout_cast(queries[g], layout) for g in range(G)]

    def of_block(i: Any, states: Any) -> Any:
        slot, block = take(i), split + i * SPLITS
        count = jnp.where(block < pool, held - block * BLOCK, slots - (block - pool) * BLOCK)
        for first in range(0, BLOCK, _AT_ONCE):
            rows = _rows(stages, slot, first, count, now, window, layout)
            states = [
                _absorbed(state, vector, rows, softcap, layout)
                for state, vector in zip(states, vectors, strict=True)
            ]
        return states

    states = lax.fori_loop(0, mine, of_block, [_nothing(H, layout)] * G)
    for g, state in enumerate(states):
        sums, most, total = _of_warps(state, layout)
        out[split, h, g] = sums
        rest[split, h, g, 0] = most
        rest[split, h, g, 1] = total


def _ring(
    arrays: Any, stages: Any, barriers: Any, head: tuple[Any, ...], split: Any, mine: Any
) -> Any:
    """Starts to copy this program's blocks; what awaits one, and gives its slot."""
    entries, positions, tail_k, tail_v, tail_positions = arrays
    h, b, start, pool = head
    H = tail_k.shape[-1]

    def copy(i: Any) -> None:
        slot, block = lax.rem(i, _DEPTH), split + i * SPLITS

        def bring(*sources: Any) -> None:
            for source, stage in zip(sources, stages, strict=True):
                barrier = barriers.at[slot]
                plgpu.copy_gmem_to_smem(source, stage.at[slot], barrier, oob_mode=_OVER)

        @pl.when(block < pool)
        def _() -> None:
            rows = pl.ds(start + block * BLOCK, BLOCK)
            keys, values = entries.at[rows, pl.ds(0, H)], entries.at[rows, pl.ds(H, H)]
            bring(keys, values, positions.at[rows])

        @pl.when(block >= pool)
        def _() -> None:
            rows = pl.ds((block - pool) * BLOCK, BLOCK)
            bring(tail_k.at[h, rows], tail_v.at[h, rows], tail_positions.at[b, rows])

    def take(i: Any) -> Any:
        slot, later = lax.rem(i, _DEPTH), i + (_DEPTH - 1)
        plgpu.barrier_wait(barriers.at[slot])

        @pl.when(later < mine)
        def _() -> None:
            plgpu.commit_smem()  # all have read the block before i, which this copy overwrites
            copy(later)

        return slot

    lax.fori_loop(0, jnp.minimum(mine, _DEPTH - 1), lambda i, _: copy(i), None)
    return take


def _rows(
    stages: Any, slot: Any, first: int, count: Any, now: Any, window: int | None, layout: Any
) -> list[tuple[Any, Any, Any]]:
    """Entries first, first + 1, .. of a block, four at a time: keys, values, and which are seen."""
    keys, values, positions = (stage.at[slot] for stage in stages)
    shape, narrow, found = (_WARPS, keys.shape[-1]), layout.reduce(1), []
    for four in range(first, first + _AT_ONCE, _WARPS):
        rows = pl.ds(four, _WARPS)
        k, v = (plgpu.layout_cast(x[rows], layout).astype(jnp.float32) for x in (keys, values))
        position = plgpu.layout_cast(positions[rows], narrow)
        place = plgpu.broadcasted_iota(jnp.int32, (_WARPS,), 0, layout=narrow) + four
        seen = (place < count) & (position >= 0) & (position <= now)
        if window is not None:
            seen &= position > now - window
        # What lies beyond the count may be NaN, which zero times does not remove.
        there = _wide(seen.astype(jnp.float32), shape, layout) != 0.0
        found.append((k, jnp.where(there, v, 0.0), seen))
    return found


def _absorbed(
    state: _State, q: Any, rows: list[tuple[Any, Any, Any]], softcap: float | None, layout: Any
) -> _State:
    """The state of one query after these entries."""
    most, scores = state.most, []
    for k, _, seen in rows:
        score = jnp.sum(q * k, axis=1)
        if softcap is not None:
            # tanh x = 1 - 2 / (exp 2x + 1), which holds where exp overflows.
            score = softcap * (1.0 - 2.0 / (jnp.exp(score * (2.0 / softcap)) + 1.0))
        scores.append(jnp.where(seen, score, _UNSEEN))
        most = jnp.maximum(most, scores[-1])
    shrunk = jnp.exp(state.most - most)
    total, sums = state.total * shrunk, state.sums * _wide(shrunk, q.shape, layout)
    for score, (_, v, seen) in zip(scores, rows, strict=True):
        weight = jnp.where(seen, jnp.exp(score - most), 0.0)
        total, sums = total + weight, sums + _wide(weight, q.shape, layout) * v
    return _State(most, total, sums)


def _nothing(H: int, layout: Any) -> _State:
    def full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    one = layout.reduce(1)
    return _State(
        full((_WARPS,), _UNSEEN, one), full((_WARPS,), 0.0, one), full((_WARPS, H), 0.0, layout)
    )


def _of_warps(state: _State, layout: Any) -> tuple[Any, Any, Any]:
    """One softmax of those of the four warps: sums [H], largest score and total."""
    most = jnp.max(state.most)
    factor = jnp.exp(state.most - most)
    sums = jnp.sum(state.sums * _wide(factor, state.sums.shape, layout), axis=0)
    return sums, most, jnp.sum(state.total * factor)


def _layout(H: int) -> Any:
    """Four entries [4, H] in registers: one a warp, lanes along it."""
    vector = H // _LANES
    tiling = plgpu.Tiling(((_WARPS, _LANES * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _wide(one: Any, shape: tuple[int, int], layout: Any) -> Any:
    """A number an entry, repeated along it."""
    return plgpu.layout_cast(lax.broadcast_in_dim(one, shape, (0,)), layout)
