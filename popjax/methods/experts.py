"""What methods share about mixtures: what an expert shows them, and a partition for each expert.

The paper (arXiv 2602.06822) names no rule for mixtures. Ours [inferred]: each expert is ranked by
the prompt tokens routed to it, and one that too few went to by its weights alone, or is left whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from popjax.config import LayerConfig
from popjax.expert_partition import ExpertPartition, experts_by_rank
from popjax.methods.scores import weight_scores
from popjax.nn.moe import Order, Routes, order_of, ragged_channels, ragged_output
from popjax.sparsity import ChannelBudget, ChannelPartition, Params, partition_by_rank

UNSEEN = ("weights", "dense")


@struct.dataclass
class ExpertStatistic:
    """What a prompt shows of the experts of a layer.

    scores [E, M]; tokens [E]: the square root of how many went to each, so that chunks of a prompt
    add up as norms do; weights [E, M]: importance by their weights of the channels of experts that
    are unseen, zero of others: what a whole prompt leaves unseen every chunk of it does. shared:
    the statistic of what every token uses, () where that is not pruned.
    """

    scores: jax.Array
    tokens: jax.Array
    weights: jax.Array
    shared: Any = ()


@dataclasses.dataclass(frozen=True)
class ExpertRules:
    """How experts are ranked: those with fewer than `min_tokens` prompt tokens are unseen.

    unseen: "weights" ranks their channels by ||Wg_i|| ||Wu_i|| ||Wd_i||, "dense" keeps them all.
    """

    min_tokens: int = 1
    unseen: str = "weights"

    def __post_init__(self) -> None:
        whole = isinstance(self.min_tokens, int) and not isinstance(self.min_tokens, bool)
        # An expert that no token reached has no scores to be ranked by.
        if not whole or self.min_tokens < 1:
            raise ValueError(
                f"min_tokens {self.min_tokens!r} is not a whole number of at least 1: give the "
                "tokens that an expert must have seen"
            )
        if self.unseen not in UNSEEN:
            raise ValueError(f"unseen {self.unseen!r} is unknown: use one of {UNSEEN}")

    def seen(self, tokens: jax.Array) -> jax.Array:
        """Which experts [E] are ranked by the prompt, given the roots of their tokens [E]."""
        return tokens * tokens > self.min_tokens - 0.5


class ExpertActs:
    """What the experts of one layer show to `observe` in prefill; the counterpart of `LayerActs`.

    x [N, D] are the tokens, E the experts of this device. Channels are evaluated when first asked
    for. gate_weighted: squares count by the square of the router's weight.
    """

    def __init__(self, x: jax.Array, routes: Routes, params: Params, activation: str) -> None:
        self.x, self.routes, self.activation = x, routes, activation
        self.order: Order = order_of(routes, params["down"].shape[0])
        self._params = params
        self._h: jax.Array | None = None

    def channels(self) -> jax.Array:
        """h [N k, M] of pairs of a token and an expert, sorted by expert."""
        if self._h is None:
            weights = (self.order, self.routes, self._params)
            self._h = ragged_channels(self.x, *weights, self.activation)
        return self._h

    def energy(self, *, normalised: bool = False, gate_weighted: bool = False) -> jax.Array:
        """Sum [E, M] of h_i^2 over an expert's tokens, each token's h first normalised if asked."""
        h = self.channels().astype(jnp.float32)
        squares = h * h
        if normalised:
            lengths = jnp.sum(squares, axis=-1, keepdims=True)
            squares = squares / jnp.where(lengths > 0, lengths, 1.0)
        return self._by_expert(squares, gate_weighted)

    def input_energy(self, *, gate_weighted: bool = False) -> jax.Array:
        """Sum [E, D] of x_k^2 over an expert's tokens."""
        x = self.order.tokens(self.x.astype(jnp.float32), self.routes.experts.shape[1])
        return self._by_expert(x * x, gate_weighted)

    def output(self, kept: jax.Array | None = None) -> jax.Array:
        """What the experts give [N, D], of the channels kept [E, M] or all."""
        h = self.channels()
        if kept is not None:
            held = jnp.minimum(self._experts(), kept.shape[0] - 1)
            h = jnp.where(kept[held], h, jnp.zeros((), h.dtype))
        return ragged_output(h, self.order, self.routes, self._params)

    def _experts(self) -> jax.Array:
        return self.order.sort(self.routes.experts.reshape(-1))

    def _by_expert(self, squares: jax.Array, gate_weighted: bool) -> jax.Array:
        if gate_weighted:
            squares = squares * (self.order.sort(self.routes.weights.reshape(-1)) ** 2)[:, None]
        options = {"cpu": _sums_by_index, "default": _sums_by_product}
        return jax.lax.platform_dependent(squares, self._experts(), self.order.sizes, **options)


