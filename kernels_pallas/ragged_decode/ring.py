"""How blocks of the pool and of the tails reach the TPU kernel: a ring of buffers, and its copies.

The steps of a head are the blocks of its range of the pool, one at least, then those of its tail
from the first seen slot on. Copies run ahead of the work, over the end of one head into the next. A
last, partial block comes in pieces of 256, 128, .. 16 rows: at most 15 rows that are not asked for,
and none past the end of an array. What is computed of them is in tpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ALIGNMENT = 16  # rows of a tile of 16-bit values: every copy starts at and spans whole tiles
BLOCK = 256
# Buffers in the ring: three blocks on their way while one is worked, 384 KB at H = 128 in bfloat16.
# The latency of a copy asks for as much at the bandwidth of these chips; reckoned, not measured.
DEPTH = 4
POSITION_ROWS = BLOCK // LANES + 1  # of 128 positions, that a block which is not aligned may touch
_PIECES = tuple(BLOCK >> n for n in range((BLOCK // ALIGNMENT).bit_length()))


class Reading(NamedTuple):
    """What every program is told; numbers that never recompile it."""

    starts: Any  # [heads]
    lengths: Any  # [heads]
    first: Any  # [B], the block of the tail with its first seen slot
    end: Any  # [B], one past the last seen slot of the tail
    query: Any  # [B], its position


class Memory(NamedTuple):
    """The arrays that are copied from, the rings they are copied to, and the place reached."""

    entries: Any
    positions: Any  # [rows, 1, 128], read where there is a window
    tail_k: Any
    tail_v: Any
    ring: Any
    ring_k: Any
    ring_v: Any
    ring_positions: Any
    sem: Any
    ahead: Any  # head, step and slot of the next copies to start, and the slot to be worked next
    windowed: bool


def scratch(H: int, pool: Any, tail: Any) -> list[Any]:
    """The rings and the place reached, for keys of H values in these dtypes."""
    return [
        pltpu.VMEM((DEPTH, BLOCK, 2 * H), pool),
        pltpu.VMEM((DEPTH, BLOCK, H), tail),
        pltpu.VMEM((DEPTH, BLOCK, H), tail),
        pltpu.VMEM((DEPTH, POSITION_ROWS, 1, LANES), jnp.int32),
        pltpu.SemaphoreType.DMA((DEPTH,)),
        pltpu.SMEM((4,), jnp.int32),
    ]


def steps(read: Reading, h: Any, K: int) -> tuple[Any, Any]:
    """Steps of head h in the pool, and with those in its tail."""
    b = lax.div(h, K)
    pool = jnp.maximum(pl.cdiv(read.lengths[h], BLOCK), 1)
    return pool, pool + jnp.maximum(pl.cdiv(read.end[b], BLOCK) - read.first[b], 0)


def taker(read: Reading, memory: Memory, K: int) -> Callable[[Any], Any]:
    """What gives, step by step of this program's head, the slot whose blocks have arrived."""
    h, ahead = pl.program_id(0), memory.ahead

    @pl.when(h == 0)
    def _() -> None:
        for i in range(4):
            ahead[i] = 0
        lax.fori_loop(0, DEPTH - 1, lambda *_: _start_next(read, memory, K), None)

    def take(step: Any) -> Any:
        _start_next(read, memory, K)  # into the slot of the step before, which has been worked
        slot = ahead[3]
        ahead[3] = lax.rem(slot + 1, DEPTH)
        _copies(read, memory, K, (h, step, slot), lambda copy: copy.wait())
        return slot

    return take


def _start_next(read: Reading, memory: Memory, K: int) -> None:
    ahead = memory.ahead
    head, step, slot = ahead[0], ahead[1], ahead[2]

    @pl.when(head < read.starts.shape[0])
    def _() -> None:
        _copies(read, memory, K, (head, step, slot), lambda copy: copy.start())
        last = step + 1 == steps(read, head, K)[1]
        ahead[0] = jnp.where(last, head + 1, head)
        ahead[1] = jnp.where(last, 0, step + 1)
        ahead[2] = lax.rem(slot + 1, DEPTH)


def _copies(
    read: Reading, memory: Memory, K: int, place: tuple[Any, Any, Any], act: Callable[[Any], None]
) -> None:
    """act(copy) for every copy of a head's step into a slot of the ring."""
    h, step, slot = place
    b, pool = lax.div(h, K), steps(read, h, K)[0]

    @pl.when(step < pool)
    def _() -> None:
        start = pl.multiple_of(read.starts[h] + step * BLOCK, ALIGNMENT)
        count = read.lengths[h] - step * BLOCK
        _in_pieces([(memory.entries, memory.ring)], start, count, slot, memory.sem, act)
        if memory.windowed:
            rows = memory.positions.at[pl.ds(position_row(memory, start), POSITION_ROWS)]
            target = memory.ring_positions.at[slot]
            copy = pltpu.make_async_copy(rows, target, memory.sem.at[slot])
            pl.when(count > 0)(lambda: act(copy))

    @pl.when(step >= pool)
    def _() -> None:
        start = pl.multiple_of((read.first[b] + step - pool) * BLOCK, BLOCK)
        tails = [(memory.tail_k.at[h], memory.ring_k), (memory.tail_v.at[h], memory.ring_v)]
        _in_pieces(tails, start, read.end[b] - start, slot, memory.sem, act)


def position_row(memory: Memory, start: Any) -> Any:
    """The row of 128 positions from which on those of a block that begins at `start` are read."""
    return jnp.minimum(lax.div(start, LANES), memory.positions.shape[0] - POSITION_ROWS)


def _in_pieces(
    pairs: list[tuple[Any, Any]],
    start: Any,
    count: Any,
    slot: Any,
    sem: Any,
    act: Callable[[Any], None],
) -> None:
    """act(copy) for pieces that make up `count` rows, a block at most, rounded up to whole tiles.

    pairs: an array and the ring it goes to, at the same place in each.
    """
    rounded = jnp.bitwise_and(jnp.clip(count, 0, BLOCK) + (ALIGNMENT - 1), -ALIGNMENT)
    for size in _PIECES:
        if size > pairs[0][0].shape[0]:
            continue
        done = pl.multiple_of(jnp.bitwise_and(rounded, -2 * size), ALIGNMENT)

        @pl.when(jnp.bitwise_and(rounded, size) != 0)
        def _(done: Any = done, size: int = size) -> None:
            for source, ring in pairs:
                piece, target = source.at[pl.ds(start + done, size)], ring.at[slot]
                act(pltpu.make_async_copy(piece, target.at[pl.ds(done, size)], sem.at[slot]))
