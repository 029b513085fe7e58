"""Wanda-sp: static channels of least weight times calibrated activation; FLAP's first baseline.

After Wanda (arXiv 2306.11695) in the structured form of the code released with FLAP (arXiv
2312.11983). Only FFN channels are pruned, at one ratio in every layer; attention stays dense, where
that code prunes heads too. The prompt decides nothing, and runs pruned itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from popjax.calibration.statistics import ChannelStatistics, check_dense, statistics_path
from popjax.config import LayerConfig, ModelConfig
from popjax.methods.method import Calibrated, LayerActs, Method, check_share
from popjax.sparsity import (
    ChannelPartition,
    Params,
    Partitions,
    Plan,
    channel_budget,
    partition_by_rank,
)


@dataclasses.dataclass(frozen=True)
class WandaSP(Method):
    """Keep the (1 - ratio) F channels with the largest mean_o |Wd_oi| sqrt(E[h_i^2]).

    statistics: the file that `popjax calibrate channels` wrote, which says E[h_i^2] over a text.
    Raises ValueError for a ratio outside 0..1 or no path, and for a mixture; CheckpointError, at a
    run, for statistics of another model.
    """

    ratio: float
    statistics: str

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "statistics", statistics_path(self.statistics))

    def for_model(self, config: ModelConfig) -> WandaSP:
        check_dense("wanda-sp", config)
        return self

    @property
    def calibration(self) -> str:
        return self.statistics

    def calibrated(
        self,
        statistics: ChannelStatistics,
        params: Params,
        config: ModelConfig,
        partition: Partitions | None,
    ) -> Calibrated:
        pairs = enumerate(statistics)
        leaves = {f"layer_{i}/mlp/calibrated": np.sqrt(y.energy) for i, y in pairs}
        return Calibrated(leaves, partition)

    def evaluated(self, mlp_dim: int) -> int:
        return channel_budget(mlp_dim, self.ratio).evaluated

    def observe(self, params: Params, acts: LayerActs) -> Any:
        weights = jnp.abs(params["down"].astype(jnp.float32))
        return jnp.mean(weights, axis=1) * params["calibrated"]

    def combine(self, before: Any, now: Any) -> Any:
        return now

    def prefill_partition(self, statistic: Any, layer: LayerConfig, given: Any) -> Any:
        return self._partition(statistic, layer) if given is None else given

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        pairs = zip(statistics, config.layers, strict=True)
        return Plan(tuple(self._partition(s, layer) for s, layer in pairs))

    def _partition(self, statistic: Any, layer: LayerConfig) -> ChannelPartition:
        return partition_by_rank(statistic, channel_budget(layer.mlp_dim, self.ratio))
