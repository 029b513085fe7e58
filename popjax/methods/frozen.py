"""Frozen: the partition of online pruning with no candidates, so the prompt's mask never changes.

Variant 1 of arXiv 2602.06822 (section 5, Table 22): what online re-scoring is measured against.
"""

from __future__ import annotations

import dataclasses

import jax

from popjax.config import LayerConfig, ModelConfig
from popjax.methods.method import LayerActs, Method, check_share
from popjax.methods.scores import channel_scores
from popjax.sparsity import ChannelPartition, Params, Plan, channel_budget, partition_by_rank


@dataclasses.dataclass(frozen=True)
class Frozen(Method):
    """Keep the (1 - ratio) F channels that score best on the prompt, for prefill and decode.

    Equal to OnlinePruning with gamma = 0. Raises ValueError for a ratio outside 0..1.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    @property
    def whole_prompt(self) -> bool:
        return True

    def evaluated(self, mlp_dim: int) -> int:
        return channel_budget(mlp_dim, self.ratio).evaluated

    def observe(self, params: Params, acts: LayerActs) -> jax.Array:
        return channel_scores(params, acts, "down")

    def prefill_partition(
        self, statistic: jax.Array, layer: LayerConfig, given: ChannelPartition | None
    ) -> ChannelPartition:
        return self._partition(statistic, layer) if given is None else given

    def plan(self, config: ModelConfig, statistics: tuple[jax.Array, ...]) -> Plan:
        pairs = zip(statistics, config.layers, strict=True)
        return Plan(tuple(self._partition(s, layer) for s, layer in pairs))

    def _partition(self, scores: jax.Array, layer: LayerConfig) -> ChannelPartition:
        return partition_by_rank(scores, channel_budget(layer.mlp_dim, self.ratio))
