"""GateFirst: the gate of most channels is evaluated, and says which few of them a token needs.

Ours, of no paper. The prompt drops only the channels that it used least; of the others each token
takes its own best, judged by its gate: up is read of those alone, and down of the best of these by
what they then are. So at equal bytes far more channels can be chosen from than where the prompt
decides nearly all.
Left out: FFNs without a gate, and mixtures of experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.masked_mlp import Selection
from popjax.config import ModelConfig
from popjax.methods.method import LayerActs, Method, check_share
from popjax.methods.row_budgets import ENDS, rows_of_online_pruning, rows_with_dense_ends
from popjax.methods.scores import gain_factors, token_norms, weight_scores
from popjax.packing import down_norms
from popjax.sparsity import (
    ChannelBudget,
    ChannelPartition,
    Params,
    Plan,
    partition_by_rank,
)


@struct.dataclass
class GateStatistic:
    """Of each channel, [F] float32: ||h_i|| ||Wd_i|| and ||u_i|| of the prompt, and by weights.

    h and u are gated and up activations, their norms over the prompt's tokens. `gain`: the factor
    of a norm that follows the layer, of which `used` and `weights` have it already; one without.
    """

    used: jax.Array
    up: jax.Array
    weights: jax.Array
    gain: jax.Array


@dataclasses.dataclass(frozen=True)
class GateBudget(ChannelBudget):
    """Counts of a layer; of `tried` channels up is evaluated before the product chooses."""

    tried: int


@dataclasses.dataclass(frozen=True)
class GateFirst(Method):
    """Prune as many bytes of a step as OnlinePruning at `ratio`, choosing channels by their gate.

    A step evaluates the gates of the E channels that the prompt used most, ranks these for each
    token by |act(g_i)| ||u_i|| ||Wd_i||, with ||u_i|| over the prompt's tokens in the place of this
    token's |u_i| and Wd_i times the gain of a norm that follows, evaluates up of the best U, and
    ranks these by |h_i| ||Wd_i||: down is read of the best K. E + U + K rows are what OnlinePruning
    reads (gamma 0.1), more than half of them gates: see `gate_budget`. The prompt runs dense.

    ends: "pruned" treats all layers alike; "dense" leaves the first and the last whole and prunes
      the others more, at the same bytes in all. First and last of those that run the prompt, where
      a depth method skips some.
    static: the share that the weights alone, ||Wg_i|| ||Wu_i|| ||Wd_i||, have in the choice of E,
      beside the prompt's ||h_i|| ||Wd_i||, either scaled to a mean of one.
    batch_shared: one choice for the batch; by row otherwise.
    Raises ValueError for values outside their range.
    """

    ratio: float
    ends: str = "pruned"
    static: float = 0.0
    batch_shared: bool = False

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        check_share("static", self.static)
        if self.ends not in ENDS:
            raise ValueError(f"ends {self.ends!r} is unknown: use one of {ENDS}")

    def for_model(self, config: ModelConfig) -> GateFirst:
        mixture = any(layer.moe is not None for layer in config.layers)
        if mixture or not config.gated:
            lacking = "mixtures of experts" if mixture else "no gate"
            raise ValueError(
                f"gate-first chooses channels of gated FFNs by their gate, and this "
                f"{config.family} model has {lacking}: use online-pruning"
            )
        self.budgets(config)
        return self

    def budgets(self, config: ModelConfig) -> tuple[GateBudget, ...]:
        """Counts of each layer. Raises ValueError where dense ends leave the others nothing."""
        widths = [layer.channels for layer in config.layers]
        rows = [rows_of_online_pruning(F, self.ratio) for F in widths]
        if self.ends == "dense":
            rows = rows_with_dense_ends(widths, rows)
        return tuple(map(gate_budget, widths, rows))

    def evaluated(self, mlp_dim: int) -> int:
        return gate_budget(mlp_dim, rows_of_online_pruning(mlp_dim, self.ratio)).evaluated

    def observe(self, params: Params, acts: LayerActs) -> GateStatistic:
        used = token_norms(acts.counted_channels()) * down_norms(params["down"])
        factors = gain_factors(params, acts)
        gain = jnp.ones_like(used) if factors is None else factors
        ups = token_norms(acts.counted_ups())
        return GateStatistic(used * gain, ups, weight_scores(params) * gain, gain)

    def combine(self, before: GateStatistic, now: GateStatistic) -> GateStatistic:
        found = super().combine(before, now)
        return dataclasses.replace(found, weights=now.weights, gain=now.gain)

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        pairs = zip(statistics, self.budgets(config), strict=True)
        return Plan(tuple(self._partition(*pair) for pair in pairs))

    def _partition(self, statistic: GateStatistic, budget: GateBudget) -> ChannelPartition:
        scores = (1 - self.static) * _scaled(statistic.used)
        scores = scores + self.static * _scaled(statistic.weights)
        part = partition_by_rank(scores, budget)
        return dataclasses.replace(
            part,
            candidate_factor=statistic.gain[part.candidate],
            candidate_up=statistic.up[part.candidate],
            tried=budget.tried,
            point="gate",
        )

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection(shared=self.batch_shared)


def gate_budget(mlp_dim: int, rows: int) -> GateBudget:
    """How so many rows of F channels are spent: on E gates, then up of the best U, down of K.

    Nine of sixteen on gates, but on no more than there are, and of what is left nine of fourteen on
    up: E = 0.9 F, U = 0.45 F and K = 0.25 F where OnlinePruning reads 1.6 F rows, at ratio 0.5.
    """
    evaluated = min(mlp_dim, rows * 9 // 16)
    tried = min(evaluated, (rows - evaluated) * 9 // 14)
    return GateBudget(0, evaluated, rows - evaluated - tried, tried)


def _scaled(scores: jax.Array) -> jax.Array:
    """Scores [F] scaled to a mean of one; all-zero ones as they are."""
    mean = jnp.mean(scores)
    return scores / jnp.where(mean > 0, mean, 1.0)
