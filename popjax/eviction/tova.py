"""TOVA (arXiv 2401.06104): what the last query attends to, one choice for all heads of a layer.

The paper evicts at every token; here it is applied once, after prefill, as kvpress does. The last
token always stays, which the paper leaves to its own attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from popjax.config import LayerConfig
from popjax.eviction.method import (
    AttentionActs,
    KvMethod,
    LayerEntries,
    check_whole,
    last_queries,
)
from popjax.eviction.windowed import attended
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class Tova(KvMethod):
    """Keep the tokens with the largest attention of the last query, averaged over a layer's heads.

    A `window` above 1 keeps more of the last tokens; the query is the last one all the same. Raises
    ValueError for values outside their range.
    """

    window: int = 1

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1)
        super().__post_init__()

    @property
    def repeats(self) -> bool:
        return True

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return last_queries(acts, 1)

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        by_head = attended(layer, statistic, entries)
        return jnp.broadcast_to(jnp.mean(by_head, axis=1, keepdims=True), by_head.shape)


__all__ = ["Tova"]
