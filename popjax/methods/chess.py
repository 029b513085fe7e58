"""CHESS (arXiv 2409.01366): gates below a threshold of their own channel close, before up is read.

A channel's gate a_i counts by how much it multiplies: a_i^2 E[u_i^2], u being what up gives, so the
threshold of a layer becomes t_i = sqrt(T / E[u_i^2]) for each of its channels. With attention=True
inputs of q and o below a threshold of their layer are taken for zero too; keys and values are
computed from whole inputs, since errors there stay in the cache.

What that saves: the CPU kernels read only the rows of up and down whose gate is open (batch 1).
Zeros among the inputs of q and o are masked, and save no bytes: their weights lie by output channel
here, and every row is read.
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
class CHESS(Method):
    """Zero gates with |a_i| <= t_i, T being the calibrated ratio-quantile of a_i^2 E[u_i^2].

    prefill: "masked" (default) prunes prompt tokens too, as the released code does, "dense" leaves
    them whole. attention: prune inputs of q and o too (the paper's CHESS; without it, "CHESS w/o").
    statistics: the file that `popjax calibrate channels` wrote. A ratio is met over the calibration
    text, not by each token, so counts vary. Raises ValueError for values out of range, a mixture
    and an FFN without a gate; CheckpointError, at a run, for statistics of another model.
    """

    ratio: float
    statistics: str
    prefill: str = "masked"
    attention: bool = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "statistics", statistics_path(self.statistics))
        check_prefill(self.prefill, self.attention)

    def for_model(self, config: ModelConfig) -> CHESS:
        check_dense("chess", config)
        if not config.gated:
            raise ValueError(
                f"chess closes gates, and the FFN of this {config.family} model has none: use teal"
            )
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
        leaves = {}
        for i, layer in enumerate(statistics):
            assert layer.up_energy is not None, "models without a gate are refused"
            value, rms = layer.threshold("gate", self.ratio), np.sqrt(layer.up_energy)
            # A channel of which up says nothing never matters: its gate stays shut.
            shut = np.full(rms.shape, np.finfo(np.float32).max)
            leaves[f"layer_{i}/mlp/calibrated"] = np.divide(
                value, rms, out=shut, where=rms > 0
            ).astype(np.float32)
        inputs = attention_thresholds(statistics, self.ratio) if self.attention else {}
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
        return thresholded_partition(statistic, "gate") if given is None else given

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        return thresholded_plan(config, statistics, "gate")

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection()
