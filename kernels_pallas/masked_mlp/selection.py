"""Which channels a decode step uses: scored from what it evaluated, or given from outside.

Everything in float32. Evaluated channels [E] are the retained, always on, and the candidates.
"""

from __future__ import annotations

from typing import Any

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
    """

    candidate: jax.Array | None = None
    weight: jax.Array | None = None
    threshold: jax.Array | None = None
    num_candidate: int = struct.field(pytree_node=False, default=0)
    k_selected: int = struct.field(pytree_node=False, default=0)
    shared: bool = struct.field(pytree_node=False, default=False)
    point: str = struct.field(pytree_node=False, default="product")
    exact: int | None = struct.field(pytree_node=False, default=None)

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
    return magnitude


def choose(a: jax.Array, selection: Selection) -> jax.Array:
    """Bool mask [B or 1, T, E] from activations a [B, T, E]: retained on, candidates as chosen."""
    score = scores(a, selection)
    if selection.threshold is None:
        chosen = select_top(score, selection.k_selected)
    else:
        chosen = score > selection.threshold[None, None, :]
    if selection.candidate is None:
        retained = a.shape[-1] - selection.num_candidate
        on = jnp.ones((*chosen.shape[:-1], retained), bool)
        return jnp.concatenate([on, chosen], axis=-1)
    on = jnp.ones((*chosen.shape[:-1], a.shape[-1]), bool)
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
    size = keys.shape[-1]
    limit = _bisect(lambda t: (keys >= t[..., None]).sum(-1) >= count, keys.shape[:-1], 31)
    limit = limit[..., None]
    above = keys > limit
    room = count - above.sum(-1, dtype=jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    tied = keys == limit

    def cut_ties() -> jax.Array:
        bits = size.bit_length()
        last = _bisect(
            lambda t: (tied & (index < t[..., None])).sum(-1) <= room, keys.shape[:-1], bits
        )
        return above | (tied & (index < last[..., None]))

    return jax.lax.cond(jnp.any(tied.sum(-1) != room), cut_ties, lambda: above | tied)


def _bisect(accept: Any, shape: tuple[int, ...], bits: int) -> jax.Array:
    """The largest int32 below 2**bits, per element of `shape`, that the monotone `accept` takes."""

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (1 << (bits - 1 - i)).astype(jnp.int32)
        return jnp.where(accept(trial), trial, found)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros(shape, jnp.int32))
