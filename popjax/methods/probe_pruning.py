"""Probe Pruning (ICLR 2025; its released code): a probe of the prompt, fused with history.

A few prompt tokens show which channels this prompt uses; what a calibration text showed is mixed in
channel by channel, each of the two weighted by its own share. Only FFN channels are pruned. As
released every batch is probed anew and history follows with momentum 0.99; here the prompt is
probed once, for itself and for what is decoded after it, and history stays what was calibrated, so
that a run depends on nothing before it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from popjax.calibration.statistics import ChannelStatistics, check_dense, statistics_path
from popjax.config import LayerConfig, ModelConfig
from popjax.methods.method import Calibrated, LayerActs, Method, check_share
from popjax.methods.probe import probe_acts
from popjax.sparsity import (
    ChannelPartition,
    Params,
    Partitions,
    Plan,
    channel_budget,
    partition_by_rank,
    whole_partition,
)


@dataclasses.dataclass(frozen=True)
class ProbePruning(Method):
    """Keep the channels of largest ||e'_i Wd_i^2||_2, e' = sum_p (e_p^2 + g^2) / (e_p + g).

    e_p [F]: mean over probed rows of h^2 at probed position p (`probe.py`); g [F]: E[h^2] of the
    calibration, where the code has one for each position [inferred]. The first `dense_layers`
    layers stay whole (the code's default: 3), the others lose ratio L / (L - dense_layers) of their
    channels, so that `ratio` is of the whole model; rescale=False takes it as it is. The code
    rounds that to two decimals, which is left out. statistics: the file that `popjax calibrate
    channels` wrote. Raises ValueError for values out of range and a mixture; CheckpointError, at a
    run, for statistics of another model.
    """

    ratio: float
    statistics: str
    dense_layers: int = 3
    rescale: bool = True

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "statistics", statistics_path(self.statistics))
        whole = isinstance(self.dense_layers, int) and not isinstance(self.dense_layers, bool)
        if not whole or self.dense_layers < 0:
            raise ValueError(
                f"dense_layers {self.dense_layers!r} is not a whole number of at least 0: give how "
                "many of the first layers stay whole"
            )

    def for_model(self, config: ModelConfig) -> ProbePruning:
        check_dense("probe-pruning", config)
        if not self.rescale or self.ratio == 0:
            return self
        pruned = config.num_layers - self.dense_layers
        if pruned < 1 or self.ratio * config.num_layers > pruned:
            raise ValueError(
                f"ratio {self.ratio:g} of {config.num_layers} layers cannot come from those after "
                f"the first {self.dense_layers}: lower the ratio, or dense_layers"
            )
        ratio = self.ratio * config.num_layers / pruned
        return dataclasses.replace(self, ratio=ratio, rescale=False)

    @property
    def calibration(self) -> str:
        return self.statistics

    @property
    def whole_prompt(self) -> bool:
        return True

    def calibrated(
        self,
        statistics: ChannelStatistics,
        params: Params,
        config: ModelConfig,
        partition: Partitions | None,
    ) -> Calibrated:
        pruned = list(enumerate(statistics))[self.dense_layers :]
        leaves = {f"layer_{i}/mlp/calibrated": layer.energy for i, layer in pruned}
        return Calibrated(leaves, partition)

    def evaluated(self, mlp_dim: int) -> int:
        return channel_budget(mlp_dim, self.ratio).evaluated

    def observe(self, params: Params, acts: LayerActs) -> Any:
        if "calibrated" not in params:
            return ()
        probed = probe_acts(params, acts)
        h = probed.counted_channels()
        rows = jnp.sum(probed.valid, axis=0, dtype=jnp.float32)[:, None]
        energy = jnp.sum(h * h, axis=0) / jnp.maximum(rows, 1.0)
        history = params["calibrated"][None, :]
        both = energy + history
        fused = (energy**2 + history**2) / jnp.where(both > 0, both, 1.0)
        fused = jnp.sum(jnp.where(rows > 0, fused, 0.0), axis=0)
        squares = params["down"].astype(jnp.float32) ** 2
        return fused * jnp.sqrt(jnp.sum(squares * squares, axis=1))

    def prefill_partition(self, statistic: Any, layer: LayerConfig, given: Any) -> Any:
        if given is not None or isinstance(statistic, tuple):
            return given
        return self._partition(statistic, layer)

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        pairs = zip(statistics, config.layers, strict=True)
        return Plan(
            tuple(
                whole_partition(layer) if isinstance(s, tuple) else self._partition(s, layer)
                for s, layer in pairs
            )
        )

    def _partition(self, statistic: Any, layer: LayerConfig) -> ChannelPartition:
        return partition_by_rank(statistic, channel_budget(layer.mlp_dim, self.ratio))
