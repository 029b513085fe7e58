"""TEAL (arXiv 2408.14690): small inputs of products are taken for zero, by calibrated thresholds.

What is pruned: at the FFN the inputs of gate and up, and the channels that down reads; with
attention=True the inputs of q and of o too. Keys and values are computed from whole inputs, unlike
in the paper, since errors there would stay in the cache. Every site has the same sparsity; the
paper's greedy search for one each is left out.

What that saves: the CPU kernels read only the rows of down whose channel is on (batch 1). Zeros
among the inputs of gate, up, q and o are masked, and save no bytes: their weights lie by output
channel here, and every row is read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from kernels_pallas.masked_mlp import Selection
from popjax.calibration.statistics import ChannelStatistics, check_dense, statistics_path
from popjax.config import LayerConfig, ModelConfig
from popjax.methods.method import Calibrated, LayerActs, Method, check_share
from popjax.methods.thresholds import attention_thresholds, check_prefill, thresholded_plan
from popjax.sparsity import ChannelPartition, Params, Partitions, Plan, thresholded_partition


@dataclasses.dataclass(frozen=True)
class TEAL(Method):
    """Zero what is at most the calibrated ratio-quantile of |x|, of the FFN's inputs and channels.

    prefill: "dense" (default) runs the prompt unpruned, "masked" prunes all of its tokens; the
    released code evaluates with the last half of them pruned. attention: prune inputs of q and o
    too. statistics: the file that `popjax calibrate channels` wrote. A ratio is met over the
    calibration text, not by each token, so counts vary. Raises ValueError for values out of range
    and a mixture; CheckpointError, at a run, for statistics of another model.
    """

    ratio: float
    statistics: str
    prefill: str = "dense"
    attention: bool = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "statistics", statistics_path(self.statistics))
        check_prefill(self.prefill, self.attention)

    def for_model(self, config: ModelConfig) -> TEAL:
        check_dense("teal", config)
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
        if self.ratio == 0:
            return Calibrated({}, partition)
        leaves, inputs = {}, {}
        for i, layer in enumerate(statistics):
            value = layer.threshold("down", self.ratio)
            leaves[f"layer_{i}/mlp/calibrated"] = np.full(layer.energy.shape, value, np.float32)
            inputs[f"layer_{i}/mlp_threshold"] = np.float32(layer.threshold("mlp", self.ratio))
        if self.attention:
            inputs |= attention_thresholds(statistics, self.ratio)
        if self.prefill == "masked":
            return Calibrated({**leaves, **inputs}, partition)
        return Calibrated(leaves, partition, inputs)

    def observe(self, params: Params, acts: LayerActs) -> Any:
        return params.get("calibrated", ())

    def combine(self, before: Any, now: Any) -> Any:
        return now

    def prefill_partition(self, statistic: Any, layer: LayerConfig, given: Any) -> Any:
        if self.prefill == "dense" or isinstance(statistic, tuple):
            return None
        return thresholded_partition(statistic) if given is None else given

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        return thresholded_plan(config, statistics)

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection()
