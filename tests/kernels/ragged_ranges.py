"""Ragged ranges of a pool and tails to attend to, and the attention in NumPy.

Pool rows and tail slots that no head may read hold NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

ALIGNMENT = 16
B, K, G, M, E = 2, 2, 3, 304, 2048
NOW = 5000  # position of the first slot of the tail
# Lengths of the four ranges, and how many slots of each row's tail are in use.
FILLS = [
    ([0, 1, 256, 17], [0, 1]),
    ([600, 0, 0, 0], [304, 0]),
    ([255, 257, 512, 300], [16, 290]),
    ([16, 0, 0, 2032], [257, 256]),
]
# H, dtype, window, softcap.
FORMS = [
    (64, "float32", None, None),
    (64, "bfloat16", 2500, None),
    (128, "bfloat16", None, 20.0),
    (128, "float32", 200, 5.0),
]


def aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def problem(
    lengths: list[int], tails: list[int], H: int, dtype: str, order: list[int] | None = None
) -> tuple[jax.Array, ...]:
    """Arguments whose ranges lie in the pool in this order, head i as drawn whatever the order."""
    entries, positions = np.full((E, 2 * H), np.nan), np.full(E, -1)
    starts, start = np.zeros(B * K, int), 0
    for i in order or range(B * K):
        rng, n = np.random.default_rng(i), lengths[i]
        starts[i], kept = start, slice(start, start + n)
        entries[kept] = rng.standard_normal((n, 2 * H))
        positions[kept] = np.sort(rng.permutation(NOW)[:n])
        start += aligned(n)
    rng = np.random.default_rng(99)
    q = rng.standard_normal((B, 1, K * G, H))
    used = np.arange(M) < np.asarray(tails)[:, None]
    drawn = rng.standard_normal((2, B, K, M, H))
    k, v = np.where(used[None, :, None, :, None], drawn, np.nan)
    tail_positions = np.where(used, NOW + np.arange(M), -1)
    query = np.maximum(tail_positions.max(axis=1, keepdims=True), NOW)
    whole = [positions, starts.reshape(B, K), np.reshape(lengths, (B, K)), query, tail_positions]
    whole = [jnp.asarray(x, jnp.int32) for x in whole]
    numbers = [jnp.asarray(x, dtype) for x in (q, entries, k, v)]
    return (*numbers[:2], *whole[:3], *numbers[2:], *whole[3:])


def as_bits(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The tail as a decode loop on a CPU carries bfloat16; others as they are."""
    if arrays[5].dtype != jnp.bfloat16:
        return arrays
    tails = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in arrays[5:7])
    return (*arrays[:5], *(x.reshape(B * K, *x.shape[2:]) for x in tails), *arrays[7:])


def oracle(
    arrays: tuple[jax.Array, ...], window: int | None, softcap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The attention, and what a relative error of every term of its sums would change."""
    q, entries, tail_k, tail_v = (np.asarray(arrays[i], np.float64) for i in (0, 1, 5, 6))
    positions, starts, lengths, query, late = (np.asarray(arrays[i]) for i in (2, 3, 4, 7, 8))
    H = q.shape[-1]
    out, size = np.zeros(q.shape), np.zeros(q.shape)
    for b, n in np.ndindex(B, K * G):
        k = n // G
        held = slice(starts[b, k], starts[b, k] + lengths[b, k])
        keys = np.concatenate([entries[held, :H], tail_k[b, k]])
        values = np.concatenate([entries[held, H:], tail_v[b, k]])
        back = query[b] - np.concatenate([positions[held], late[b]])
        seen = (back >= 0) & (back <= query[b]) & (back < (window or NOW * 2))
        scores = keys[seen] @ q[b, 0, n] / np.sqrt(H)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if not seen.any():
            continue
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, 0, n] = weights @ values[seen]
        size[b, 0, n] = weights @ np.abs(values[seen]) * (1 + np.abs(scores).max())
    return out, size
