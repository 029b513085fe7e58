"""Which channels of each expert are retained, candidate and pruned for a prompt.

The counterpart of `sparsity.ChannelPartition` for a mixture: one partition an expert, with equal
counts, so that indices are data. Rows are never packed, since any token may go to any expert:
decoding reads those of a token's own experts by index. Leaves out where scores come from.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from popjax.config import LayerConfig

if TYPE_CHECKING:
    from popjax.sparsity import ChannelPartition


@struct.dataclass
class ExpertPartition:
    """The channels of E experts: `retained` [E, R] always on, `candidate` [E, C] re-decided.

    Indices are int32 into the M channels of an expert, ascending. `k_selected` candidates of each
    of a token's `top_k` experts are on in a step. Experts that are `whole` [E] have every channel
    on; None where there can be none. `with_order` fills in candidate_norm [E, C], the L2 norms of
    the candidates' rows of down, and order [E, M], the evaluated channels first, and its inverse.
    shared: the channels of the FFN that every token uses; None where it keeps them all.
    """

    retained: jax.Array
    candidate: jax.Array
    whole: jax.Array | None = None
    candidate_norm: jax.Array | None = None
    order: jax.Array | None = None
    places: jax.Array | None = None
    shared: ChannelPartition | None = None
    k_selected: int = struct.field(pytree_node=False, default=0)
    top_k: int = struct.field(pytree_node=False, default=1)
    expert_dim: int = struct.field(pytree_node=False, default=0)

    @property
    def num_retained(self) -> int:
        return self.retained.shape[1]

    @property
    def num_candidate(self) -> int:
        return self.candidate.shape[1]

    @property
    def width(self) -> int:
        """Channels of an expert that a mask speaks of: R + C, or all where some may be whole."""
        kept = self.num_retained + self.num_candidate
        return kept if self.whole is None else self.expert_dim

    @property
    def routed(self) -> int:
        """Columns of a step's mask that a token's experts have, the best expert's first."""
        return self.top_k * self.width

    @property
    def evaluated(self) -> int:
        """Columns of a step's mask: those of experts, then those of `shared`."""
        return self.routed + (0 if self.shared is None else self.shared.evaluated)

    @property
    def routed_active(self) -> int:
        """Channels of a token's experts that are on, unless experts are whole."""
        return self.top_k * (self.num_retained + self.k_selected)

    @property
    def active(self) -> int:
        """Channels on for a token, unless experts are whole."""
        return self.routed_active + (0 if self.shared is None else self.shared.active)

    @property
    def in_order(self) -> bool:
        """Whether every channel is evaluated, so that masks are in the order of channels."""
        return self.num_retained + self.num_candidate == self.expert_dim

    @property
    def decided(self) -> bool:
        """Whether all candidates are on, so that a step has nothing to choose."""
        return self.k_selected == self.num_candidate

    @property
    def all_on(self) -> bool:
        """Whether every channel that a mask speaks of is on in every step."""
        return self.decided and self.whole is None

    def kept(self) -> jax.Array:
        """Bool [E, M]: R u C, or all of an expert that is whole."""
        E, M = self.retained.shape[0], self.expert_dim
        kept = jnp.zeros((E, M), bool)
        rows = jnp.arange(E, dtype=jnp.int32)[:, None]
        kept = kept.at[rows, self.retained].set(True).at[rows, self.candidate].set(True)
        return kept if self.whole is None else kept | self.whole[:, None]

    def counts(self) -> jax.Array | None:
        """How many of an expert's first channels by `order` are evaluated [E]; None for all W."""
        if self.whole is None:
            return None
        kept = self.num_retained + self.num_candidate
        return jnp.where(self.whole, self.expert_dim, kept).astype(jnp.int32)

    def candidate_places(self) -> jax.Array:
        """Where the candidates [E or 1, C] stand among an expert's evaluated channels."""
        if self.in_order:
            return self.candidate
        return self.num_retained + jnp.arange(self.num_candidate, dtype=jnp.int32)[None, :]


