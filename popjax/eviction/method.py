"""The interface of a cache eviction method: observe in prefill, score a layer, allocate once.

A method is a frozen dataclass, hashable and static under jit. It returns scores and sets of slots;
it never touches the cache. Every default does nothing, so the base class keeps every entry.
Leaves out moving entries (`pool.py`) and when all this happens (`evict.py`).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.allocation import Candidates, per_head
from popjax.sparsity import Params

# Statistics and scores of one layer, [B, K, S] float32 over the slots of its cache.
Scores = tuple[jax.Array, ...]


@struct.dataclass
class AttentionActs:
    """What one attention layer shows to `observe` while a prompt, or a chunk of it, is prefilled.

    x [B, T, D] normed input; q [B, T, N, H] rotated queries; k, v [B, K, S, H] the layer's cache
    with this chunk written; positions of the queries [B, T] and of the slots [B, S], -1 for pads
    and empty slots; slot (scalar) the first that this chunk filled.
    """

    x: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    query_positions: jax.Array
    key_positions: jax.Array
    slot: jax.Array


@struct.dataclass
class LayerEntries:
    """One layer's cache as `score` sees it: k, v [B, K, S, H] and positions [B, S], -1 for pads.

    Where heads hold other entries, while decoding, positions are [B, K, S].
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array


@struct.dataclass
class ShadowPass:
    """Tokens [B, T] run over a prefilled cache and forgotten, and the part of the prompt they ask.

    positions [B, T] go on from the prompt's, -1 for pads. They are about the prompt's positions
    first .. end - 1, both [B]; for a row that has nothing left to ask, first and end are equal.
    """

    tokens: jax.Array
    positions: jax.Array
    first: jax.Array
    end: jax.Array


@dataclasses.dataclass(frozen=True)
class KvMethod:
    """Keeps every cache entry: the base class of eviction methods.

    keep: share of a prompt's entries that stay, or tokens: their number, either one for each
    key/value head on average over heads and layers, window included. window: the last prompt
    tokens, which always stay, and whose queries score the others. A share that comes to less than
    the window keeps the window. Raises ValueError for values outside their range.
    """

    keep: float | None = None
    tokens: int | None = None
    window: int = 32

    def __post_init__(self) -> None:
        check_whole("window", self.window)
        check_budget(self.keep, self.tokens, self.least)

    @property
    def least(self) -> int:
        """Entries a head that stay whatever their scores."""
        return self.window

    def for_model(self, config: ModelConfig) -> KvMethod:
        """This method with model-dependent settings resolved; ValueError if it cannot apply."""
        if self.tokens is not None and self.tokens > config.max_positions:
            raise ValueError(
                f"a budget of {self.tokens} entries a head exceeds the model's context of "
                f"{config.max_positions}: keep fewer"
            )
        return self

    def budget(self, length: int) -> int:
        """Entries that stay of a prompt of `length` tokens, a head on average."""
        return min(max(self._asked(length), self.sure(length)), length)

    def _asked(self, length: int) -> int:
        if self.tokens is not None:
            return int(self.tokens)
        return math.floor((1.0 if self.keep is None else self.keep) * length + 0.5)

    def sure(self, length: int) -> int:
        """Entries a head of a prompt of `length` tokens that stay whatever the budget."""
        return self.least

    def idle(self, lengths: Sequence[int]) -> str | None:
        """Why nothing leaves prompts of these lengths, in a sentence; None where something does."""
        if any(self.budget(n) < n for n in lengths):
            return None
        longest = max(lengths)
        if self._asked(longest) >= longest:
            return (
                f"the budget of {self._asked(longest)} entries a head holds all {longest} tokens "
                "of the prompt"
            )
        return (
            f"{self.sure(longest)} tokens stay whatever it is, and the prompt has {longest}: give "
            "a smaller window, or a longer prompt"
        )

    @property
    def repeats(self) -> bool:
        """Whether it can evict again while decoding: the last tokens' queries are all it needs."""
        return False

    @property
    def unbudgeted(self) -> KvMethod:
        """This method as programs see it: a budget is data to them, and compiles nothing."""
        return dataclasses.replace(self, keep=None, tokens=None)

    def protected(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """Which slots [B, S] stay whatever their scores, `least` a row: by default the window."""
        return positions >= (lengths - self.window)[:, None]

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        """Statistic of one layer during prefill: a pytree of arrays."""
        return ()

    def combine(self, before: Any, now: Any) -> Any:
        """The statistic after a chunk or shadow pass, from the one before it and its own."""
        return now

    def shadow_tokens(self, length: int) -> int:
        """Tokens of a shadow pass over a prompt of `length`, at most; 0 for a method without."""
        return 0

    def shadow_passes(self, prompts: Sequence[Sequence[int]], slots: int) -> Iterable[ShadowPass]:
        """Passes over the whole cache after prefill, before scoring, all of T = `slots`."""
        return ()

    def listen(
        self, params: Params, layer: LayerConfig, acts: AttentionActs, asked: ShadowPass
    ) -> Any:
        """Statistic of one layer during a shadow pass, to be combined with the one before it.

        The prompt's slots come before acts.slot, left-padded; the pass's own from there on.
        """
        raise NotImplementedError(f"{type(self).__name__} runs no shadow pass")

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        """How much each entry [B, K, S] matters: float32, not negative, more is better."""
        return jnp.zeros(entries.k.shape[:3], jnp.float32)

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        """Which candidates stay, bool [B, K, S] a layer: as many a row as the count says."""
        return per_head(scores, candidates)


def check_budget(keep: float | None, tokens: int | None, least: int) -> None:
    """Raise ValueError unless at most one of the two is given, and it is a possible budget."""
    if keep is not None and tokens is not None:
        raise ValueError(f"give one of keep and tokens, got keep={keep} and tokens={tokens}")
    if keep is not None and (
        isinstance(keep, bool) or not isinstance(keep, numbers.Real) or not 0 < keep <= 1
    ):
        raise ValueError(f"keep {keep!r} is outside 0..1: give the share of entries that stay")
    if tokens is None:
        return
    if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral) or tokens < 1:
        raise ValueError(f"tokens {tokens!r} is not a whole number above 0: give entries a head")
    if tokens < least:
        raise ValueError(
            f"tokens {tokens} is below the {least} entries a head that always stay (the window): "
            "keep more, or make the window smaller"
        )


