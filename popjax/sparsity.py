"""Budgets and partitions: a ratio becomes counts, scores become sets.

Counts are integers fixed before tracing, indices are data, so one compile serves every prompt. Sets
are rank-based (stable descending float32 scores, ties to the lower index), never thresholds.
Leaves out where scores come from: that is a method's business.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.masked_mlp import Selection
from popjax.config import LayerConfig, ModelConfig
from popjax.expert_partition import ExpertPartition

Params = dict[str, Any]
POINTS = ("product", "gate", "scout")
_LOG = logging.getLogger(__name__)
_NOTICED = 0.05  # the share of a layer's channels by which a rounded budget may differ in silence


def rounded(value: float) -> int:
    """floor(value + 0.5 + 1e-9): halves go up, and products such as 0.15 * 20 land on integers."""
    return math.floor(value + 0.5 + 1e-9)


@dataclasses.dataclass(frozen=True)
class ChannelBudget:
    """Counts for one layer of F channels: always on, re-decided each step, chosen of those."""

    retained: int
    candidate: int
    k_selected: int

    @property
    def active(self) -> int:
        return self.retained + self.k_selected

    @property
    def evaluated(self) -> int:
        return self.retained + self.candidate


def channel_budget(
    mlp_dim: int, ratio: float, delta: float = 0.0, granularity: int = 1
) -> ChannelBudget:
    """Counts of a partition of `mlp_dim` channels that prunes the share `ratio`, band +-`delta`.

    |R| = F - rnd(min(r+delta, 1) F); |P| = rnd(max(r-delta, 0) F); |C| the rest; chosen so that
    F - rnd(r F) channels are active (arXiv 2602.06822 section 3.3, counts derived). A granularity
    above 1 rounds |R|, |R|+|C| and the active count up to its multiples, at most F.
    """

    def up(count: int) -> int:
        return min(mlp_dim, math.ceil(count / granularity) * granularity)

    retained = up(mlp_dim - rounded(min(ratio + delta, 1.0) * mlp_dim))
    evaluated = up(mlp_dim - rounded(max(ratio - delta, 0.0) * mlp_dim))
    active = min(max(up(mlp_dim - rounded(ratio * mlp_dim)), retained), evaluated)
    return ChannelBudget(retained, evaluated - retained, active - retained)


def warn_of_rounding(config: ModelConfig, ratio: float, delta: float, granularity: int) -> None:
    """Log a warning where a granularity makes another budget than was asked for.

    That is a layer whose pruned share it moves by more than a twentieth, or whose candidates it
    rounds away; the first such layer speaks for all.
    """
    for i, layer in enumerate(config.layers):
        F = layer.channels
        asked = channel_budget(F, ratio, delta)
        found = channel_budget(F, ratio, delta, granularity)
        lost = bool(asked.candidate) and not found.candidate
        if lost or abs(found.active - asked.active) > _NOTICED * F:
            _LOG.warning(
                "granularity %d is coarse for the %d FFN channels of layer %d: asked for ratio "
                "%.3g with %d candidates, got %.3g with %d; lower the granularity",
                *(granularity, F, i, ratio, asked.candidate),
                *(1 - found.active / F, found.candidate),
            )
            return


def ffn_ratio(config: ModelConfig, model_ratio: float, shared: bool = False) -> float:
    """FFN ratio r that prunes the share `model_ratio` of attention plus FFN parameters.

    r = PR (A + F) / F with A and F the attention and FFN parameters of the layers, embeddings and
    norms excluded; reproduces Table 8 of arXiv 2602.06822. Of a mixture F are the experts that a
    token is routed to, not the router, and what every token uses only where that is pruned too
    (`shared`, [inferred]). Raises ValueError where r exceeds 1.
    """
    attention = sum(
        2 * config.embed_dim * layer.head_dim * (layer.num_heads + layer.num_kv_heads)
        for layer in config.layers
    )
    width = config.mlp_matrices * config.embed_dim
    ffn = sum(width * layer.routed * layer.channels for layer in config.layers)
    if shared:
        ffn += sum(width * layer.mlp_dim for layer in config.layers if layer.moe is not None)
    ratio = model_ratio * (attention + ffn) / ffn
    if ratio > 1:
        raise ValueError(
            f"model_ratio {model_ratio} needs an FFN ratio of {ratio:.3f}, above 1: "
            f"this model can lose at most {ffn / (attention + ffn):.3f} through its FFN"
        )
    return ratio


@struct.dataclass
class ChannelPartition:
    """One layer's channels: `retained` [R] always on, `candidate` [C] re-decided at every step.

    Indices are int32 into the F channels, ascending; the others are off for this prompt.
    `k_selected` candidates are on in a step, at most so many where each has a `threshold` [C] that
    its activation must exceed. `candidate_norm` [C], the L2 norms of their rows of down times
    `candidate_factor` [C] where there is one, and `packed` (weights hold exactly [R | C], in that
    order) are filled in by `pack`; so is `indexed`, where decoding fetches these rows from the full
    weights instead. point: what candidates are scored by: the "product" of gate and up, the "gate"
    alone, or that product in the copies of a "scout". What comes after is read only where chosen.
    exact: of those a scout chose, how many use gate and up themselves; None for all. tried: at the
    point "gate", how many are chosen by it, times `candidate_up` [C], what |up| may be, before the
    product says which of them are on; None: no more than are on.
    """

    retained: jax.Array
    candidate: jax.Array
    candidate_norm: jax.Array | None = None
    threshold: jax.Array | None = None
    candidate_factor: jax.Array | None = None
    candidate_up: jax.Array | None = None
    k_selected: int = struct.field(pytree_node=False, default=0)
    point: str = struct.field(pytree_node=False, default="product")
    exact: int | None = struct.field(pytree_node=False, default=None)
    tried: int | None = struct.field(pytree_node=False, default=None)
    packed: bool = struct.field(pytree_node=False, default=False)
    indexed: bool = struct.field(pytree_node=False, default=False)

    @property
    def num_retained(self) -> int:
        return self.retained.shape[0]

    @property
    def num_candidate(self) -> int:
        return self.candidate.shape[0]

    @property
    def evaluated(self) -> int:
        return self.num_retained + self.num_candidate

    @property
    def active(self) -> int:
        return self.num_retained + self.k_selected

    @property
    def decided(self) -> bool:
        """Whether all candidates are on, so that a step has nothing to choose."""
        some = self.k_selected < self.num_candidate or self.threshold is not None
        return not some and self.exact is None

    def kept_mask(self, mlp_dim: int) -> jax.Array:
        """Bool mask [F] of R u C."""
        kept = jnp.zeros((mlp_dim,), bool)
        return kept.at[self.retained].set(True).at[self.candidate].set(True)

    def selection(self, *, weighted: bool = True, shared: bool = False) -> Selection | None:
        """The choice of k_selected candidates by |h_i| ||Wd_i||_2, or |h_i|; None: all are on.

        At the point "gate" by |act(g_i)| instead of |h_i|. `shared`: one choice for the batch, by
        the L2 norm over it. `pack` provides the norms. With thresholds the candidates that exceed
        them, each row and token for itself.
        """
        if self.threshold is not None:
            return Selection(
                candidate=None if self.packed or self.num_retained == 0 else self.candidate,
                threshold=self.threshold,
                num_candidate=self.num_candidate,
                k_selected=self.k_selected,
                point=self.point,
            )
        if self.decided:
            return None
        if weighted and self.candidate_norm is None:
            raise ValueError("a weighted choice needs candidate norms: pack() the partition first")
        # Whether the candidates are the last C evaluated channels: a slice, not a gather.
        last = self.packed or self.num_retained == 0
        return Selection(
            candidate=None if last else self.candidate,
            weight=self.candidate_norm if weighted else None,
            num_candidate=self.num_candidate,
            k_selected=self.k_selected,
            shared=shared,
            # A scout's is a product too, of its own gate and up.
            point="gate" if self.point == "gate" else "product",
            exact=self.exact,
            expected=self.candidate_up,
            tried=self.tried,
        )


ChannelPartitions = tuple[ChannelPartition, ...]
Partition = ChannelPartition | ExpertPartition
Partitions = tuple[Partition, ...]


def unrouted(part: Partition) -> ChannelPartition | None:
    """The part of a layer's partition that is of the FFN that every token uses."""
    return part.shared if isinstance(part, ExpertPartition) else part


