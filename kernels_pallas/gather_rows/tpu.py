"""Packing on a TPU: each row of w [F, D/128, 128] copied within HBM, with nothing held beside it.

XLA's own gather of the same rows holds the result twice (measured with the TPU compiler).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.row_products.tpu import LANES, in_group


def gather(w: jax.Array, rows: jax.Array, interpret: Any = False) -> jax.Array:
    """Rows [R, D/128, 128] of w [F, D/128, 128] at indices rows [R]."""
    size = rows.shape[0]
    groups = pl.cdiv(size, LANES)  # of which one is under way and one waited for
    result = jax.ShapeDtypeStruct((size, *w.shape[1:]), w.dtype)
    if not size:
        return jnp.zeros(result.shape, result.dtype)

    def kernel(rows: Any, w: Any, out: Any, sem: Any) -> None:
        i = pl.program_id(0)

        def copies(group: Any, act: Callable[[Any], None]) -> None:
            def of_row(place: Any, _: Any) -> None:
                source, target = w.at[rows[place]], out.at[place]
                act(pltpu.make_async_copy(source, target, sem.at[lax.rem(group, 2)]))

            in_group(group, size, of_row)

        copies(i, lambda copy: copy.start())

        @pl.when(i > 0)
        def _() -> None:
            copies(i - 1, lambda copy: copy.wait())

        @pl.when(i == groups - 1)
        def _() -> None:
            copies(i, lambda copy: copy.wait())

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(groups,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.SemaphoreType.DMA((2,))],
    )
    read = size * (w.size // w.shape[0]) * w.dtype.itemsize
    return pl.pallas_call(
        kernel,
        result,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * read),
        interpret=interpret,
    )(rows, w)