def experts_by_rank(
    scores: jax.Array, counts: tuple[int, int, int], layer: LayerConfig, whole: jax.Array | None
) -> ExpertPartition:
    """Partitions by descending scores [E, M]: of each expert the best are R, the next C.

    counts: how many of each, and how many candidates are on in a step. Stable, ties to the lower
    index.
    """
    retained, candidate, k_selected = counts
    order = jnp.argsort(-scores.astype(jnp.float32), axis=-1, stable=True).astype(jnp.int32)
    split = retained + candidate
    return ExpertPartition(
        retained=jnp.sort(order[:, :retained], axis=-1),
        candidate=jnp.sort(order[:, retained:split], axis=-1),
        whole=whole,
        k_selected=k_selected,
        top_k=layer.routed,
        expert_dim=layer.channels,
    )


def with_order(part: ExpertPartition, down: jax.Array) -> ExpertPartition:
    """The partition as decoding wants it, given down [E, M, D], or its tiles."""
    E, M = down.shape[:2]
    order = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (E, M))
    if not part.in_order:
        kept = dataclasses.replace(part, whole=None).kept()
        # A stable sort of booleans: first what is pruned, in order.
        pruned = jnp.argsort(kept, axis=-1, stable=True).astype(jnp.int32)
        pruned = pruned[:, : M - part.num_retained - part.num_candidate]
        order = jnp.concatenate([part.retained, part.candidate, pruned], axis=-1)
    norm = None
    if not part.all_on:
        experts = jnp.arange(E, dtype=jnp.int32)[:, None]
        rows = down[experts, part.candidate].astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(rows * rows, axis=tuple(range(2, rows.ndim))))
    places = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return dataclasses.replace(part, candidate_norm=norm, order=order, places=places)


def checked_experts(i: int, part: object, layer: LayerConfig) -> ExpertPartition:
    """A partition of layer i that a caller gave, as int32 arrays; ValueError unless it is valid."""
    if not isinstance(part, ExpertPartition):
        raise ValueError(f"partition of layer {i}, which has experts, is not an ExpertPartition")
    E, M = layer.moe.num_experts if layer.moe else 0, layer.channels
    sets = [np.asarray(part.retained), np.asarray(part.candidate)]
    shapes = [indices.shape for indices in sets]
    if any(len(shape) != 2 or shape[0] != E for shape in shapes):
        raise ValueError(
            f"partition of layer {i} has index arrays of shapes {shapes}: give [{E}, R] and "
            f"[{E}, C], a row an expert"
        )
    indices = np.sort(np.concatenate(sets, axis=1), axis=1)
    if not indices.shape[1] or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"partition of layer {i} keeps no channel, or indices are no integers")
    if indices.min() < 0 or indices.max() >= M or np.any(np.diff(indices, axis=1) == 0):
        raise ValueError(
            f"partition of layer {i} names a channel twice in one expert, or one outside 0..{M - 1}"
        )
    if not 0 <= part.k_selected <= sets[1].shape[1]:
        raise ValueError(f"k_selected {part.k_selected} of layer {i} is above its candidates")
    if (part.top_k, part.expert_dim) != (layer.routed, M):
        raise ValueError(
            f"partition of layer {i} is for {part.top_k} experts a token of {part.expert_dim} "
            f"channels, the layer has {layer.routed} of {M}"
        )
    retained, candidate = (jnp.asarray(np.sort(s, axis=1), jnp.int32) for s in sets)
    whole = None if part.whole is None else jnp.asarray(part.whole, bool)
    if whole is not None and whole.shape != (E,):
        raise ValueError(
            f"partition of layer {i} has whole of shape {whole.shape}: give [{E}], a bool an expert"
        )
    return ExpertPartition(
        retained,
        candidate,
        whole,
        k_selected=part.k_selected,
        top_k=part.top_k,
        expert_dim=M,
    )
