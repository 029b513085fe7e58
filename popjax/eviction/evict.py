"""One eviction from the host: score layer by layer, allocate once, move what stays into a pool.

Each step is a compiled program over one layer, so that nothing but scores is held for all layers
at once, and a layer's dense cache is free as soon as its entries have moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction import pool
from popjax.eviction.again import choose_again, view, watch
from popjax.eviction.allocation import Candidates
from popjax.eviction.method import KvMethod, LayerEntries, budgeted, counts, reach, still_seen
from popjax.eviction.shadow import listen, padded
from popjax.nonfinite import not_finite
from popjax.program import Program, program_field
from popjax.sparsity import Params

Keep = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What is evicted: by which method, of which model, and how long each row's prompt is.

    align: what the places of heads in the pool are multiples of; apart: layers that compete with no
    other, each for an equal share of the budget.
    """

    method: KvMethod
    config: ModelConfig
    lengths: tuple[int, ...]
    align: int = 1
    apart: tuple[int, ...] = ()

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
            "needs one pair for all: run this model without it"
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
    apart: tuple[int, ...] = (),
) -> tuple[Keep, jax.Array, jax.Array, jax.Array]:
    """Slots that stay, bool [B, K, S] a layer, starts and lengths [L, B, K], and finite [L'].

    scores: of the layers that share the budget; positions [B, S]; lengths and budgets [B]. Layers
    `apart` compete with no other.
    """
    seen = still_seen(positions, lengths, reach(config))
    sure = seen & method.protected(positions, lengths)
    candidates = Candidates(seen & ~sure, budgets - jnp.sum(sure, axis=1, dtype=jnp.int32))
    shared = [i for i, takes_part in enumerate(budgeted(config)) if takes_part]
    chosen = _allocated(method, scores, candidates, [i in apart for i in shared])
    finite = jnp.stack([jnp.all(jnp.isfinite(layer)) for layer in scores])
    keep = []
    for layer, takes_part in zip(config.layers, budgeted(config), strict=True):
        if takes_part:
            keep.append(chosen.pop(0) | sure[:, None, :])
        else:
            seen = still_seen(positions, lengths, layer.window)
            shape = (positions.shape[0], layer.num_kv_heads, positions.shape[1])
            keep.append(jnp.broadcast_to(seen[:, None, :], shape))
    return tuple(keep), *pool.places(tuple(keep), align), finite


def _allocated(
    method: KvMethod, scores: tuple[jax.Array, ...], candidates: Candidates, apart: list[bool]
) -> list[jax.Array]:
    """What stays of each layer, those that are `apart` allocated one by one."""
    together = [i for i, alone in enumerate(apart) if not alone]
    groups = [together] if together else []
    groups += [[i] for i, alone in enumerate(apart) if alone]
    chosen: dict[int, jax.Array] = {}
    for group in groups:
        found = method.allocate(tuple(scores[i] for i in group), candidates)
        chosen |= zip(group, found, strict=True)
    return [chosen[i] for i in range(len(scores))]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of an eviction."""

    listen: Program = program_field(listen, "config", "method", donate=(0, 1))
    score: Program = program_field(score_layer, "method", "layer")
    choose: Program = program_field(choose, "method", "config", "align", "apart")
    fill: Program = program_field(pool.fill, donate=(0, 1))
    watch: Program = program_field(watch, "config", "method", "eviction")
    view: Program = program_field(view, "most")
    again: Program = program_field(choose_again, "method", "config", "align")

    def scores(
        self,
        params: Params,
        i: int,
        statistic: Any,
        entries: LayerEntries,
        method: KvMethod,
        config: ModelConfig,
    ) -> jax.Array:
        """Scores [B, K, S] of layer i; layers that differ only in their FFN share a program."""
        layer = dataclasses.replace(config.layers[i], mlp_dim=1, moe=None)
        weights = params[f"layer_{i}"]["attn"]
        return self.score(weights, statistic, entries, method=method.unbudgeted, layer=layer)

    def moved(
        self,
        entries: Iterable[LayerEntries],
        places: tuple[Keep, jax.Array, jax.Array],
        kept: kv.Kept,
    ) -> kv.Kept:
        """The empty pool `kept` filled with what stays of each layer, taken one after the other."""
        keep, starts, lengths = places
        pooled, positions = kept.entries, kept.positions
        for i, layer in enumerate(entries):
            arrays = (layer.k, layer.v, layer.positions, keep[i], starts[i], lengths[i])
            pooled, positions = self.fill(pooled, positions, *arrays)
        return kv.Kept(pooled, positions, starts, lengths)

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
        programs.scores(
            params,
            i,
            seen[i],
            LayerEntries(layers[i].k, layers[i].v, positions),
            asked.method,
            asked.config,
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
        apart=asked.apart,
    )
    del scores
    check_finite(scored, np.asarray(finite), params)
    kept = empty_pool(totals, starts, asked.align, layers[0].k)

    def leaving() -> Iterator[LayerEntries]:
        while layers:
            layer = layers.pop(0)
            yield LayerEntries(layer.k, layer.v, positions)

    return programs.moved(leaving(), (keep, starts, lengths), kept)


def empty_pool(totals: Sequence[int], starts: jax.Array, align: int, like: jax.Array) -> kv.Kept:
    """A pool for so many entries a row, of keys `like` [..., H], with nothing in it."""
    rows = pool.capacity(sum(totals) + (align - 1) * starts.size, align)
    return pool.empty(like.shape[-1], starts.shape, rows, like.dtype)


def check_finite(scored: list[int], finite: np.ndarray, params: Params) -> None:
    """Raise ValueError naming the layers whose scores are not finite."""
    bad = [i for i, good in zip(scored, finite.tolist(), strict=True) if not good]
    if bad:
        what = f"cache scores of layers {bad[:8]} are not finite for this prompt"
        raise not_finite(what, params)


__all__ = ["Eviction", "Programs", "check_finite", "check_model", "empty_pool", "evict"]
