"""FLAP (arXiv 2312.11983): channels that hardly fluctuate go, and their mean stays as a bias.

The released code's default: the weighted variance of a channel over the calibration text, made
comparable by standardising it within each layer, and one threshold for all layers, so that layers
lose different shares. Only FFN channels are pruned, where that code lets heads compete with them.
The prompt decides nothing, and runs pruned itself.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from popjax.calibration.statistics import ChannelStatistics, check_dense, statistics_path
from popjax.config import ModelConfig
from popjax.methods.method import Calibrated, Method, check_share
from popjax.packing import down_norms
from popjax.sparsity import ChannelPartition, Params, Partitions, channel_budget, rounded


@dataclasses.dataclass(frozen=True)
class FLAP(Method):
    """Keep the share 1 - ratio of all layers' channels with the largest standardised fluctuation.

    Fluctuation of a channel: Var[h_i] ||Wd_i||^2, less the mean over its layer, over the standard
    deviation there. What is removed adds sum_i E[h_i] Wd_i to every output, as a bias of down that
    lies beside the weights. Every layer keeps its best channel [inferred]. statistics: the file
    that `popjax calibrate channels` wrote. The variance is over all of its tokens, where the code
    runs one over samples: a factor that standardising takes out. Raises ValueError for a ratio
    outside 0..1 or no path, and for a mixture; CheckpointError, at a run, for statistics of another
    model.
    """

    ratio: float
    statistics: str

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "statistics", statistics_path(self.statistics))

    def for_model(self, config: ModelConfig) -> FLAP:
        check_dense("flap", config)
        return self

    @property
    def calibration(self) -> str:
        return self.statistics

    def evaluated(self, mlp_dim: int) -> int:
        """Of a layer that loses as much as the model does."""
        return channel_budget(mlp_dim, self.ratio).evaluated

    def calibrated(
        self,
        statistics: ChannelStatistics,
        params: Params,
        config: ModelConfig,
        partition: Partitions | None,
    ) -> Calibrated:
        downs = [params[f"layer_{i}"]["mlp"]["down"] for i in range(config.num_layers)]
        if partition is None:
            pairs = zip(downs, statistics, strict=True)
            scores = [_standardised(y.variance, down_norms(down)) for down, y in pairs]
            partition = self._partition(scores)
        leaves = {}
        for i, (down, y, part) in enumerate(zip(downs, statistics, partition, strict=True)):
            assert isinstance(part, ChannelPartition), "mixtures are refused"
            if part.evaluated < config.layers[i].mlp_dim:
                mean = jnp.asarray(y.mean, jnp.float32)
                removed = jnp.where(part.kept_mask(len(y.mean)), 0.0, mean)
                leaves[f"layer_{i}/mlp_compensation"] = _projected(removed, down)
        return Calibrated(leaves, partition)

    def _partition(self, scores: list[np.ndarray]) -> Partitions:
        """The best channels of all layers together, their number rounded once for the model."""
        total = sum(map(len, scores))
        kept = total - rounded(self.ratio * total)
        if kept < len(scores):
            raise ValueError(
                f"{self} keeps {kept} FFN channels for {len(scores)} layers: lower the ratio"
            )
        for layer in scores:
            layer[np.argmax(layer)] = np.inf
        order = np.argsort(-np.concatenate(scores), kind="stable")
        mask = np.zeros(total, bool)
        mask[order[:kept]] = True
        layers = np.split(mask, np.cumsum([len(layer) for layer in scores])[:-1])
        none = jnp.zeros((0,), jnp.int32)
        return tuple(
            ChannelPartition(jnp.asarray(np.flatnonzero(layer), jnp.int32), none)
            for layer in layers
        )


def _standardised(variance: np.ndarray, norms: jax.Array) -> np.ndarray:
    """Weighted fluctuations [F] of one layer, less their mean, over their standard deviation."""
    score = np.asarray(variance, np.float64) * np.asarray(norms, np.float64) ** 2
    spread = np.std(score, ddof=1) if len(score) > 1 else 0.0
    return (score - np.mean(score)) / (spread if spread > 0 else 1.0)


@jax.jit
def _projected(h: jax.Array, down: jax.Array) -> jax.Array:
    """h [F] through down [F, D], or its tiles, in float32."""
    w = down.astype(jnp.float32).reshape(down.shape[0], -1)
    return jnp.einsum("F,FD->D", h, w, precision="highest")