def check_whole(name: str, value: object, low: int = 0) -> None:
    """Raise ValueError unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} {value!r} is not a whole number of at least {low}: give one")


def last_queries(acts: AttentionActs, count: int) -> tuple[jax.Array, jax.Array]:
    """Queries [B, W, N, H] of the last `count` tokens, fewer in a shorter chunk, and positions."""
    count = min(count, acts.q.shape[1])
    return acts.q[:, -count:], acts.query_positions[:, -count:]


def budgeted(config: ModelConfig) -> tuple[bool, ...]:
    """Which layers share the budget: those that see furthest back.

    A layer with a shorter sliding window than others keeps exactly what later tokens can see. Where
    all layers have the same window, they compete for what lies inside it.
    """
    furthest = reach(config)
    return tuple(layer.window == furthest for layer in config.layers)


def reach(config: ModelConfig) -> int | None:
    """The widest window of the layers, None where one of them sees everything."""
    windows = [layer.window for layer in config.layers]
    return None if None in windows else max(window for window in windows if window is not None)


def seen_later(window: int | None, length: int) -> int:
    """Entries of a prompt that a layer of this window can still see after it."""
    return length if window is None else min(length, window - 1)


def still_seen(positions: jax.Array, lengths: jax.Array, window: int | None) -> jax.Array:
    """Entries [B, S] or [B, K, S] that tokens after `lengths` [B] can still see under a window."""
    seen = positions >= 0
    if window is None:
        return seen
    ends = lengths.reshape(-1, *(1,) * (positions.ndim - 1))
    return seen & (positions > ends - window)


def counts(
    method: KvMethod, config: ModelConfig, lengths: Sequence[int]
) -> tuple[list[int], list[int]]:
    """For each row, entries a budgeted head on average, and entries of all layers and heads."""
    furthest = reach(config)
    budgets = [min(method.budget(n), seen_later(furthest, n)) for n in lengths]
    totals = []
    for n, budget in zip(lengths, budgets, strict=True):
        pairs = zip(config.layers, budgeted(config), strict=True)
        each = [(y, budget if shares else seen_later(y.window, n)) for y, shares in pairs]
        totals.append(sum(layer.num_kv_heads * count for layer, count in each))
    return budgets, totals


__all__ = [
    "AttentionActs",
    "KvMethod",
    "LayerEntries",
    "Scores",
    "ShadowPass",
    "budgeted",
    "check_budget",
    "check_whole",
    "counts",
    "last_queries",
    "reach",
    "seen_later",
    "still_seen",
]
