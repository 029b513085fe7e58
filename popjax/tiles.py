"""FFN rows kept as whole tiles of a TPU's memory, so that its kernels can fetch them one by one.

Of a matrix [F, D] a row is a sliver of many tiles, which no copy can take; of [F, D/128, 128] it is
whole ones, one behind the other. Other consumers see [F, D]: a reshape, which XLA makes free.
Leaves out the kernels: those are `kernels_pallas/row_products/tpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.row_products.tpu import LANES, tile_rows, tiled
from popjax import sharding
from popjax.sparsity import Params

_MATRICES = ("gate", "up", "down")
# How many axes of a parameter come before its row: channels [F], and experts [E, M].
_LEADING = {f"{ffn}/{name}": 1 for ffn in ("mlp", "shared") for name in _MATRICES}
_LEADING |= {f"moe/{name}": 2 for name in _MATRICES}


def as_tiles(params: Params) -> Params:
    """Parameters whose FFN matrices [F, D] are [F, D/128, 128], and experts' [E, M, D/128, 128].

    Unchanged where D is not whole tiles.
    """
    return _reformed(params, _tiles)


def as_matrices(params: Params) -> Params:
    """Inverse of `as_tiles`."""
    return _reformed(params, _matrix)


def tiled_placer(place: Callable[[str, Any], jax.Array]) -> Callable[[str, Any], jax.Array]:
    """`place(path, array)` that first makes FFN matrices tiles, as `as_tiles` does."""
    return lambda path, array: place(path, _tiles(path, array))


def has_tiles(path: str, w: Any) -> bool:
    """Whether the parameter w at `path`, an array or its shape, can be kept as tiles and is not."""
    leading = _leading(path)
    matrix = leading is not None and w.ndim == leading + 1
    return matrix and w.shape[-1] % (LANES * tile_rows(w.dtype)) == 0


def _leading(path: str) -> int | None:
    return _LEADING.get(path.partition("/")[2])


def _tiles(path: str, w: Any) -> Any:
    return tiled(w) if has_tiles(path, w) else w


def _matrix(path: str, w: Any) -> Any:
    leading = _leading(path)
    return w if leading is None else w.reshape(*w.shape[:leading], -1)


def _reformed(params: Params, form: Callable[[str, Any], Any]) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, w: form(sharding.joined(path), w), params)
