"""Checking the partitions that a caller gives, and putting them in order.

Leaves out which channels are in them: methods decide that, or whoever replays a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax.config import LayerConfig, ModelConfig
from popjax.expert_partition import ExpertPartition, checked_experts
from popjax.sparsity import POINTS, ChannelPartition, Partition, Partitions


def checked_partitions(partitions: Sequence[Partition], config: ModelConfig) -> Partitions:
    """The partitions a caller gave, as ascending int32 arrays whatever they came as.

    Raises ValueError unless there is one valid partition of each layer's channels.
    """
    if not isinstance(partitions, Sequence) or not all(
        isinstance(part, Partition) for part in partitions
    ):
        raise ValueError("partition is not a sequence of ChannelPartition: give one a layer")
    if len(partitions) != config.num_layers:
        raise ValueError(
            f"partition has {len(partitions)} layers, the model has {config.num_layers}: "
            "give one each"
        )
    pairs = enumerate(zip(partitions, config.layers, strict=True))
    return tuple(_checked_partition(i, part, layer) for i, (part, layer) in pairs)


def _checked_partition(i: int, part: Partition, layer: LayerConfig) -> Partition:
    if layer.moe is not None:
        checked = checked_experts(i, part, layer)
        if not isinstance(part, ExpertPartition) or part.shared is None:
            return checked
        if not layer.mlp_dim:
            raise ValueError(
                f"partition of layer {i} has a part for an FFN that every token uses, and the "
                "layer has only experts: make its `shared` None"
            )
        beside = _checked_channels(i, part.shared, layer)
        return dataclasses.replace(checked, shared=beside)
    if isinstance(part, ExpertPartition):
        raise ValueError(f"partition of layer {i} is one of experts, and the layer has none")
    return _checked_channels(i, part, layer)


def _checked_channels(i: int, part: ChannelPartition, layer: LayerConfig) -> ChannelPartition:
    sets = [np.asarray(part.retained), np.asarray(part.candidate)]
    if any(indices.ndim != 1 for indices in sets):
        raise ValueError(
            f"partition of layer {i} has index arrays of shapes {[s.shape for s in sets]}: "
            "give one axis each"
        )
    indices = np.concatenate([indices for indices in sets if indices.size] or sets)
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"partition of layer {i} holds {indices.dtype} indices: use integers")
    if indices.size == 0:
        raise ValueError(
            f"partition of layer {i} keeps no channel: keep at least one of {layer.mlp_dim}"
        )
    outside = indices[(indices < 0) | (indices >= layer.mlp_dim)]
    if outside.size:
        raise ValueError(
            f"partition of layer {i} names channel {outside[0]}, outside 0..{layer.mlp_dim - 1}"
        )
    if np.unique(indices).size != indices.size:
        raise ValueError(f"partition of layer {i} names a channel twice: each belongs to one set")
    whole = isinstance(part.k_selected, int | np.integer)
    if not whole or not 0 <= part.k_selected <= sets[1].size:
        raise ValueError(
            f"k_selected {part.k_selected!r} of layer {i} is outside 0..{sets[1].size}, "
            "the number of candidates"
        )
    retained, candidate = (jnp.asarray(np.sort(indices), jnp.int32) for indices in sets)
    order = np.argsort(sets[1])
    threshold = part.threshold
    if threshold is not None:
        if threshold.shape != candidate.shape:
            raise ValueError(
                f"partition of layer {i} has thresholds of shape {threshold.shape} for "
                f"{sets[1].size} candidates: give one each"
            )
        threshold = jnp.asarray(threshold, jnp.float32)[order]
    fields: dict[str, Any] = {"point": part.point, "exact": part.exact, "threshold": threshold}
    fields |= {
        "candidate_factor": _checked_factor(i, part, order, "candidate_factor"),
        "candidate_up": _checked_factor(i, part, order, "candidate_up"),
        "tried": part.tried,
        "k_selected": int(part.k_selected),
    }
    return ChannelPartition(retained, candidate, **fields)


def _checked_factor(
    i: int, part: ChannelPartition, order: np.ndarray, name: str
) -> jax.Array | None:
    """The factors [C] of this name in order of candidates; ValueError for another number."""
    if part.point not in POINTS:
        raise ValueError(f"point {part.point!r} of layer {i} is unknown: use one of {POINTS}")
    given = getattr(part, name)
    if given is None:
        return None
    factor = np.asarray(given, np.float32)
    if factor.shape != order.shape:
        raise ValueError(
            f"{name} of layer {i} has shape {factor.shape}, expected {order.shape}: give "
            "each candidate one"
        )
    return jnp.asarray(factor[order])
