"""A prefill whose tokens pass some layers by (arXiv 2602.03295): two streams, one program.

The boundary, the last prompt token, runs every layer. Prompts are left-padded, so it is the last
column of every row: layers that run take all columns at once, their weights read once; at a layer
that is passed by, the columns before it leave keys and values and only it goes on. By causality
this equals a prefill of the other tokens and then a decode step. Leaves out which layers those are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from popjax.cache import Cache, LayerCache
from popjax.depth.method import FULL, KV_ONLY, LAST, DepthPlan
from popjax.nn.layers import RopeTable
from popjax.sparsity import Partitions


@dataclasses.dataclass(frozen=True)
class Columns:
    """What layers need to know of some columns of a batch of tokens.

    positions [B, T'] of the tokens and [B, S] of the slots; tables of rotation by kind, None for a
    kind without; slot: where the first of them goes.
    """

    positions: jax.Array
    keys: jax.Array
    tables: dict[Any, RopeTable | None]
    slot: jax.Array

    def last(self) -> Columns:
        """The last column alone."""
        before = self.positions.shape[1] - 1
        tables = {kind: _cut(table, before, None) for kind, table in self.tables.items()}
        return Columns(self.positions[:, before:], self.keys, tables, self.slot + before)

    def others(self) -> Columns:
        """All columns but the last."""
        end = self.positions.shape[1] - 1
        tables = {kind: _cut(table, 0, end) for kind, table in self.tables.items()}
        return Columns(self.positions[:, :end], self.keys, tables, self.slot)


def _cut(table: RopeTable | None, first: int, end: int | None) -> Any:
    return None if table is None else tuple(part[:, first:end] for part in table)


def begun(plan: DepthPlan, cache: Cache, positions: jax.Array) -> Cache:
    """The cache with what its emptier layers hold: nothing before the boundary at positions[:, -1].

    Unchanged where the plan leaves entries in every layer.
    """
    if not plan.empty_layers:
        return cache
    begin = positions[:, -1] + (0 if plan.boundary == LAST else 1)
    return dataclasses.replace(cache, begin=begin, emptier=plan.empty_layers)


def run_layers(
    plan: DepthPlan,
    blocks: Sequence[Any],
    x: jax.Array,
    columns: Columns,
    cache: Cache,
    partition: Partitions | None,
) -> tuple[jax.Array, list[LayerCache], list[tuple[Any, Any]]]:
    """The last column [B, 1, D] after all layers, each layer's cache, and what was observed.

    x [B, T, D]. A layer that only the boundary ran has None for the method's statistic, one that
    nothing ran None for the eviction's too.
    """
    layers, observed = [], []
    tail: jax.Array | None = None  # the boundary while the other columns pass
    for i, (kind, block) in enumerate(zip(plan.layers, blocks, strict=True)):
        given = None if partition is None else partition[i]
        if kind == FULL:
            x, tail = (x, None) if tail is None else (jnp.concatenate([x, tail], axis=1), None)
            x, written, seen = _run(block, x, columns, i, cache, cache.layers[i], given)
            layers.append(written)
            observed.append(seen)
            continue
        written, seen = cache.layers[i], (None, None)
        if plan.boundary == LAST and tail is None:
            x, tail = x[:, :-1], x[:, -1:]
        if kind == KV_ONLY and x.shape[1]:
            # One product a matrix. All weights of consecutive layers side by side, norms folded in,
            # were measured on a CPU and not shown to be faster (ten layers of D = 576 at 512 and
            # 2048 tokens: shorter medians, longer best times), and would copy weights.
            passing = columns if tail is None else columns.others()
            written = block.entries(x, written, passing.slot, _table(block, passing))
        if tail is not None:
            tail, written, (_, watched) = _run(block, tail, columns.last(), i, cache, written, None)
            seen = (None, watched)
        layers.append(written)
        observed.append(seen)
    return (x[:, -1:] if tail is None else tail), layers, observed


def _table(block: Any, columns: Columns) -> RopeTable | None:
    return columns.tables[(block.layer.rope, block.layer.head_dim)]


def _run(
    block: Any,
    x: jax.Array,
    columns: Columns,
    i: int,
    cache: Cache,
    held: LayerCache,
    given: Any,
) -> Any:
    """One whole layer over columns x: the stream after it, its cache, and what was observed."""
    positions = (columns.positions, cache.keys_of(i, columns.keys))
    context = held, columns.slot, _table(block, columns), positions, cache.kept_of(i)
    return block.prefill(x, columns.positions >= 0, given, *context)


__all__ = ["Columns", "begun", "run_layers"]
