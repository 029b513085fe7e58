"""The mathematics of a decoder as pure functions of arrays, in the letters of `popjax.axes`.

Norms, softmax and rotary angles are computed in float32 and cast back; products accumulate in
float32. Knows no parameters by name, no config but `RopeConfig`, and of the cache only how its
numbers are carried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.masked_mlp import NATIVE
from kernels_pallas.ragged_decode import ragged_decode
from kernels_pallas.row_products import contract, expand, expand_many
from popjax.cache import Kept, floats
from popjax.config import RopeConfig

# Above this many queries, attention runs block by block: an 8k prompt's scores would otherwise take
# N * 8k * 8k * 4 bytes a layer (2.4 GB at N = 9).
QUERY_BLOCK = 512


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    offset: bool = False,
    shards: tuple[str, ...] | None = None,
) -> jax.Array:
    """Root-mean-square norm over the last axes of x [..., D] or [..., N, H], those of scale.

    Times scale, or with `offset` times 1 + scale in float32. `shards`: the mesh axes that split
    these axes into equal parts.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32 * x32, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
    if shards is not None:
        mean = jax.lax.pmean(mean, shards)
    shape = (1,) * (x.ndim - scale.ndim) + scale.shape
    normed = x32 * jax.lax.rsqrt(mean + eps)
    if offset:
        return (normed * (1.0 + scale.astype(jnp.float32).reshape(shape))).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype).reshape(shape)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis of x [..., D], times scale [D], plus bias [D]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale.shape
    scale32, bias32 = (w.astype(jnp.float32).reshape(shape) for w in (scale, bias))
    return (centred * inverse * scale32 + bias32).astype(x.dtype)


def soft_capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap); the scores themselves for None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def shifted(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y [B, T, D] plus bias [D] in the dtype of y; None leaves it."""
    return y if bias is None else y + bias.astype(y.dtype)[None, None, :]


def above(x: jax.Array, threshold: jax.Array | None) -> jax.Array:
    """x with magnitudes up to a threshold (scalar, float32) taken for zero; None leaves it."""
    if threshold is None:
        return x
    return jnp.where(jnp.abs(x).astype(jnp.float32) > threshold, x, jnp.zeros((), x.dtype))


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times factor, worked in float32 and cast back; x itself for 1."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency of each rotary pair [H/2, or fewer] in radians a position, float32.

    "llama3" divides by `factor` the frequencies whose wavelength exceeds
    original/low_freq_factor, keeps those below original/high_freq_factor, and blends between.
    """
    size = rope.rotated(head_dim)
    inverse = rope.theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "factors":
        inverse = inverse / np.asarray(rope.factors, np.float64)
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        inverse = (1 - blend) * inverse / rope.factor + blend * inverse
    return inverse.astype(np.float32)


def rope_table(
    positions: jax.Array, rope: RopeConfig, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, H/2, or fewer] of positions [B, T], float32."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    angle = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if rope.magnitude == 1 else (cos * rope.magnitude, sin * rope.magnitude)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x [B, T, heads, H]; pairs are (i, i + R/2), the Hugging Face order.

    R is twice the width of the table; what follows the first R numbers of a head stays.
    """
    cos, sin = (part[:, :, None, :] for part in table)
    R = 2 * cos.shape[-1]
    low, high = jnp.split(x[..., :R].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if x.shape[-1] == R else jnp.concatenate([turned, x[..., R:]], axis=-1)


def attention_mask(
    query_positions: jax.Array, key_positions: jax.Array, window: int | None
) -> jax.Array:
    """Which keys a query sees [B, T, S]: real (position >= 0), not later, inside the window.

    Positions [B, T] and [B, S]; -1 marks padding. With positions 0..3 and window 2:

        1 . . .
        1 1 . .
        . 1 1 .
        . . 1 1
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen &= query - key < window
    return seen


def heads_in(
    x: jax.Array, weights: Sequence[jax.Array], implementation: str = "xla"
) -> list[jax.Array]:
    """Heads [B, T, N_i, H] of x [B, T, D] under each weight [N_i, H, D]."""
    # As plain matrices: contracting D of a rank-three weight makes XLA's CPU backend transpose
    # and hold a second copy of it.
    flat = expand_many(x, [w.reshape(-1, w.shape[-1]) for w in weights], implementation)
    pairs = zip(flat, weights, strict=True)
    return [y.reshape(*x.shape[:2], *w.shape[:2]) for y, w in pairs]


def heads_out(heads: jax.Array, weight: jax.Array, implementation: str = "xla") -> jax.Array:
    """Sum over heads [B, T, N, H] of each head times its weight [N, H, D]: [B, T, D]."""
    flat = heads.reshape(*heads.shape[:2], -1)
    return contract(flat, weight.reshape(-1, weight.shape[-1]), implementation)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None = None
) -> jax.Array:
    """Scaled dot-product attention [B, T, N, H] of grouped queries, scores capped by `softcap`.

    q [B, T, N, H]; k, v [B, K, S, H] or [B*K, S, H]; mask [B, T, S]. A query that sees nothing
    (padding) gets the plain mean of v: finite, and never read.
    """
    B, T, N, H = q.shape
    lead, S = k.shape[:-2], k.shape[-2]
    K = math.prod(lead) // B
    # Queries of a group side by side with time: both products are then plain batched matrices.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(*lead, -1, H)
    scores = jnp.einsum("...QH,...SH->...QS", grouped, k, preferred_element_type=jnp.float32)
    scores = soft_capped(scores.reshape(B, K, N // K, T, S) * (H**-0.5), softcap)
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*lead, -1, S)
    out = jnp.einsum("...QS,...SH->...QH", weights, v)
    return out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
    softcap: float | None = None,
) -> jax.Array:
    """`attention` with its mask, a block of QUERY_BLOCK queries at a time where T is long."""
    B, T = query_positions.shape
    if T <= 2 * QUERY_BLOCK or T % QUERY_BLOCK:
        mask = attention_mask(query_positions, key_positions, window)
        return attention(q, k, v, mask, softcap)

    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, positions = block
        return attention(queries, k, v, attention_mask(positions, key_positions, window), softcap)

    blocks = T // QUERY_BLOCK
    split_q = q.reshape(B, blocks, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    split_positions = query_positions.reshape(B, blocks, QUERY_BLOCK).swapaxes(0, 1)
    out = jax.lax.map(one, (split_q, split_positions))
    return out.swapaxes(0, 1).reshape(q.shape)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
    implementation: str = "xla",
    kept: Kept | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention [B, T, N, H] over the cache k, v, and over what an eviction `kept` of the layer.

    One token a row may run on the CPU kernels.
    """
    if kept is not None:
        pool = (kept.entries, kept.positions, kept.starts, kept.lengths)
        options = {"window": window, "softcap": softcap, "implementation": implementation}
        return ragged_decode(q, *pool, k, v, query_positions, key_positions, **options)
    if q.shape[1] > 1 or implementation not in NATIVE:
        keys, values = floats(k), floats(v)
        return blocked_attention(q, keys, values, query_positions, key_positions, window, softcap)
    out = decode_attention(q[:, 0], k, v, query_positions[:, 0], key_positions, window, softcap)
    return out[:, None]


def logits(x: jax.Array, table: jax.Array, implementation: str = "xla") -> jax.Array:
    """Next-token logits [..., V] in float32 of x [..., D] against an output table [V, D]."""
    if implementation != "xla":
        return expand(x, table, implementation, jnp.float32)
    return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
