"""The cache of a run cut to its budget again while it decodes: host code over `eviction/again.py`.

Tokens decoded so far stay in the state; what changes is what later ones can see.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax.config import ModelConfig
from popjax.eviction import KvMethod, pool
from popjax.eviction.again import window_inputs
from popjax.eviction.evict import check_finite, empty_pool
from popjax.eviction.method import budgeted, counts
from popjax.generate import PROGRAMS, DecodeState
from popjax.methods import Method
from popjax.sparsity import Params, Partitions


@dataclasses.dataclass(frozen=True)
class Refresher:
    """What decodes, what evicts, how many new tokens apart, and how the pool is aligned."""

    params: Params
    partition: Partitions | None
    config: ModelConfig
    method: Method
    eviction: KvMethod
    every: int
    align: int

    def __call__(
        self, state: DecodeState, kept: kv.Kept | None
    ) -> tuple[DecodeState, kv.Kept | None]:
        """The state with an empty tail, and a pool that holds what stays of pool and tail.

        Raises ValueError where scores are not finite.
        """
        seen, most = self._watched(state, kept), _most(kept)
        cache, programs = state.cache, PROGRAMS.evict
        layers = range(self.config.num_layers)

        def viewed(i: int) -> Any:
            layer = None if kept is None else kept.layer(i)
            return programs.view(layer, cache.layers[i], cache.positions, most=most)

        scored = [i for i, takes_part in enumerate(budgeted(self.config)) if takes_part]
        scores, positions = [], []
        for i in layers:
            entries = viewed(i)
            positions.append(entries.positions)
            if i in scored:
                given = (self.params, i, seen[i], entries, self.eviction, self.config)
                scores.append(programs.scores(*given))
        lengths = state.positions
        budgets, totals = self._counts(state)
        keep, starts, held, finite = programs.again(
            tuple(scores),
            tuple(positions),
            lengths,
            jnp.asarray(budgets, jnp.int32),
            method=self.eviction.unbudgeted,
            config=self.config,
            align=self.align,
        )
        check_finite(scored, np.asarray(finite), self.params)
        pooled = empty_pool(totals, starts, self.align, cache.layers[0].k)
        pooled = programs.moved(map(viewed, layers), (keep, starts, held), pooled)
        room = (
            cache.positions.shape[1]
            if kept is not None
            else pool.tail(state.tokens.shape[1], self.align)
        )
        empty = kv.empty(self.config, len(budgets), room, cache.layers[0].k.dtype)
        return dataclasses.replace(state, cache=empty), pooled

    def _watched(self, state: DecodeState, kept: kv.Kept | None) -> tuple[Any, ...]:
        """What the method observes of the last tokens that were decoded."""
        if not self.eviction.window:
            return ((),) * self.config.num_layers
        fed = int(state.step) - 1
        inputs, before = window_inputs(state.tokens, state.cache, fed, self.eviction.window)
        before = dataclasses.replace(before, kept=kept)
        static = {"config": self.config, "method": self.method}
        eviction = self.eviction.unbudgeted
        arrays = (self.params, inputs, before, self.partition)
        return PROGRAMS.evict.watch(*arrays, **static, eviction=eviction)

    def _counts(self, state: DecodeState) -> tuple[list[int], list[int]]:
        """Entries a head, and of all heads, of each row: at most; short rows hold fewer."""
        longest = [self.config.max_positions] * state.tokens.shape[0]
        return counts(self.eviction, self.config, longest)


def _most(kept: kv.Kept | None) -> int:
    """Entries of the fullest head, rounded up so that few sizes are compiled for."""
    return 0 if kept is None else pool.capacity(int(np.max(np.asarray(kept.lengths))))
