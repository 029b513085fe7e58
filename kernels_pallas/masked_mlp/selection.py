"""Which channels a decode step uses: scored from what it evaluated, or given from outside.

Everything in float32. Evaluated channels [E] are the retained, always on, and the candidates.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

POINTS = ("product", "gate")
# Up to here C * C comparisons cost less than the passes of a bisection.
_FEW = 256


@struct.dataclass
class Selection:
    """How `num_candidate` of the evaluated channels are chosen anew for every token.

    candidate [C]: their places among the evaluated channels, None for the last C. A candidate's
    score is |a| times weight [C], or |a|; `shared` takes the L2 norm of a over the batch first, for
    one choice for all rows. On are the k_selected largest, or those above threshold [C]. `point`
    says what a is: the gated "product", or the activated "gate" alone, so that up is only evaluated
    where it is used. `exact`: where a scout chooses among all channels, so many of the chosen, the
    best, are evaluated from the weights, and the others are as foretold; None: all of them are.
    `tried`: at the point "gate" so many are chosen by their gates, times `expected` [C], what |up|
    may be, for their up to be evaluated; on are the k_selected best of these by the product. None:
    what the gates choose is on.
    """

    candidate: jax.Array | None = None
    weight: jax.Array | None = None
    threshold: jax.Array | None = None
    expected: jax.Array | None = None
    num_candidate: int = struct.field(pytree_node=False, default=0)
    k_selected: int = struct.field(pytree_node=False, default=0)
    shared: bool = struct.field(pytree_node=False, default=False)
    point: str = struct.field(pytree_node=False, default="product")
    exact: int | None = struct.field(pytree_node=False, default=None)
    tried: int | None = struct.field(pytree_node=False, default=None)

    @property
    def first(self) -> int:
        """How many the first choice takes: those tried, where a second one follows."""
        return self.k_selected if self.tried is None else self.tried

    def places(self, evaluated: int) -> jax.Array:
        """Places [C] of the candidates among `evaluated` channels."""
        if self.candidate is not None:
            return self.candidate
        return jnp.arange(evaluated - self.num_candidate, evaluated, dtype=jnp.int32)


def scores(a: jax.Array, selection: Selection) -> jax.Array:
    """Score [B or 1, T, C] of the candidates from activations a [B, T, E]."""
    if selection.candidate is None:
        a = a[..., a.shape[-1] - selection.num_candidate :]
    else:
        a = a[..., selection.candidate]
    magnitude = jnp.abs(a.astype(jnp.float32))
    if selection.shared:
        magnitude = jnp.sqrt(jnp.sum(magnitude * magnitude, axis=0, keepdims=True))
    if selection.weight is not None:
        magnitude = magnitude * selection.weight[None, None, :]
    if selection.expected is not None:
        magnitude = magnitude * selection.expected[None, None, :]
    return magnitude


def choose(a: jax.Array, selection: Selection) -> jax.Array:
    """Bool mask [B or 1, T, E] from activations a [B, T, E]: retained on, candidates as chosen.

    Of a selection that tries some, these: `choose_tried` says which of them are on.
    """
    score = scores(a, selection)
    if selection.threshold is None:
        chosen = select_top(score, selection.first)
    else:
        chosen = score > selection.threshold[None, None, :]
    return _with_retained(chosen, selection, a.shape[-1])


def choose_tried(h: jax.Array, tried: jax.Array, selection: Selection) -> jax.Array:
    """Bool mask [B or 1, T, E]: of the `tried`, a mask too, those that are on by products h."""
    score = scores(h, dataclasses.replace(selection, expected=None))
    # A score below zero is never taken.
    score = jnp.where(tried[..., selection.places(h.shape[-1])], score, -1.0)
    count = jnp.full(score.shape[:-1], selection.k_selected, jnp.int32)
    return _with_retained(select_top(score, count), selection, h.shape[-1])


def _with_retained(chosen: jax.Array, selection: Selection, evaluated: int) -> jax.Array:
    if selection.candidate is None:
        on = jnp.ones((*chosen.shape[:-1], evaluated - selection.num_candidate), bool)
        return jnp.concatenate([on, chosen], axis=-1)
    on = jnp.ones((*chosen.shape[:-1], evaluated), bool)
    return on.at[..., selection.candidate].set(chosen)


def select_top(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Bool mask [..., C] of exactly `count` largest non-negative scores, ties to the lower index.

    An array `count` [...] gives each row of scores its own; negative scores are then never taken.
    Few candidates are ranked by comparing all pairs at once. Of more, the count-th largest is found
    by bisection on the bits of the float32 values, which order as integers do: 31 passes over C,
    where a sort of C = 8192 takes ten times as long on a CPU.
    """
    size = scores.shape[-1]
    keys = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    if not isinstance(count, int):
        return _top_by_bisection(keys, count)
    if count <= 0:
        return jnp.zeros(scores.shape, bool)
    if count >= size:
        return jnp.ones(scores.shape, bool)
    return _top_by_pairs(keys, count) if size <= _FEW else _top_by_bisection(keys, count)


def _top_by_pairs(keys: jax.Array, count: int) -> jax.Array:
    mine, other = keys[..., :, None], keys[..., None, :]
    rows = jax.lax.broadcasted_iota(jnp.int32, (*keys.shape, keys.shape[-1]), keys.ndim - 1)
    columns = jax.lax.broadcasted_iota(jnp.int32, rows.shape, keys.ndim)
    ahead = (other > mine) | ((other == mine) & (columns < rows))
    return ahead.sum(-1) < count


def _top_by_bisection(keys: jax.Array, count: int | jax.Array) -> jax.Array:
    """As `select_top`. Loops and branches take keys as they lie in memory; elsewhere XLA may work
    them out again, rounded otherwise, and a key that is two numbers is counted twice or never.
    """

    def at_least(t: jax.Array) -> jax.Array:
        return (keys >= t[..., None]).sum(-1, dtype=jnp.int32)

    def step(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        limit, reached = found
        trial = limit | (1 << (30 - i)).astype(jnp.int32)
        now = at_least(trial)
        return jnp.where(now >= count, trial, limit), jnp.where(now >= count, now, reached)

    zero = jnp.zeros(keys.shape[:-1], jnp.int32)
    limit, reached = jax.lax.fori_loop(0, 31, step, (zero, at_least(zero)))
    wanted = jnp.broadcast_to(jnp.int32(count), limit.shape)
    exact = jnp.all(reached == wanted)
    return jax.lax.cond(exact, _from, _cut_ties, keys, limit, wanted)


def _from(keys: jax.Array, limit: jax.Array, _: jax.Array) -> jax.Array:
    return keys >= limit[..., None]


def _cut_ties(keys: jax.Array, limit: jax.Array, count: jax.Array) -> jax.Array:
    """The keys above the limit, and of those that equal it the first, up to the count."""
    above, tied = keys > limit[..., None], keys == limit[..., None]
    room = count - above.sum(-1, dtype=jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    bits = keys.shape[-1].bit_length()

    def step(i: jax.Array, last: jax.Array) -> jax.Array:
        trial = last | (1 << (bits - 1 - i)).astype(jnp.int32)
        fits = (tied & (index < trial[..., None])).sum(-1) <= room
        return jnp.where(fits, trial, last)

    last = jax.lax.fori_loop(0, bits, step, jnp.zeros(keys.shape[:-1], jnp.int32))
    return above | (tied & (index < last[..., None]))
