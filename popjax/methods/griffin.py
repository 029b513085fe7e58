"""GRIFFIN (ICML 2024; its released code): a dense prompt picks the channels that decode keeps.

Each token's activations are normalised first, so that loud tokens do not outvote the rest, and no
weight enters the score. As released it serves batch 1; here the batch's tokens vote together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from popjax.config import ModelConfig
from popjax.methods.experts import ExpertActs, expert_scores, partition_of
from popjax.methods.method import LayerActs, Method, check_share
from popjax.methods.scores import token_norms
from popjax.sparsity import Params, Plan, channel_budget


@dataclasses.dataclass(frozen=True)
class Griffin(Method):
    """Keep the (1 - ratio) F channels that the prompt's tokens, each normalised, use most.

    Score: || {H_ti / ||H_t||_2}_t ||_2. Raises ValueError for a ratio outside 0..1.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def evaluated(self, mlp_dim: int) -> int:
        return channel_budget(mlp_dim, self.ratio).evaluated

    def observe(self, params: Params, acts: LayerActs | ExpertActs) -> Any:
        if isinstance(acts, ExpertActs):
            return expert_scores(params, acts, "griffin")
        h = acts.counted_channels()
        lengths = jnp.sqrt(acts.over_channels(h * h))
        # A pad token is all zero: it stays zero instead of dividing by nothing.
        return token_norms(h / jnp.where(lengths > 0, lengths, 1.0))

    def plan(self, config: ModelConfig, statistics: tuple[Any, ...]) -> Plan:
        pairs = zip(statistics, config.layers, strict=True)
        budgets = ((s, y, channel_budget(y.channels, self.ratio)) for s, y in pairs)
        return Plan(tuple(partition_of(*each) for each in budgets))
