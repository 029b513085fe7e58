"""One eviction from the host: score layer by layer, allocate once, move what stays into a pool.

Each step is a compiled program over one layer, so that nothing but scores is held for all layers
at once, and a layer's dense cache is free as soon as its entries have moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction import pool
from popjax.eviction.again import choose_again, view, watch
from popjax.eviction.allocation import Candidates
from popjax.eviction.method import KvMethod, LayerEntries, budgeted, counts, reach
from popjax.eviction.shadow import listen, padded
from popjax.program import Program
from popjax.sparsity import Params

Keep = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What is evicted: by which method, of which model, and how long each row's prompt is.

    align: what the places of heads in the pool are multiples of.
    """

    method: KvMethod
    config: ModelConfig
    lengths: tuple[int, ...]
    align: int = 1

    @property
    def evicts(self) -> bool:
        """Whether anything goes; otherwise the cache stays as it is, bit for bit."""
        return any(self.method.budget(n) < n for n in self.lengths)

    def shadow_slots(self, slots: int) -> int:
        """Slots that the method's shadow passes need behind those of the prompts; 0 without any.

        Raises ValueError where their tokens would go beyond the model's context.
        """
        longest, limit = max(self.lengths), self.config.max_positions
        extra = self.method.shadow_tokens(longest) if self.evicts else 0
        if extra and longest + extra > limit:
            raise ValueError(
                f"{type(self.method).__name__} runs up to {extra} tokens after the prompt of "
                f"{longest}, above the model's maximum context length of {limit}: make its pieces "
                "or the prompt shorter"
            )
        return padded(self.method.shadow_tokens(slots)) if self.evicts else 0


def check_model(config: ModelConfig) -> None:
    """Raise ValueError for a model whose layers cannot share one pool of entries."""
    shapes = {(layer.num_kv_heads, layer.head_dim) for layer in config.layers}
    if len(shapes) > 1:
        raise ValueError(
            f"layers have {sorted(shapes)} key/value heads and head sizes, and cache eviction "
            "needs one pair for all: run this model without kv="
        )


def score_layer(
    params: Params,
    statistic: Any,
    entries: LayerEntries,
    *,
    method: KvMethod,
    layer: LayerConfig,
) -> jax.Array:
    """Scores [B, K, S] float32 of one layer's entries."""
    return method.score(params, layer, statistic, entries).astype(jnp.float32)


def choose(
    scores: tuple[jax.Array, ...],
    positions: jax.Array,
    lengths: jax.Array,
    budgets: jax.Array,
    *,
    method: KvMethod,
    config: ModelConfig,
    align: int,
) -> tuple[Keep, jax.Array, jax.Array, jax.Array]:
    """Slots that stay, bool [B, K, S] a layer, starts and lengths [L, B, K], and finite [L'].

    scores: of the layers that share the budget; positions [B, S]; lengths and budgets [B].
    """
    sure = _seen(positions, lengths, reach(config)) & method.protected(positions, lengths)
    slots = _seen(positions, lengths, reach(config)) & ~sure
    candidates = Candidates(slots, budgets - jnp.sum(sure, axis=1, dtype=jnp.int32))
    chosen = list(method.allocate(scores, candidates))
    finite = jnp.stack([jnp.all(jnp.isfinite(layer)) for layer in scores])
    keep = []
    for layer, takes_part in zip(config.layers, budgeted(config), strict=True):
        if takes_part:
            keep.append(chosen.pop(0) | sure[:, None, :])
        else:
            seen = _seen(positions, lengths, layer.window)
            shape = (positions.shape[0], layer.num_kv_heads, positions.shape[1])
            keep.append(jnp.broadcast_to(seen[:, None, :], shape))
    return tuple(keep), *pool.places(tuple(keep), align), finite


def _seen(positions: jax.Array, lengths: jax.Array, window: int | None) -> jax.Array:
    """Slots [B, S] of tokens that those after `lengths` [B] can still see under a window."""
    seen = positions >= 0
    return seen if window is None else seen & (positions > lengths[:, None] - window)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of an eviction."""

    listen: Program = dataclasses.field(
        default_factory=lambda: Program(listen, static=("config", "method"), donate=(0, 1))
    )
    score: Program = dataclasses.field(
        default_factory=lambda: Program(score_layer, static=("method", "layer"))
    )
    choose: Program = dataclasses.field(
        default_factory=lambda: Program(choose, static=("method", "config", "align"))
    )
    fill: Program = dataclasses.field(
        default_factory=lambda: Program(pool.fill, static=(), donate=(0, 1))
    )
    watch: Program = dataclasses.field(
        default_factory=lambda: Program(watch, static=("config", "method", "eviction"))
    )
    view: Program = dataclasses.field(default_factory=lambda: Program(view, static=("most",)))
    again: Program = dataclasses.field(
        default_factory=lambda: Program(choose_again, static=("method", "config", "align"))
    )

    def all(self) -> tuple[Program, ...]:
        """Every program."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def evict(
    programs: Programs,
    params: Params,
    asked: Eviction,
    layers: list[kv.LayerCache],
    positions: jax.Array,
    seen: Sequence[Any],
) -> kv.Kept:
    """What stays of a prefilled prompt. Empties `layers`, so that each is freed once it has moved.

    positions [B, S] of the slots of all layers; seen: what the method observed of each. Raises
    ValueError where scores are not finite.
    """
    budgets, totals = counts(asked.method, asked.config, asked.lengths)
    scored = [i for i, takes_part in enumerate(budgeted(asked.config)) if takes_part]
    scores = tuple(
        programs.score(
            params[f"layer_{i}"]["attn"],
            seen[i],
            LayerEntries(layers[i].k, layers[i].v, positions),
            method=asked.method.unbudgeted,
            # Widths of the FFN do not matter here: layers that differ only there share a program.
            layer=dataclasses.replace(asked.config.layers[i], mlp_dim=1),
        )
        for i in scored
    )
    keep, starts, lengths, finite = programs.choose(
        scores,
        positions,
        jnp.asarray(asked.lengths, jnp.int32),
        jnp.asarray(budgets, jnp.int32),
        method=asked.method.unbudgeted,
        config=asked.config,
        align=asked.align,
    )
    del scores
    check_finite(scored, np.asarray(finite))
    entries, held = empty_pool(totals, starts, asked.align, layers[0].k)
    for i in range(len(layers)):
        layer = layers.pop(0)
        arrays = (layer.k, layer.v, positions, keep[i], starts[i], lengths[i])
        entries, held = programs.fill(entries, held, *arrays)
    return kv.Kept(entries, held, starts, lengths)


def empty_pool(
    totals: Sequence[int], starts: jax.Array, align: int, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Entries and positions of a pool for so many entries a row, of keys `like` [..., H]."""
    rows = pool.capacity(sum(totals) + (align - 1) * starts.size, align)
    kept = pool.empty(like.shape[-1], starts.shape, rows, like.dtype)
    return kept.entries, kept.positions


def check_finite(scored: list[int], finite: np.ndarray) -> None:
    bad = [i for i, good in zip(scored, finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(
            f"cache scores of layers {bad[:8]} are not finite for this prompt: the weights or the "
            "dtype overflow; check the checkpoint (check_tensors=True) or load it in float32"
        )


__all__ = ["Eviction", "Programs", "check_finite", "check_model", "empty_pool", "evict"]
