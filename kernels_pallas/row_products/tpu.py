"""The products with chosen blocks or rows of a matrix as Pallas kernels for TPU.

    expand:   h[n, i] = x[n] . w[unit i]        contract: y[n] = sum over i of h[n, i] w[unit i]

A unit is a block of 128 channels, fetched by the pipeline through a scalar-prefetched list, or one
row, fetched by a copy of its own. Rows need the matrix as [F, D/128, 128] (`tiled`), where a row is
whole tiles of memory, one behind the other; of [F, D] it is a sliver of D/128 tiles, which no copy
can take. Blocks take either form. Lists are data, their capacity is static: what lies beyond the
count is not read. Sums are float32, and products of float32 are too, not bfloat16 passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # channels of a block, and of a group of rows worked at once
MOST_VECTORS = 64
# Two matrices of 128 rows, twice: 16 MB at D = 8192 in bfloat16. VMEM holds 95 MB or more from v5e.
_VMEM_BYTES = 64 * 2**20


def obstacle(w: Any, vectors: int) -> str | None:
    """Why these kernels cannot serve w ([F, D] or [F, D/128, 128]); None where they can."""
    if w.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the weights are {w.dtype}, and they read bfloat16 and float32"
    if vectors > MOST_VECTORS:
        return f"{vectors} vectors are more than the {MOST_VECTORS} of a decode step"
    if w.ndim == 3 and (w.shape[2] != LANES or w.shape[1] % tile_rows(w.dtype)):
        return (
            f"a row of shape {w.shape[1:]} is not whole tiles of {tile_rows(w.dtype)} x {LANES}: "
            "keep the matrix as [F, D]"
        )
    return None


def tile_rows(dtype: Any) -> int:
    """Rows of a tile in memory: 8 of 32-bit values, 16 of 16-bit ones."""
    return 32 // jnp.dtype(dtype).itemsize


def tiled(w: jax.Array) -> jax.Array:
    """w [..., D] as [..., D/128, 128], the form whose rows are fetched one by one."""
    return w.reshape(*w.shape[:-1], -1, LANES)


def expand(
    x: jax.Array,
    weights: Sequence[jax.Array],
    units: jax.Array,
    count: jax.Array,
    *,
    size: int,
    interpret: Any = False,
) -> list[jax.Array]:
    """h [N, capacity x size] float32 of x [N, D] with the same units of one or two matrices.

    units [capacity] int32, of which the first count [1] are valid; the others give zero, and a
    count above the capacity is the capacity. size: 128 for blocks, 1 for rows.
    """
    if not units.shape[0]:
        return [jnp.zeros((x.shape[0], 0), jnp.float32) for _ in weights]
    run = _expand_blocks if size == LANES else _expand_rows
    count = jnp.minimum(count, units.shape[0])  # past the list lies memory that no one made
    return run(x.astype(weights[0].dtype), list(weights), units, count, interpret)


def contract(
    h: jax.Array,
    w: jax.Array,
    units: jax.Array,
    count: jax.Array,
    *,
    size: int,
    interpret: Any = False,
) -> jax.Array:
    """y [N, D] float32 of h [N, capacity x size] with the units of w; see `expand`."""
    if not units.shape[0]:
        return jnp.zeros((h.shape[0], math.prod(w.shape[1:])), jnp.float32)
    run = _contract_blocks if size == LANES else _contract_rows
    count = jnp.minimum(count, units.shape[0])
    return run(h.astype(w.dtype), w, units, count, interpret)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=exact, preferred_element_type=jnp.float32)


def cost(weights: Sequence[jax.Array], vectors: int, channels: int) -> pl.CostEstimate:
    """Of every unit of the list: the count is data, so this is the most there can be."""
    width = weights[0].size // weights[0].shape[0]
    products = vectors * channels * width * len(weights)
    activations = vectors * (width * weights[0].dtype.itemsize + channels * 4 * len(weights))
    read = channels * width * weights[0].dtype.itemsize * len(weights)
    return pl.CostEstimate(flops=2 * products, transcendentals=0, bytes_accessed=read + activations)


# Blocks: the pipeline copies block units[i] while block units[i - 1] is worked. Past the count the
# list is read at its last valid place, and a block that is already there is not fetched again.


def block_spec(row: tuple[int, ...]) -> pl.BlockSpec:
    """The listed block of 128 rows, of this shape each, at every step of the grid."""

    def place(i: jax.Array, units: Any, count: Any) -> tuple[Any, ...]:
        return units[jnp.minimum(i, jnp.maximum(count[0] - 1, 0))], *(0 for _ in row)

    return pl.BlockSpec((LANES, *row), place)


def _expand_blocks(
    x: jax.Array, weights: list[jax.Array], units: jax.Array, count: jax.Array, interpret: Any
) -> list[jax.Array]:
    (N, D), capacity = x.shape, units.shape[0]

    def kernel(_: Any, count: Any, x: Any, *refs: Any) -> None:
        valid = pl.program_id(0) < count[0]
        for w, h in zip(refs[: len(weights)], refs[len(weights) :], strict=True):

            @pl.when(valid)
            def _(w: Any = w, h: Any = h) -> None:
                h[...] = _dot(x[...], w[...].reshape(LANES, D), (1, 1))

            @pl.when(jnp.logical_not(valid))
            def _(h: Any = h) -> None:
                h[...] = jnp.zeros(h.shape, h.dtype)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(capacity,),
        in_specs=[pl.BlockSpec((N, D), lambda i, *_: (0, 0))]
        + [block_spec(weights[0].shape[1:])] * len(weights),
        out_specs=[pl.BlockSpec((N, LANES), lambda i, *_: (0, i))] * len(weights),
    )
    result = jax.ShapeDtypeStruct((N, capacity * LANES), jnp.float32)
    return _call(kernel, spec, [result] * len(weights), weights, N, interpret)(
        units, count, x, *weights
    )


def _contract_blocks(
    h: jax.Array, w: jax.Array, units: jax.Array, count: jax.Array, interpret: Any
) -> jax.Array:
    N, (F, *row), capacity = h.shape[0], w.shape, units.shape[0]
    D = math.prod(row)

    def kernel(units: Any, count: Any, h: Any, w: Any, y: Any) -> None:
        i = pl.program_id(0)

        @pl.when(i == 0)
        def _() -> None:
            y[...] = jnp.zeros(y.shape, y.dtype)

        @pl.when(i < count[0])
        def _() -> None:
            # The last block may reach past the matrix, where anything may lie.
            held = w[...].reshape(LANES, D)
            held = held if F % LANES == 0 else _cleared(held, F - units[i] * LANES)
            y[...] += _dot(h[...], held, (1, 0))

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(capacity,),
        in_specs=[pl.BlockSpec((N, LANES), lambda i, *_: (0, i)), block_spec(tuple(row))],
        out_specs=[pl.BlockSpec((N, D), lambda i, *_: (0, 0))],
    )
    result = jax.ShapeDtypeStruct((N, D), jnp.float32)
    return _call(kernel, spec, [result], [w], N, interpret)(units, count, h, w)[0]


def _cleared(rows: jax.Array, valid: jax.Array) -> jax.Array:
    """The rows [n, D] from `valid` on set to zero, so that nothing unread can be multiplied."""
    index = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where(index < valid, rows, jnp.zeros((), rows.dtype))


# Rows: groups of 128, each row by its own copy into one of two buffers, so that the next group
# arrives while this one is worked.


def in_group(group: Any, count: Any, work: Callable[[Any, Any], None]) -> None:
    """work(place, r) for the places group * 128 + r of a list, as far as its count goes."""

    def one(r: jax.Array, carry: None) -> None:
        place = group * LANES + r
        pl.when(place < count)(lambda: work(place, r))

    lax.fori_loop(0, LANES, one, None)


def _fetched(
    step: Callable[[Any, Any], None],
    rows: Any,
    count: Any,
    weights: Any,
    buffer: Any,
    sem: Any,
) -> None:
    """Run step(slot, valid) once the `valid` rows of this group are in buffer[slot], the next ones
    on their way."""
    i = pl.program_id(0)

    def copies(group: Any, act: Callable[[Any], None]) -> None:
        slot = lax.rem(group, 2)

        def of_row(place: Any, r: Any) -> None:
            for k, w in enumerate(weights):
                target = buffer.at[slot, k, r]
                act(pltpu.make_async_copy(w.at[rows[place]], target, sem.at[slot]))

        in_group(group, count[0], of_row)

    @pl.when(i == 0)
    def _() -> None:
        copies(0, lambda copy: copy.start())

    copies(i + 1, lambda copy: copy.start())
    copies(i, lambda copy: copy.wait())

    @pl.when(i * LANES < count[0])
    def _() -> None:
        step(lax.rem(i, 2), count[0] - i * LANES)


def _expand_rows(
    x: jax.Array, weights: list[jax.Array], units: jax.Array, count: jax.Array, interpret: Any
) -> list[jax.Array]:
    (N, D), groups = x.shape, pl.cdiv(units.shape[0], LANES)

    def kernel(rows: Any, count: Any, x: Any, *refs: Any) -> None:
        held, outs = refs[: len(weights)], refs[len(weights) : 2 * len(weights)]
        buffer, sem = refs[2 * len(weights) :]
        for h in outs:
            h[...] = jnp.zeros(h.shape, h.dtype)

        def step(slot: Any, valid: Any) -> None:
            lanes = lax.broadcasted_iota(jnp.int32, (N, LANES), 1)
            for k, h in enumerate(outs):
                rows_ = buffer[slot, k].reshape(LANES, D)
                h[...] = jnp.where(lanes < valid, _dot(x[...], rows_, (1, 1)), 0.0)

        _fetched(step, rows, count, held, buffer, sem)

    spec = _row_spec(
        [pl.BlockSpec((N, D), lambda i, *_: (0, 0))],
        [pl.BlockSpec((N, LANES), lambda i, *_: (0, i))] * len(weights),
        weights,
        groups,
    )
    result = jax.ShapeDtypeStruct((N, groups * LANES), jnp.float32)
    found = _call(kernel, spec, [result] * len(weights), weights, N, interpret)(
        units, count, x, *weights
    )
    return [h[:, : units.shape[0]] for h in found]


def _contract_rows(
    h: jax.Array, w: jax.Array, units: jax.Array, count: jax.Array, interpret: Any
) -> jax.Array:
    N, groups = h.shape[0], pl.cdiv(units.shape[0], LANES)
    D = w.shape[1] * LANES
    h = jnp.pad(h, ((0, 0), (0, groups * LANES - h.shape[1])))

    def kernel(rows: Any, count: Any, h: Any, w: Any, y: Any, buffer: Any, sem: Any) -> None:
        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            y[...] = jnp.zeros(y.shape, y.dtype)

        def step(slot: Any, valid: Any) -> None:
            y[...] += _dot(h[...], _cleared(buffer[slot, 0].reshape(LANES, D), valid), (1, 0))

        _fetched(step, rows, count, [w], buffer, sem)

    spec = _row_spec(
        [pl.BlockSpec((N, LANES), lambda i, *_: (0, i))],
        [pl.BlockSpec((N, D), lambda i, *_: (0, 0))],
        [w],
        groups,
    )
    result = jax.ShapeDtypeStruct((N, D), jnp.float32)
    return _call(kernel, spec, [result], [w], N, interpret)(units, count, h, w)[0]


def _row_spec(ins: list[Any], outs: list[Any], weights: list[jax.Array], groups: int) -> Any:
    row = weights[0].shape[1:]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(groups,),
        in_specs=ins + [pl.BlockSpec(memory_space=pl.ANY)] * len(weights),
        out_specs=outs,
        scratch_shapes=[
            pltpu.VMEM((2, len(weights), LANES, *row), weights[0].dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )


def _call(
    kernel: Callable[..., None],
    spec: Any,
    results: list[jax.ShapeDtypeStruct],
    weights: Sequence[jax.Array],
    vectors: int,
    interpret: Any,
) -> Callable[..., list[jax.Array]]:
    channels = spec.grid[0] * LANES
    return pl.pallas_call(
        kernel,
        results,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=cost(weights, vectors, channels),
        interpret=interpret,
    )