def _sums_by_index(rows: jax.Array, experts: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sums [E, n] of the rows [N k, n] of each expert: on a CPU a tenth of the product's time.

    Rows that go nowhere have an expert beyond the last, and are left out.
    """
    count = sizes.shape[0]
    return jax.ops.segment_sum(rows, experts, num_segments=count, indices_are_sorted=True)


def _sums_by_product(rows: jax.Array, experts: jax.Array, sizes: jax.Array) -> jax.Array:
    """As `_sums_by_index` where that would run row after row."""
    share = jax.nn.one_hot(experts, sizes.shape[0], dtype=jnp.float32)
    return jnp.einsum("ME,MF->EF", share, rows, precision="highest")


def row_norms(w: jax.Array) -> jax.Array:
    """L2 norm [E, M], float32, of every row of w [E, M, D], or of its tiles."""
    w = w.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(w * w, axis=tuple(range(2, w.ndim))))


def weight_scores_of(params: Params, wanted: jax.Array) -> jax.Array:
    """||Wg_i|| ||Wu_i|| ||Wd_i|| [E, M] of the experts wanted [E] bool, and zeros of the others.

    One after the other, so that what is not wanted is not read.
    """
    first = jnp.argsort(~wanted, stable=True)

    def with_expert(i: jax.Array, scores: jax.Array) -> jax.Array:
        one = {name: params[name][first[i]] for name in ("gate", "up", "down")}
        return scores.at[first[i]].set(weight_scores(one))

    none = jnp.zeros(params["down"].shape[:2], jnp.float32)
    return jax.lax.fori_loop(0, jnp.sum(wanted), with_expert, none)


def expert_scores(
    params: Params,
    acts: ExpertActs,
    kind: str,
    gate_weighted: bool = False,
    rules: ExpertRules = ExpertRules(),
) -> ExpertStatistic:
    """Importance of each channel of each expert: `scores.channel_scores` over its own tokens.

    Kind "griffin" is || {h_ti / ||h_t||}_t || with no weight.
    """
    if kind == "gate-up":
        gate, up = (params[name].astype(jnp.float32) for name in ("gate", "up"))
        squares = gate * gate + up * up
        energy = acts.input_energy(gate_weighted=gate_weighted)
        squares = squares.reshape(*squares.shape[:2], -1)
        scores = jnp.sqrt(jnp.einsum("EMD,ED->EM", squares, energy))
    else:
        normalised = kind == "griffin"
        scores = jnp.sqrt(acts.energy(normalised=normalised, gate_weighted=gate_weighted))
        scores = scores * row_norms(params["down"]) if kind == "down" else scores
    tokens = jnp.sqrt(acts.order.sizes.astype(jnp.float32))
    unseen = ~rules.seen(tokens) & (rules.unseen == "weights")
    return ExpertStatistic(scores, tokens, weight_scores_of(params, unseen))


def partition_of(
    statistic: Any, layer: LayerConfig, budget: ChannelBudget, rules: ExpertRules = ExpertRules()
) -> ChannelPartition | ExpertPartition:
    """The partition of a layer by its statistic, one for each expert where it has any."""
    if layer.moe is None:
        return partition_by_rank(statistic, budget)
    seen = rules.seen(statistic.tokens)
    scores, whole = statistic.scores, None
    if rules.unseen == "weights":
        scores = jnp.where(seen[:, None], scores, statistic.weights)
    else:
        whole = ~seen
    counts = (budget.retained, budget.candidate, budget.k_selected)
    return experts_by_rank(scores, counts, layer, whole)
