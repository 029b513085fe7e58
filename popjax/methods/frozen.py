"""Frozen: the partition of online pruning with no candidates, so the prompt's mask never changes.

Variant 1 of arXiv 2602.06822 (section 5, Table 22): what online re-scoring is measured against.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from popjax.config import LayerConfig, ModelConfig
from popjax.methods.experts import ExpertActs, expert_scores, partition_of
from popjax.methods.method import LayerActs, Method, check_share
from popjax.methods.scores import channel_scores
from popjax.sparsity import Params, Partition, Plan, channel_budget


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

    def observe(self, params: Params, acts: LayerActs | ExpertActs) -> Any:
        if isinstance(acts, ExpertActs):
            return expert_scores(params, acts, "down")
        return channel_scores(params, acts, "down")

    def prefill_partition(self, statistic: Any, layer: LayerConfig, given: Any) -> Partition:
        return self._partition(statistic, layer) if given is None else given

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        pairs = zip(statistics, config.layers, strict=True)
        return Plan(tuple(self._partition(s, layer) for s, layer in pairs))

    def _partition(self, statistic: Any, layer: LayerConfig) -> Partition:
        return partition_of(statistic, layer, channel_budget(layer.channels, self.ratio))
