"""Packing: the FFN rows of a partition copied side by side, once per prompt, for decoding to read.

Everything else of the model is shared, not copied. Leaves out which channels are worth it: that is
`sparsity.py` and the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.gather_rows import gather_all
from popjax.config import ModelConfig
from popjax.sparsity import ChannelPartition, Params, Partitions, keeps_order


def pack(
    params: Params, config: ModelConfig, partitions: Partitions
) -> tuple[Params, ModelConfig, Partitions]:
    """Parameters whose FFN rows are only [R | C], the config they fit, and partitions into them.

    Copies gate, up and down rows [R+C, D] once per prompt; all other arrays are shared, and a layer
    that evaluates every channel keeps its weights. The full weights stay held by their owner.
    """
    names = [f"layer_{i}" for i in range(config.num_layers)]
    widths = [layer.mlp_dim for layer in config.layers]
    mlps, parts = _pack_layers([params[name]["mlp"] for name in names], partitions, widths)
    layers = {name: {**params[name], "mlp": mlp} for name, mlp in zip(names, mlps, strict=True)}
    narrow = config.with_mlp_dims(tuple(part.evaluated for part in parts))
    return {**params, **layers}, narrow, parts


def pack_layer(
    mlp: Params, part: ChannelPartition, mlp_dim: int
) -> tuple[Params, ChannelPartition]:
    """One layer's FFN parameters reduced to [R | C], and its partition with candidate norms."""
    (packed,), (part,) = _pack_layers([mlp], (part,), [mlp_dim])
    return packed, part


def _pack_layers(
    mlps: Sequence[Params], partitions: Partitions, widths: Sequence[int]
) -> tuple[list[Params], Partitions]:
    # All layers in one call each: dispatch for every matrix costs as much as copying a small one.
    whole = [keeps_order(p, width) for p, width in zip(partitions, widths, strict=True)]
    packed = [mlp if keep else dict(mlp) for mlp, keep in zip(mlps, whole, strict=True)]
    wanted = [(i, name) for i, mlp in enumerate(packed) if not whole[i] for name in mlp]
    rows = _evaluated_rows(partitions)
    matrices = gather_all([packed[i][name] for i, name in wanted], [rows[i] for i, _ in wanted])
    for (i, name), matrix in zip(wanted, matrices, strict=True):
        packed[i][name] = matrix
    parts = list(partitions)
    reduced = [i for i, keep in enumerate(whole) if not keep]
    downs = [packed[i]["down"] for i in reduced]
    norms = _last_norms(downs, [partitions[i].candidate for i in reduced])
    for i, norm in zip(reduced, norms, strict=True):
        parts[i] = dataclasses.replace(parts[i], candidate_norm=norm, packed=True)
    for i, part in enumerate(partitions):
        if whole[i] and part.k_selected < part.num_candidate:
            # One layer at a time: together, XLA's CPU backend holds every layer's squares at once.
            norm = down_norms(packed[i]["down"])[part.candidate]
            parts[i] = dataclasses.replace(part, candidate_norm=norm)
    return packed, tuple(parts)


@jax.jit
def _evaluated_rows(partitions: Partitions) -> list[jax.Array]:
    return [jnp.concatenate([part.retained, part.candidate]) for part in partitions]


@jax.jit
def _last_norms(downs: list[jax.Array], candidates: list[jax.Array]) -> list[jax.Array]:
    """Norms [C] a layer of the last C rows of its down [R+C, D]."""
    pairs = zip(downs, candidates, strict=True)
    return [down_norms(down[down.shape[0] - c.shape[0] :]) for down, c in pairs]


@jax.jit
def down_norms(down: jax.Array) -> jax.Array:
    """L2 norm [F], float32, of every row of down [F, D]: how loudly a channel speaks."""
    down = down.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(down * down, axis=-1))