def with_unrouted(part: Partition, other: ChannelPartition | None) -> Partition:
    """The partition with another of the FFN that every token uses; with None as it is."""
    if other is None:
        return part
    if isinstance(part, ExpertPartition):
        return dataclasses.replace(part, shared=other)
    return other


@struct.dataclass
class Plan:
    """What a method decided for a prompt: one partition a layer, or None for dense."""

    channels: Partitions | None = None


def whole_partition(layer: LayerConfig) -> Partition:
    """The partition of a layer that keeps every channel on, of all of its experts."""
    every = jnp.arange(layer.channels, dtype=jnp.int32)
    if layer.moe is None:
        return ChannelPartition(every, every[:0])
    shape = (layer.moe.here, layer.channels)
    retained = jnp.broadcast_to(every[None, :], shape)
    sizes: dict[str, Any] = {"top_k": layer.routed, "expert_dim": layer.channels}
    return ExpertPartition(retained, retained[:, :0], **sizes)


def partition_by_rank(scores: jax.Array, budget: ChannelBudget) -> ChannelPartition:
    """Partition of the channels by descending scores [F]: the best are R, the next C."""
    order = jnp.argsort(-scores.astype(jnp.float32), stable=True).astype(jnp.int32)
    split = budget.retained + budget.candidate
    return ChannelPartition(
        retained=jnp.sort(order[: budget.retained]),
        candidate=jnp.sort(order[budget.retained : split]),
        k_selected=budget.k_selected,
    )


def thresholded_partition(threshold: jax.Array, point: str = "product") -> ChannelPartition:
    """Every channel a candidate, on where it exceeds its own of threshold [F] at `point`."""
    every = jnp.arange(threshold.shape[0], dtype=jnp.int32)
    return ChannelPartition(
        every[:0], every, threshold=threshold, k_selected=threshold.shape[0], point=point
    )


def keeps_order(part: ChannelPartition, mlp_dim: int) -> bool:
    """Whether every channel is evaluated, so that the unpacked weights serve as they are."""
    return part.evaluated == mlp_dim
