"""Moving what stays into one pool: the cache after an eviction, and how large it is.

Shapes follow from the budget alone; which slots stay is data. Leaves out deciding that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import PALLAS
from popjax.cache import Kept

_TILE = 16  # rows
# Rows gathered at a time: enough to amortise a step, little enough to hold beside the pool.
_CHUNK = 1024


def alignment(implementation: str | None = None) -> int:
    """What the starts of heads are multiples of: a tile's rows where kernels copy whole tiles.

    Without the name of an implementation, one that serves all that this machine has.
    """
    own = implementation is not None and implementation not in PALLAS
    return 1 if own and jax.default_backend() == "cpu" else _TILE


def capacity(entries: int, align: int = 1) -> int:
    """Rows of a pool for so many entries, rounded up by at most a sixteenth: few compiles.

    At least to whole tiles where heads are; on a TPU, whose layouts of positions go by 1024, to
    multiples of that.
    """
    least = 1024 if jax.default_backend() == "tpu" else align
    step = max(least, 1 << max(0, entries.bit_length() - 5))
    return max(1, -(-entries // step)) * step


def tail(slots: int, align: int) -> int:
    """Slots of a cache beside a pool, for so many new tokens: whole tiles, where heads are."""
    return slots if align == 1 else max(2, -(-slots // _TILE)) * _TILE


def places(keep: tuple[jax.Array, ...], align: int) -> tuple[jax.Array, jax.Array]:
    """Starts and lengths [L, B, K] int32 of the entries that stay, keep [B, K, S] bool a layer."""
    lengths = jnp.stack([jnp.sum(layer, axis=-1, dtype=jnp.int32) for layer in keep])
    rows = -(-lengths // align) * align
    ends = jnp.cumsum(rows.reshape(-1)).reshape(rows.shape)
    return ends - rows, lengths


def empty(head_dim: int, shape: tuple[int, ...], rows: int, dtype: jnp.dtype) -> Kept:
    """A pool of `rows` entries of that head size with nothing in it, for heads [L, B, K]."""
    nothing = jnp.zeros(shape, jnp.int32)
    entries = jnp.zeros((rows, 2 * head_dim), dtype)
    return Kept(entries, jnp.full((rows,), -1, jnp.int32), nothing, nothing)


def fill(
    entries: jax.Array,
    positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_positions: jax.Array,
    keep: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The pool, entries [E, 2H] and positions [E], with one layer's entries in their places.

    k, v [B, K, S, H]; slot_positions [B, S] or, where heads differ, [B, K, S]; keep [B, K, S];
    starts and lengths [B, K] of this layer. Rows go a chunk at a time, only as many as stay, so
    nothing of the size of the cache is held beside it.
    """
    B, K, S, H = k.shape
    heads = B * K
    # Slots that stay come first, in their order.
    order = jnp.argsort(~keep, axis=-1, stable=True).astype(jnp.int32).reshape(heads, S)
    if slot_positions.ndim == 2:
        slot_positions = jnp.broadcast_to(slot_positions[:, None, :], (B, K, S))
    flat = k.reshape(-1, H), v.reshape(-1, H), slot_positions.reshape(-1)
    start, length = starts.reshape(-1), lengths.reshape(-1)
    end = start[-1] + length[-1]
    step = min(_CHUNK, entries.shape[0])

    def one(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at, entries, positions = state
        first = jnp.minimum(at, entries.shape[0] - step)
        rows = first + jnp.arange(step, dtype=jnp.int32)
        head = jnp.searchsorted(start, rows, side="right").astype(jnp.int32) - 1
        rank = rows - start[jnp.maximum(head, 0)]
        mine = (head >= 0) & (rank < length[jnp.maximum(head, 0)])
        head, rank = jnp.where(mine, head, 0), jnp.where(mine, rank, 0)
        source = head * S + order[head, rank]
        new = jnp.concatenate([flat[0][source], flat[1][source]], axis=-1)
        old = jax.lax.dynamic_slice_in_dim(entries, first, step)
        new = jnp.where(mine[:, None], new.astype(old.dtype), old)
        held = jax.lax.dynamic_slice_in_dim(positions, first, step)
        place = jnp.where(mine, flat[2][source], held)
        return (
            at + step,
            jax.lax.dynamic_update_slice_in_dim(entries, new, first, axis=0),
            jax.lax.dynamic_update_slice_in_dim(positions, place, first, axis=0),
        )

    state = (start[0], entries, positions)
    _, entries, positions = jax.lax.while_loop(lambda s: s[0] < end, one, state)
    return entries, positions
