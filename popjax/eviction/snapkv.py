"""SnapKV (arXiv 2404.14469): what the last queries attend to, averaged and smoothed, head by head.

The paper pools per query head before the group is averaged; both are linear, so their order does
not matter. Defaults are those of LaProx, so that the two compare: window 32 and average pooling 7
(kvpress: 64 and 5; the paper's LongBench runs: 32 and max pooling 7).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from popjax.config import LayerConfig
from popjax.eviction.allocation import Candidates, per_head
from popjax.eviction.method import LayerEntries, Scores
from popjax.eviction.windowed import Windowed, attended
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class SnapKV(Windowed):
    """Keep in every head the entries with the largest mean attention of the window's queries.

    The mean is over the window and the query heads that share the KV head.
    """

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        return attended(layer, statistic, entries)

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        return per_head(self.pooled(scores, candidates), candidates)


__all__ = ["SnapKV"]
