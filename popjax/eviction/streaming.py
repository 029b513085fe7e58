"""StreamingLLM (ICLR 2024): the first few tokens and the last ones, whatever they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from popjax.config import LayerConfig
from popjax.eviction.method import LayerEntries
from popjax.eviction.sinks import WithSinks
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class StreamingLLM(WithSinks):
    """Keep the first `sinks` tokens (paper: 4) and the most recent ones, alike in every head.

    Entries keep their true positions; the paper counts positions within the cache instead.
    """

    @property
    def repeats(self) -> bool:
        return True

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        shape = entries.k.shape[:3]
        later = jnp.maximum(entries.positions, 0).astype(jnp.float32)
        return jnp.broadcast_to(later if later.ndim == 3 else later[:, None, :], shape)


__all__ = ["StreamingLLM"]
