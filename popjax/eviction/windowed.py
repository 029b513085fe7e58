"""What methods share that score entries by what the last queries of the prompt take from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kernels_pallas.kv_score import kv_score
from popjax.config import LayerConfig
from popjax.eviction.allocation import Candidates
from popjax.eviction.method import (
    AttentionActs,
    KvMethod,
    LayerEntries,
    Scores,
    check_whole,
    last_queries,
)
from popjax.eviction.pooling import average
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class Windowed(KvMethod):
    """Observes the queries of the window, of which at least one is needed.

    pooling: width of the average over neighbouring tokens, an odd number; 1 takes none. Raises
    ValueError for values outside their range.
    """

    pooling: int = 7

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1)
        check_whole("pooling", self.pooling, 1)
        if self.pooling % 2 == 0:
            raise ValueError(f"pooling {self.pooling} is even: give an odd number of tokens")
        super().__post_init__()

    @property
    def repeats(self) -> bool:
        return True

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return last_queries(acts, self.window)

    def pooled(self, scores: Scores, candidates: Candidates) -> Scores:
        """Scores averaged over neighbouring candidates; beyond their ends zeros are counted."""
        pairs = enumerate(scores)
        return tuple(average(y, candidates.layer(i).slots, self.pooling) for i, y in pairs)


def attended(
    layer: LayerConfig,
    queries: tuple[jax.Array, jax.Array],
    entries: LayerEntries,
    columns: str = "mean",
    **options: Any,
) -> jax.Array:
    """Scores [B, K, S] of entries by the attention of queries [B, W, N, H] at positions [B, W].

    columns and options: those of `kernels_pallas.kv_score.kv_score`.
    """
    q, positions = queries
    options |= {"columns": columns, "window": layer.window, "softcap": layer.softcap}
    if entries.positions.ndim == 2:
        arrays = (q, entries.k, entries.v, positions, entries.positions)
        return kv_score(*arrays, **options)
    return _head_by_head(q, positions, entries, options)


def _head_by_head(
    q: jax.Array, positions: jax.Array, entries: LayerEntries, options: dict[str, Any]
) -> jax.Array:
    """Scores [B, K, S] where every head holds entries of other positions [B, K, S]."""
    K, gram = entries.k.shape[1], options.pop("gram", None)
    grouped = q.reshape(*q.shape[:2], K, -1, q.shape[-1])
    grams = None if gram is None else gram.reshape(K, -1, *gram.shape[1:])

    def one(q: jax.Array, k: jax.Array, v: jax.Array, held: jax.Array, gram: Any) -> jax.Array:
        return kv_score(
            q, k[:, None], v[:, None], positions, held, gram=gram, implementation="xla", **options
        )[:, 0]

    axes = (2, 1, 1, 1, None if grams is None else 0)
    by_head = jax.vmap(one, in_axes=axes, out_axes=1)
    return by_head(grouped, entries.k, entries.v, entries.positions, grams)


__all__ = ["Windowed", "attended"]
