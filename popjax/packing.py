"""Packing: the FFN rows of a partition copied side by side, once per prompt, for decoding to read.

Everything else of the model is shared, not copied. Leaves out which channels are worth it: that is
`sparsity.py` and the methods.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.gather_rows import gather_all
from popjax import sharding
from popjax.config import ModelConfig
from popjax.expert_partition import ExpertPartition, with_order
from popjax.sparsity import (
    ChannelPartition,
    ChannelPartitions,
    Params,
    Partition,
    Partitions,
    keeps_order,
    unrouted,
    with_unrouted,
)


def pack(
    params: Params,
    config: ModelConfig,
    partitions: Partitions,
    mesh: Mesh | None = None,
    *,
    copy: bool = True,
) -> tuple[Params, ModelConfig, Partitions]:
    """Parameters whose FFN rows are only [R | C], the config they fit, and partitions into them.

    Copies the FFN's rows [R+C, D], and biases of up, once per prompt; all other arrays are shared,
    and a layer that evaluates every channel keeps its weights, as do experts. The full weights
    stay held by their owner. On a mesh every device packs its own rows, at the places in its shard
    that the partitions name.
    Without `copy` nothing is copied: decode steps fetch the rows from the full weights by index.
    """
    if not copy:
        if mesh is not None:
            raise ValueError("rows cannot be left unpacked on several devices: pack with copy=True")
        return params, config, _indexed(params, config, partitions)
    found = dict(enumerate(partitions))
    packed = _packable(found)
    mlps = [params[f"layer_{i}"][config.layers[i].ffn] for i in packed]
    if mesh is None:
        widths = [config.layers[i].mlp_dim for i in packed]
        mlps, parts = _pack_layers(mlps, tuple(packed.values()), widths)
    else:
        shards, parts = pack_shards(mlps, tuple(packed.values()), mesh=mesh)
        mlps = [mlp if new is None else new for mlp, new in zip(mlps, shards, strict=True)]
    layers = {
        f"layer_{i}": {**params[f"layer_{i}"], config.layers[i].ffn: mlp}
        for i, mlp in zip(packed, mlps, strict=True)
    }
    done = dict(zip(packed, parts, strict=True))
    found |= _ordered_experts(params, found, mesh)
    found = {i: with_unrouted(part, done.get(i)) for i, part in found.items()}
    dims = [layer.mlp_dim for layer in config.layers]
    for i, part in zip(packed, parts, strict=True):
        dims[i] = part.evaluated
    return {**params, **layers}, config.with_mlp_dims(tuple(dims)), tuple(found.values())


def _packable(partitions: dict[int, Partition]) -> dict[int, ChannelPartition]:
    """By layer, the partitions of what every token uses."""
    every = {i: unrouted(part) for i, part in partitions.items()}
    return {i: part for i, part in every.items() if part is not None}


def _ordered_experts(
    params: Params, partitions: dict[int, Partition], mesh: Mesh | None
) -> dict[int, Partition]:
    """The partitions of layers with experts as decoding wants them; their rows stay where they are.

    Any token may go to any expert, so a copy of what all of them keep would rarely be read.
    """
    experts = {i: part for i, part in partitions.items() if isinstance(part, ExpertPartition)}
    downs = [params[f"layer_{i}"]["moe"]["down"] for i in experts]
    return dict(zip(experts, _ordered(list(experts.values()), downs, mesh=mesh), strict=True))


@functools.partial(jax.jit, static_argnames="mesh")
@sharding.over_mesh("E", "E", outs="E")
def _ordered(
    parts: list[ExpertPartition], downs: list[jax.Array], *, mesh: Mesh | None
) -> list[ExpertPartition]:
    return [with_order(part, down) for part, down in zip(parts, downs, strict=True)]


@functools.partial(jax.jit, static_argnames="mesh")
@sharding.over_mesh("F", "F", outs="F")
def pack_shards(
    mlps: Sequence[Params], partitions: ChannelPartitions, *, mesh: Mesh
) -> tuple[list[Params | None], ChannelPartitions]:
    """FFN parameters of every layer on a mesh packed by shard, None for one that keeps its own."""
    widths = [mlp["down"].shape[0] for mlp in mlps]
    packed, parts = _pack_layers(mlps, partitions, widths)
    triples = zip(packed, parts, widths, strict=True)
    return [None if keeps_order(part, width) else mlp for mlp, part, width in triples], parts


def pack_layer(
    mlp: Params, part: ChannelPartition, mlp_dim: int
) -> tuple[Params, ChannelPartition]:
    """One layer's FFN parameters reduced to [R | C], and its partition with candidate norms."""
    (packed,), (part,) = _pack_layers([mlp], (part,), [mlp_dim])
    return packed, part


def _pack_layers(
    mlps: Sequence[Params], partitions: ChannelPartitions, widths: Sequence[int]
) -> tuple[list[Params], ChannelPartitions]:
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
        parts[i] = dataclasses.replace(_with_norm(parts[i], norm), packed=True)
    for i, part in enumerate(partitions):
        if whole[i]:
            # One layer at a time: together, XLA's CPU backend holds every layer's squares at once.
            parts[i] = _with_norms(part, packed[i]["down"])
    return packed, tuple(parts)


def _with_norms(part: ChannelPartition, down: jax.Array) -> ChannelPartition:
    """The partition with the norms [C] of its rows of the full down, where any are chosen."""
    if part.decided:
        return part
    return _with_norm(part, down_norms(down)[part.candidate])


def _with_norm(part: ChannelPartition, norm: jax.Array) -> ChannelPartition:
    if part.candidate_factor is not None:
        norm = norm * part.candidate_factor
    return dataclasses.replace(part, candidate_norm=norm)


@jax.jit
def _evaluated_rows(partitions: ChannelPartitions) -> list[jax.Array]:
    return [jnp.concatenate([part.retained, part.candidate]) for part in partitions]


@jax.jit
def _last_norms(downs: list[jax.Array], candidates: list[jax.Array]) -> list[jax.Array]:
    """Norms [C] a layer of the last C rows of its down [R+C, D]."""
    pairs = zip(downs, candidates, strict=True)
    return [down_norms(down[down.shape[0] - c.shape[0] :]) for down, c in pairs]


def _indexed(params: Params, config: ModelConfig, partitions: Partitions) -> Partitions:
    """The partitions as decoding by index wants them; of all channels, the weights as they are."""
    found = dict(enumerate(partitions))
    parts = _packable(found)
    for i, part in parts.items():
        part = _with_norms(part, params[f"layer_{i}"][config.layers[i].ffn]["down"])
        if not keeps_order(part, config.layers[i].mlp_dim):
            part = dataclasses.replace(part, packed=True, indexed=True)
        parts[i] = part
    found |= _ordered_experts(params, found, None)
    return tuple(with_unrouted(part, parts.get(i)) for i, part in found.items())


@jax.jit
def down_norms(down: jax.Array) -> jax.Array:
    """L2 norm [F], float32, of every row of down [F, D]: how loudly a channel speaks."""
    down = down.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(down * down, axis=tuple(range(1, down.ndim))))
