"""How the feed-forward layer reads its matrices on a TPU: `row_products.tpu` by blocks or rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from kernels_pallas.masked_mlp.listed import Units
from kernels_pallas.row_products import tpu

# Single rows are read where they are at most this share of what whole blocks would be: every row is
# a copy of its own, a block is one of a hundred times its size. Reckoned in bytes, not measured.
_FEW_ROWS = 0.9


@dataclasses.dataclass(frozen=True)
class TpuAccess:
    """Blocks of 128 channels; single rows where the matrix is kept as tiles and few are in use."""

    interpret: Any = False

    def obstacle(self, weights: jax.Array, vectors: int) -> str | None:
        width = weights.shape[-1]
        if not self.interpret and width % tpu.LANES:
            return (
                f"D = {width} is no multiple of {tpu.LANES}: a TPU keeps such a matrix by columns, "
                "and would copy it for every call"
            )
        return tpu.obstacle(weights, vectors)

    def size(self, weights: jax.Array, most: int, channels: int) -> int:
        return 1 if weights.ndim == 3 and most <= _FEW_ROWS * channels else tpu.LANES

    def expand(self, x: jax.Array, weights: Sequence[jax.Array], units: Units) -> list[jax.Array]:
        options = {"size": units.size, "interpret": self.interpret}
        return tpu.expand(x, weights, units.numbers, units.count, **options)

    def contract(self, h: jax.Array, w: jax.Array, units: Units) -> jax.Array:
        options = {"size": units.size, "interpret": self.interpret}
        return tpu.contract(h, w, units.numbers, units.count, **options)
