"""Products with chosen rows on NVIDIA Hopper, for one list of rows that all vectors share.

    expand:  h[b, i] = x[b] . w[rows[i]]        contract: y[b] = sum over i of h[b, i] w[rows[i]]

Each takes the form that moves the fewest bytes in programs compiled for an H100 (jax 0.12), in
units of the chosen rows of F = 14336, D = 4096, bfloat16, half of them chosen:

    vectors                    1             4             8
    gather, then dot           3             3             3            a copy: written, read again
    dense product              2             2             2            every row read
    expand, sums in XLA        1.00          1.00          1.00         the gather is in the sum
    contract, sums in XLA      1.04          2.14          4.29         two vectors a pass
    contract, kernel below     1.02          1.04          1.07         partial sums and all

So `expand` is left to XLA, which fuses one sum a vector and one gather into a single pass; sixteen
vectors take two. Of sums over rows XLA fuses two at most, and for short rows (D = 576) none: it
writes all products out, in float32. `contract` is a Mosaic GPU kernel: each program copies its part
of the list, a tile of the columns, into a ring of blocks in shared memory (one bulk copy a row),
multiplies on the scalar units, and leaves a partial sum. XLA adds these in a fixed order, so that
the result does not depend on timing. Left out: a list for each vector, and many vectors, which are
for the matrix units. These are bytes of compiled programs, not times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.row_products.reference import valid

MOST_VECTORS = 8
OLDEST = (0, 12)
COLUMNS = 64  # tiles are multiples of this many weights
_WARPS, _LANES = 4, 32  # of a warpgroup, which runs one program
_VECTOR = 4  # weights side by side in a lane; Mosaic adds up no more over warps
_BLOCK_BYTES = 2**14
_DEPTH = 3  # blocks in the ring: one in use, two on their way
_PROGRAMS = 132  # one for each multiprocessor of an H100
_LIST = 32  # entries of h in a run of 128 bytes, the least that a warpgroup copies
_SHARE = 52  # of the matrix that h and the partial sums may take: just below a fiftieth
_IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # lets a copy be a plain run of bytes


class Cut(NamedTuple):
    """How `contract_rows` is cut: program (s, t) takes part s of the list and tile t of columns."""

    splits: int
    tiles: int
    rows: int  # of the list, for one program
    block: int  # rows in one block of the ring
    columns: int


def cut(B: int, F: int, D: int, capacity: int, itemsize: int) -> Cut:
    """The cut for B vectors and a list with room for `capacity` of the rows of w [F, D]."""
    widest = (2048 if B == 1 else 1024) // itemsize
    columns = next(c for c in range(widest, 0, -COLUMNS) if D % c == 0)
    room = (F * D * itemsize // (_SHARE * 4 * B) - capacity) // D
    splits = max(1, min(room, _PROGRAMS * columns // D))
    rows = pl.cdiv(pl.cdiv(capacity, splits), _LIST) * _LIST
    most = max(_WARPS, _BLOCK_BYTES // (columns * itemsize))
    block = next(n for n in (16, 8, _WARPS) if n <= most)
    return Cut(pl.cdiv(capacity, rows), D // columns, rows, block, columns)


def expand_rows(
    x: jax.Array, w: jax.Array, rows: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """h [B, capacity] of x [B, D], w [F, D] and one list of rows [1, capacity].

    counts [1] says how many entries count; the others give zero. Raises NotImplementedError, with
    the reason, for what is not served.
    """
    _check(x, w, rows, counts)
    taken = w.at[rows[0]].get(mode="clip").astype(jnp.float32)
    # A sum a vector, not one over [B, capacity, D]: that would read the rows B times.
    sums = [jnp.sum(v[None, :] * taken, axis=-1) for v in x.astype(jnp.float32)]
    return jnp.where(valid(rows, counts), jnp.stack(sums), 0).astype(x.dtype)


def contract_rows(
    h: jax.Array, w: jax.Array, rows: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """y [B, D] of h [B, capacity], w [F, D] and one list of rows [1, capacity], each in 0..F-1.

    counts and errors are those of `expand_rows`; entries past the count may be any number.
    """
    _check(h, w, rows, counts)
    (B, capacity), (F, D) = h.shape, w.shape
    if jax.__version_info__ < OLDEST:
        raise NotImplementedError(
            f"the GPU kernel is written for Mosaic GPU of jax 0.12 on, got jax {jax.__version__}"
        )
    if D % COLUMNS:
        raise NotImplementedError(
            f"the GPU kernel copies rows of a multiple of {COLUMNS} weights, got D = {D}"
        )
    how = cut(B, F, D, capacity, w.dtype.itemsize)
    used = jnp.where(valid(rows, counts), h.astype(jnp.float32), 0)
    used = jnp.pad(used, ((0, 0), (0, how.splits * how.rows - capacity)))
    count = jnp.full((1,), capacity) if counts is None else jnp.minimum(counts, capacity)
    kernel = plgpu.kernel(
        functools.partial(_contract, how=how),
        out_type=jax.ShapeDtypeStruct((how.splits, B, D), jnp.float32),
        scratch_types=[
            plgpu.SMEM((_DEPTH, how.block, how.columns), w.dtype),
            plgpu.Barrier(num_arrivals=how.block, num_barriers=_DEPTH),
            plgpu.SMEM((B, how.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=B),
        ],
        grid=(how.splits, how.tiles),
        grid_names=("split", "tile"),
        kernel_name="contract_rows",
        cost_estimate=cost(B, F, D, capacity, w.dtype.itemsize),
        compiler_params=plgpu.CompilerParams(
            # Layouts are said below, not inferred. The one order that matters, reading a block
            # before a copy overwrites it, is said too, once a block rather than once a row.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )
    parts = kernel(used, w, rows.reshape(capacity), count.reshape(1).astype(jnp.int32))
    return jnp.sum(parts, axis=0).astype(h.dtype)


def cost(B: int, F: int, D: int, capacity: int, itemsize: int) -> pl.CostEstimate:
    """What the kernel of `contract_rows` computes, and moves to and from device memory.

    The chosen rows once, h and the list once (programs share them in the cache), partial sums.
    """
    how = cut(B, F, D, capacity, itemsize)
    moved = capacity * (D * itemsize + 4) + 4 * B * how.splits * (how.rows + D)
    return pl.CostEstimate(flops=2 * B * capacity * D, bytes_accessed=moved, transcendentals=0)


def _check(vector: jax.Array, w: jax.Array, rows: jax.Array, counts: jax.Array | None) -> None:
    B = vector.shape[0]
    if rows.shape[0] != 1 or (counts is not None and counts.size != 1):
        raise NotImplementedError(
            f"the GPU form reads one list for all vectors, got rows {rows.shape}"
        )
    if w.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"the GPU form reads weights in bfloat16 or float32, got {w.dtype}"
        )
    if not 0 < B <= MOST_VECTORS:
        raise NotImplementedError(
            f"the GPU form multiplies 1 to {MOST_VECTORS} vectors at a time, got B = {B}"
        )
    if not rows.shape[1]:
        raise NotImplementedError("the GPU form needs a list with room for a row, got none")


def _contract(h: Any, w: Any, rows: Any, count: Any, y: Any, *scratch: Any, how: Cut) -> None:
    """One program: the sum over its part of the list of its columns."""
    stages, barriers, factors, ready = scratch
    split, tile = lax.axis_index("split"), lax.axis_index("tile")
    first, columns = split * how.rows, pl.ds(tile * how.columns, how.columns)
    B = h.shape[0]
    for b in range(B):
        part = h.at[b, pl.ds(first, how.rows)]
        plgpu.copy_gmem_to_smem(part, factors.at[b], ready, oob_mode=_IN_BOUNDS)
    blocks, take = _ring(w, rows, count[0], stages, barriers, first, columns, how)
    plgpu.barrier_wait(ready)
    layout = _layout(how.columns)

    def of_block(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block = take(i)
        for four in range(0, how.block, _WARPS):
            weights = plgpu.layout_cast(block[pl.ds(four, _WARPS)], layout).astype(jnp.float32)
            places = pl.ds(i * how.block + four, _WARPS)
            sums = tuple(
                total + weights * _to_columns(factors.at[b, places], how.columns, layout)
                for b, total in enumerate(sums)
            )
        return sums

    zero = plgpu.layout_cast(jnp.zeros((_WARPS, how.columns), jnp.float32), layout)
    for b, total in enumerate(lax.fori_loop(0, blocks, of_block, (zero,) * B)):
        y[split, b, columns] = jnp.sum(total, axis=0)


def _ring(
    w: Any,
    rows: Any,
    count: jax.Array,
    stages: Any,
    barriers: Any,
    first: jax.Array,
    columns: Any,
    how: Cut,
) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Starts to copy rows from place `first` of the list on: how many blocks, and what awaits one.

    Past the end of the list the last block repeats its last row, times zero: no weight that was not
    asked for is ever multiplied.
    """
    mine = jnp.clip(count - first, 0, how.rows)
    blocks = lax.div(mine + (how.block - 1), how.block)

    def copy(i: jax.Array) -> None:
        slot = lax.rem(i, _DEPTH)
        for j in range(how.block):
            row = rows[jnp.minimum(first + i * how.block + j, count - 1)]
            plgpu.copy_gmem_to_smem(
                w.at[row, columns], stages.at[slot, j], barriers.at[slot], oob_mode=_IN_BOUNDS
            )

    def take(i: jax.Array) -> Any:
        slot, later = lax.rem(i, _DEPTH), i + (_DEPTH - 1)
        plgpu.barrier_wait(barriers.at[slot])

        @pl.when(later < blocks)
        def _() -> None:
            plgpu.commit_smem()  # all have read the block before i, which this copy overwrites
            copy(later)

        return stages.at[slot]

    lax.fori_loop(0, jnp.minimum(blocks, _DEPTH - 1), lambda i, _: copy(i), None)
    return blocks, take


def _layout(columns: int) -> Any:
    """A block [rows, columns] in registers: a warp takes every fourth row, lanes lie along it."""
    vector = math.gcd(columns // _LANES, _VECTOR)
    tiling = plgpu.Tiling(((_WARPS, _LANES * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _to_columns(factors: Any, columns: int, layout: Any) -> jax.Array:
    """A factor a row, repeated along the row."""
    one = plgpu.layout_cast(factors[...], layout.reduce(1))
    return plgpu.layout_cast(lax.broadcast_in_dim(one, (_WARPS, columns), (0,)), layout)
