"""Partitions and masks of a mesh run, counted by shard inside and over all channels outside.

Inside, indices count from the start of their shard, and arrays are those of the shards one after
the other: each device finds its own at its place. What callers give and get counts all F channels,
as a run on one device does, so that the one replays on the other. Experts are whole on one device,
so their partitions only lie apart; of a token's experts each device masks those that it holds, and
what every token uses beside them is split as any FFN.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from popjax import sharding
from popjax.config import LayerConfig, ModelConfig
from popjax.expert_partition import ExpertPartition
from popjax.sparsity import ChannelPartition, Partition, Partitions, unrouted, with_unrouted

Masks = tuple[jax.Array, ...]


def to_shards(
    partitions: Partitions | None, config: ModelConfig, mesh: Mesh | None
) -> Partitions | None:
    """Partitions of all F channels as a mesh run holds them: counted, and lying, by shard.

    Raises ValueError unless every shard has as many retained, candidates and chosen.
    """
    if partitions is None or mesh is None:
        return partitions
    pairs = enumerate(zip(partitions, config.layers, strict=True))
    shards = sharding.shard_count(mesh)
    parts = tuple(
        with_unrouted(part, _by_shard(i, unrouted(part), y.mlp_dim // shards, shards))
        for i, (part, y) in pairs
    )
    return sharding.placed(parts, "F", mesh)


def _by_shard(
    i: int, part: ChannelPartition | None, width: int, shards: int
) -> ChannelPartition | None:
    if part is None:
        return None
    sets = {"retained": np.asarray(part.retained), "candidate": np.asarray(part.candidate)}
    for name, indices in sets.items():
        counts = np.bincount(indices // width, minlength=shards)
        if np.any(counts != counts[0]):
            raise ValueError(
                f"partition of layer {i} has {counts.tolist()} {name} channels on the {shards} "
                "shards of F, which must be equal: use a partition made on this mesh"
            )
    counts = {"k_selected": part.k_selected, "exact": part.exact, "tried": part.tried}
    if any((count or 0) % shards for count in counts.values()):
        raise ValueError(
            f"k_selected {part.k_selected} of layer {i} is not a multiple of the {shards} shards "
            "of F: use a partition made on this mesh"
        )
    retained, candidate = (jnp.asarray(indices % width, jnp.int32) for indices in sets.values())
    chosen = {name: count // shards for name, count in counts.items() if count is not None}
    # Candidates ascend over all shards, so their factors lie by shard as they are.
    return dataclasses.replace(part, retained=retained, candidate=candidate, **chosen)


def from_shards(
    partitions: Partitions | None, config: ModelConfig, mesh: Mesh | None
) -> Partitions | None:
    """Inverse of `to_shards`: partitions of all F channels, ascending, on the default device."""
    if partitions is None or mesh is None:
        return partitions
    shards = sharding.shard_count(mesh)
    pairs = zip(partitions, config.layers, strict=True)
    parts = (
        with_unrouted(part, _over_all(unrouted(part), layer.mlp_dim // shards, shards))
        for part, layer in pairs
    )
    # Experts may still lie on the mesh.
    return jax.tree.map(lambda leaf: jnp.asarray(sharding.fetched(leaf)), tuple(parts))


def _over_all(part: ChannelPartition | None, width: int, shards: int) -> ChannelPartition | None:
    if part is None:
        return None
    starts = (np.arange(shards, dtype=np.int32) * width)[:, None]

    def counted(indices: jax.Array) -> jax.Array:
        return jnp.asarray((sharding.fetched(indices).reshape(shards, -1) + starts).reshape(-1))

    counts = {"k_selected": part.k_selected, "exact": part.exact, "tried": part.tried}
    counts = {name: count * shards for name, count in counts.items() if count is not None}
    found = dataclasses.replace(part, **counts)
    places = {"retained": counted(part.retained), "candidate": counted(part.candidate)}
    return dataclasses.replace(found, **places)


def masks_to_shards(
    masks: Masks | None, partitions: Partitions | None, config: ModelConfig, mesh: Mesh | None
) -> Masks | None:
    """Masks [steps, B, R+C] a layer in the order of a partition of all F channels -> by shard.

    Raises ValueError unless all shards have as many channels on in every step.
    """
    if masks is None or partitions is None or mesh is None:
        return masks
    shards = sharding.shard_count(mesh)
    by_shard = []
    for i, (mask, part, layer) in enumerate(zip(masks, partitions, config.layers, strict=True)):
        routed, split = _columns(part)
        of_experts, mask = np.split(np.asarray(mask), [routed], axis=-1)
        if split is not None:
            mask = mask[..., np.argsort(_order(split, layer, shards))]
        mask = _apart(mask, shards)
        copies = np.repeat(of_experts[..., None, :], shards, axis=-2)
        by_shard.append(_side_by_side(np.concatenate([copies, mask], axis=-1)))
        counts = mask.sum(axis=-1).reshape(-1, shards)
        uneven = counts[np.any(counts != counts[:, :1], axis=1)]
        if uneven.size:
            raise ValueError(
                f"masks of layer {i} turn on {uneven[0].tolist()} channels on the {shards} shards "
                "of F, which must be equal: use masks recorded on this mesh"
            )
    return sharding.placed(tuple(by_shard), "TBF", mesh)


def masks_from_shards(
    masks: Masks | None, partitions: Partitions | None, config: ModelConfig, mesh: Mesh | None
) -> Masks | None:
    """Inverse of `masks_to_shards`, on the default device."""
    if masks is None or partitions is None or mesh is None:
        return masks
    shards, found = sharding.shard_count(mesh), []
    for mask, part, layer in zip(masks, partitions, config.layers, strict=True):
        routed, split = _columns(part)
        of_experts, held = np.split(_apart(sharding.fetched(mask), shards), [routed], axis=-1)
        held = _side_by_side(held)
        if split is not None:
            held = held[..., _order(split, layer, shards)]
        found.append(jnp.asarray(np.concatenate([of_experts.any(axis=-2), held], axis=-1)))
    return tuple(found)


def _columns(part: Partition) -> tuple[int, ChannelPartition | None]:
    """How many of a mask's first columns are of experts, and whose channels the others are."""
    return part.routed if isinstance(part, ExpertPartition) else 0, unrouted(part)


def _apart(mask: np.ndarray, shards: int) -> np.ndarray:
    """Columns [..., n] of all shards as [..., shards, n / shards]."""
    return mask.reshape(*mask.shape[:-1], shards, mask.shape[-1] // shards)


def _side_by_side(mask: np.ndarray) -> np.ndarray:
    """Inverse of `_apart`."""
    return mask.reshape(*mask.shape[:-2], mask.shape[-2] * mask.shape[-1])


def mask_columns(part: Partition, mesh: Mesh | None) -> int:
    """Columns of a step's mask as a run holds it: of experts every shard has all of a token's."""
    copies = 0 if mesh is None else sharding.shard_count(mesh) - 1
    return part.evaluated + (part.routed * copies if isinstance(part, ExpertPartition) else 0)


def _order(part: ChannelPartition, layer: LayerConfig, shards: int) -> np.ndarray:
    """Where each evaluated channel of a partition of all F stands among those of the shards."""
    places = np.arange(part.evaluated).reshape(shards, -1)
    if part.evaluated < layer.mlp_dim:  # otherwise masks are in channel order on both sides
        places = np.split(places, [part.num_retained // len(places)], axis=1)
        places = np.concatenate([place.reshape(-1) for place in places])
    return places.reshape(-1)
