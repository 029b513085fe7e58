"""Scouts of a model: copies of gate and up in a few bits, made once, beside its weights.

A scout says what every channel would be for a token before a row of the weights is read. It is
arrays of an FFN's parameters, there only where it was added, so models without know nothing of it.
Quantised plainly, to the nearest step; leaves out who chooses by it (`methods/scout.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
from kernels_pallas.row_products import QuantizedRows, quantized
from popjax.artefact import load_artefact, save_artefact
from popjax.config import ModelConfig
from popjax.leaves import check_layers, with_leaves, without_leaves
from popjax.sparsity import Params

FORM = ("scout", "1")
BITS, GROUP = 4, 64
MATRICES = ("gate", "up")
# One dict of arrays a layer: of a matrix w `scout_w` and `scout_w_scale`.
Scouts = tuple[dict[str, jax.Array], ...]


def names() -> Iterator[str]:
    """Parameters of a scout in an FFN."""
    for name in MATRICES:
        yield from (f"scout_{name}", f"scout_{name}_scale")


def needed(mlp: Params) -> tuple[QuantizedRows, QuantizedRows]:
    """Gate and up [F, D] of the scout among an FFN's parameters, with scales in float32.

    Raises ValueError where there is none.
    """
    if any(name not in mlp for name in names()):
        raise ValueError(
            "scout needs a scout beside the weights of every layer that it prunes: "
            "popjax.scouts.with_scouts(params, make_scouts(params, config)), with ends=True where "
            "the first and last layer are pruned too"
        )
    gate, up = (
        QuantizedRows(
            _rows(mlp[f"scout_{name}"]), _rows(mlp[f"scout_{name}_scale"]).astype(jnp.float32)
        )
        for name in MATRICES
    )
    return gate, up


def _rows(w: jax.Array) -> jax.Array:
    """w [F, n], which may be kept as tiles as matrices are."""
    return w.reshape(w.shape[0], -1)


def make_scouts(
    params: Params, config: ModelConfig, bits: int = BITS, group: int = GROUP, ends: bool = False
) -> Scouts:
    """Copies of each layer's gate and up in `bits` (4 or 8), a scale each `group` of weights.

    Without `ends` none of the first and last layer, which `Scout` leaves whole unless told. Scales
    are in the dtype of the weights. Raises ValueError for a model without gated FFNs, or
    bits and groups that its rows do not allow.
    """
    check_model(config)
    scouts = []
    for i, layer in enumerate(config.layers):
        scout = {}
        pruned = ends or 0 < i < config.num_layers - 1
        for name in MATRICES if pruned else ():
            w = params[f"layer_{i}"][layer.ffn][name]
            copy = _quantized(_rows(w), bits, group)
            scout[f"scout_{name}"] = copy.values
            scout[f"scout_{name}_scale"] = copy.scales.astype(w.dtype)
        scouts.append(scout)
    return tuple(scouts)


_quantized = jax.jit(quantized, static_argnums=(1, 2))


def check_model(config: ModelConfig) -> None:
    """Raise ValueError for a model whose FFNs a scout is not for."""
    mixture = any(layer.moe is not None for layer in config.layers)
    if mixture or not config.gated:
        lacking = "mixtures of experts" if mixture else "no gate"
        raise ValueError(
            f"a scout is of gated FFNs, and this {config.family} model has {lacking}: use "
            "online-pruning"
        )


def with_scouts(params: Params, scouts: Sequence[dict[str, Any]]) -> Params:
    """Parameters with a scout in each layer, for runs with `Scout`; no weight is copied.

    Save a model without them: its file formats have no place for scouts. Raises ValueError for
    another number of layers.
    """
    check_layers(params, "scouts", scouts)
    paths = {f"layer_{i}/mlp/{k}": w for i, one in enumerate(scouts) for k, w in one.items()}
    return with_leaves(params, paths)


def without_scouts(params: Params) -> Params:
    """Inverse of `with_scouts`; parameters that have none as they are."""
    return without_leaves(params, "mlp", set(names()))


def scout_bytes(params: Params, layer: int | None = None) -> int:
    """Bytes that the scouts among the parameters hold, or that of one layer."""
    wanted = [f"layer_{layer}"] if layer is not None else list(params)
    mlps = [params.get(name, {}).get("mlp", {}) for name in wanted if name.startswith("layer_")]
    return sum(mlp[name].nbytes for mlp in mlps for name in names() if name in mlp)


def save_scouts(
    path: str | os.PathLike[str], scouts: Scouts, params: Params, config: ModelConfig
) -> Path:
    """Write the scouts of this model into one new safetensors file; returns its path.

    Raises CheckpointError where the path exists.
    """
    arrays = {f"layer_{i}/{name}": w for i, one in enumerate(scouts) for name, w in one.items()}
    return save_artefact(path, FORM, arrays, params, config)


def load_scouts(path: str | os.PathLike[str], params: Params, config: ModelConfig) -> Scouts:
    """The scouts that `save_scouts` wrote for this model.

    Raises CheckpointError for a file that is damaged, of another version, or of another model.
    """
    words = ("a scout", "run popjax calibrate scout for it")
    arrays = load_artefact(path, FORM, params, config, words)
    inner = range(1, config.num_layers - 1)
    held = range(config.num_layers) if "layer_0/scout_up" in arrays else inner
    wanted = {f"layer_{i}/{name}" for i in held for name in names()}
    if odd := sorted(wanted ^ set(arrays)):
        raise checkpoints.CheckpointError(
            f"{path} is no scout of this model, as {odd[0]!r} shows: run popjax calibrate scout"
        )
    widths = [layer.mlp_dim if i in held else 0 for i, layer in enumerate(config.layers)]
    return tuple(
        {name: _checked(path, arrays, i, name, rows) for name in names() if rows}
        for i, rows in enumerate(widths)
    )


def _checked(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], i: int, name: str, rows: int
) -> jax.Array:
    held = arrays[f"layer_{i}/{name}"]
    floats = jnp.issubdtype(held.dtype, jnp.floating)
    if held.ndim != 2 or held.shape[0] != rows or floats != name.endswith("_scale"):
        raise checkpoints.CheckpointError(
            f"{path}: 'layer_{i}/{name}' is {held.dtype}{list(held.shape)}, which is no row for "
            f"each of {rows} channels: run popjax calibrate scout again"
        )
    return jnp.asarray(held)


__all__ = [
    "Scouts",
    "check_model",
    "load_scouts",
    "make_scouts",
    "names",
    "needed",
    "save_scouts",
    "scout_bytes",
    "with_scouts",
    "without_scouts",
]
