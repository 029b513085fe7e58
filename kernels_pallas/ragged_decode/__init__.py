"""Attention of new tokens over a ragged cache: a range of one pool for each head, and a tail.

After eviction each (layer, row, KV head) keeps its own number of entries. All of them lie in one
pool, each head's in a row; new tokens go to a tail of equal length for all. The CPU kernels and
those of the accelerators serve one new token a row, XLA any number. Which entries are kept is
none of this package's business.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import IMPLEMENTATIONS, NATIVE
from kernels_pallas.native import available
from kernels_pallas.ragged_decode import native, xla


def ragged_decode(
    q: jax.Array,
    entries: jax.Array,
    positions: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    query_positions: jax.Array,
    tail_positions: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Attention [B, T, N, H] of q [B, T, N, H] under one softmax over pool range and tail.

    Head k of row b holds rows starts[b, k] .. + lengths[b, k] - 1 of entries [E, 2H] (rotated
    key | value) with positions [E], and tail_k, tail_v [B, K, M, H] or [B*K, M, H] with
    tail_positions [B, M]; query n reads head n // (N // K). A key is seen when its position is not
    negative, not later than query_positions [B, T], and fewer than `window` back; scores become
    softcap * tanh(score / softcap). Numbers are float32, bfloat16 or its bits as uint16. A query
    that sees nothing gets zeros. Raises ValueError for shapes and dtypes that disagree, a window
    below 1, a softcap that is not positive and finite, and unknown implementations.
    """
    _check_options(window, softcap, implementation)
    _check_arrays(
        q, entries, positions, starts, lengths, tail_k, tail_v, query_positions, tail_positions
    )
    form = (*starts.shape, tail_positions.shape[1], q.shape[-1])
    tail_k, tail_v = tail_k.reshape(form), tail_v.reshape(form)
    pool, tail = (entries, positions, starts, lengths), (tail_k, tail_v)
    arrays = (q, *pool, *tail, query_positions, tail_positions)
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    kernel = _kernel(implementation, q, entries, tail_k, starts) if q.shape[1] == 1 else None
    return (kernel or xla.ragged_decode)(*arrays, **options)


def _kernel(
    implementation: str, q: jax.Array, entries: jax.Array, tail_k: jax.Array, starts: jax.Array
) -> Callable[..., jax.Array] | None:
    """The kernel of that name; None where there is none, or it does not serve these arrays."""
    if implementation == "native" or (implementation in NATIVE and available()):
        return native.ragged_decode
    # Imported here, since importing Pallas for accelerators takes time that others need not spend.
    if implementation in ("pallas_tpu", "pallas_interpret"):
        from kernels_pallas.ragged_decode import tpu

        if tpu.obstacle(q, entries, tail_k, starts) is None:
            interpret = implementation == "pallas_interpret"
            return functools.partial(tpu.ragged_decode, interpret=interpret)
    if implementation == "pallas_gpu":
        from kernels_pallas.ragged_decode import gpu

        if gpu.obstacle(q, entries, tail_k, starts) is None:
            return gpu.ragged_decode
    return None


def _check_options(window: int | None, softcap: float | None, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"ragged_decode implementation {implementation!r} is unknown: use one of "
            f"{IMPLEMENTATIONS}"
        )
    if window is not None and window < 1:
        raise ValueError(f"ragged_decode window is {window}, must be at least 1: use None for none")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"ragged_decode softcap is {softcap}, must be positive and finite: use None for none"
        )


def _check_arrays(
    q: jax.Array,
    entries: jax.Array,
    positions: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    query_positions: jax.Array,
    tail_positions: jax.Array,
) -> None:
    if q.ndim != 4 or starts.ndim != 2 or tail_positions.ndim != 2:
        raise ValueError(
            f"ragged_decode needs q [B,T,N,H], starts [B,K] and tail_positions [B,M], got "
            f"{q.shape}, {starts.shape}, {tail_positions.shape}"
        )
    B, T, N, H = q.shape
    K, M, E = starts.shape[1], tail_positions.shape[1], len(entries)
    tails = ((B, K, M, H), (B * K, M, H))
    wanted = {
        "entries": (entries, ((E, 2 * H),)),
        "positions": (positions, ((E,),)),
        "starts": (starts, ((B, K),)),
        "lengths": (lengths, ((B, K),)),
        "tail_k": (tail_k, tails),
        "tail_v": (tail_v, tails),
        "query_positions": (query_positions, ((B, T),)),
        "tail_positions": (tail_positions, ((B, M),)),
    }
    for name, (array, shapes) in wanted.items():
        if array.shape not in shapes:
            raise ValueError(
                f"ragged_decode needs {name} {' or '.join(map(str, shapes))} with q {q.shape}, "
                f"got {array.shape}"
            )
    if K < 1 or N % K:
        raise ValueError(f"ragged_decode needs query heads a multiple of KV heads, got {N}, {K}")
    kinds = {str(x.dtype).replace("uint16", "bfloat16") for x in (entries, tail_k, tail_v)}
    if str(q.dtype) not in _FLOATS or len(kinds) > 1 or not kinds <= set(_FLOATS):
        raise ValueError(
            f"ragged_decode needs queries in {' or '.join(_FLOATS)}, entries and tail alike in one "
            f"of them, got {q.dtype}, {entries.dtype}, {tail_k.dtype}, {tail_v.dtype}"
        )
    for name in ("positions", "starts", "lengths", "query_positions", "tail_positions"):
        if wanted[name][0].dtype != jnp.int32:
            raise ValueError(f"ragged_decode needs {name} in int32, got {wanted[name][0].dtype}")


_FLOATS = ("float32", "bfloat16")

__all__ = ["IMPLEMENTATIONS", "ragged_decode"]
