"""RescoreAll: every channel is a candidate at every step; an upper bound on quality, not a saving.

Variant 2 of arXiv 2602.06822 (section 5, Table 6): gate and up are evaluated on all F channels,
only the down projection is spared.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kernels_pallas.masked_mlp import Selection
from popjax.config import LayerConfig, ModelConfig
from popjax.expert_partition import experts_by_rank
from popjax.methods.method import Method, check_share
from popjax.sparsity import ChannelPartition, Partition, Plan, channel_budget


@dataclasses.dataclass(frozen=True)
class RescoreAll(Method):
    """Let each token use its own best (1 - ratio) F channels; the prompt runs dense.

    batch_shared: one mask for the batch. Raises ValueError for a ratio outside 0..1.
    """

    ratio: float
    batch_shared: bool = False

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def plan(self, config: ModelConfig, statistics: tuple[object, ...]) -> Plan:
        return Plan(tuple(self._partition(layer) for layer in config.layers))

    def _partition(self, layer: LayerConfig) -> Partition:
        k_selected = channel_budget(layer.channels, self.ratio).active
        if layer.moe is not None:
            # Scores that are all equal leave the channels in order.
            equal = jnp.zeros((layer.moe.here, layer.channels), jnp.float32)
            return experts_by_rank(equal, (0, layer.channels, k_selected), layer, None)
        return ChannelPartition(
            retained=jnp.zeros((0,), jnp.int32),
            candidate=jnp.arange(layer.mlp_dim, dtype=jnp.int32),
            k_selected=k_selected,
        )

    def selection(self, partition: ChannelPartition) -> Selection | None:
        return partition.selection(shared=self.batch_shared)

    def expert_selection(self) -> dict[str, bool]:
        return {"weighted": True, "shared": self.batch_shared}
