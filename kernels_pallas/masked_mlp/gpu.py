"""How the feed-forward layer reads its matrices on a GPU: `row_products.gpu`, or XLA's product.

What reads every channel is XLA's plain product. A list of rows goes to the fused sums and the
Mosaic GPU kernel, which read those rows and no others.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp.listed import Units
from kernels_pallas.row_products import contract, expand, gpu


class GpuAccess:
    """Single rows where fewer than all channels are in use, else the whole matrix as one unit."""

    def obstacle(self, weights: jax.Array, vectors: int) -> str | None:
        if weights.ndim != 2 or weights.shape[1] % gpu.COLUMNS:
            row = weights.shape[1:]
            return f"rows of shape {row} are not [D] with D a multiple of {gpu.COLUMNS}"
        if weights.dtype not in (jnp.bfloat16, jnp.float32):
            return f"the weights are {weights.dtype}, and they read bfloat16 and float32"
        if vectors > gpu.MOST_VECTORS:
            return f"{vectors} vectors are more than the {gpu.MOST_VECTORS} they multiply at a time"
        if jax.__version_info__ < gpu.OLDEST:
            return (
                f"jax {jax.__version__} is older than 0.12, whose Mosaic GPU they are written for"
            )
        return None

    def size(self, weights: jax.Array, most: int, channels: int) -> int:
        return 1 if most < channels else channels

    def expand(self, x: jax.Array, weights: Sequence[jax.Array], units: Units) -> list[jax.Array]:
        if units.size > 1:
            return [expand(x, w, dtype=jnp.dtype(jnp.float32)) for w in weights]
        x = x.astype(jnp.float32)
        return [gpu.expand_rows(x, w, units.numbers[None], units.count) for w in weights]

    def contract(self, h: jax.Array, w: jax.Array, units: Units) -> jax.Array:
        if units.size > 1:
            return contract(h.astype(w.dtype), w)
        return gpu.contract_rows(h, w, units.numbers[None], units.count)
