"""Score of every cached key: what a window of queries takes from it, times the length of its value.

Two passes over blocks of keys, so that neither attention [N, W, S] nor projected values [S, D] are
ever held. Implementations are named as those of `masked_mlp`. `pallas_tpu`: the TPU kernel, which
reads keys twice and values once and holds nothing beside them; `pallas_interpret`: the same,
interpreted. All others are XLA, whose blocks of 4 MB stay in a processor's cache, so that it takes
less time than the same products written to memory.

`pallas_gpu` is XLA too, in blocks of 16 MB. Compiled for an H100, a window of 32 queries over the
keys of a layer of Llama-3.1-8B takes 19 MB of temporaries at 8192 keys and at 131072 (70B: 18 MB,
SmolLM2-135M: 6 MB), used again for every block. They fit the chip's cache of 50 MB, so memory sees
keys twice, values once and the scores, which is all that a kernel of its own would have to move.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.kv_score import tpu, xla
from kernels_pallas.kv_score.reference import COLUMNS, GROUPS, VALUES, Rule
from kernels_pallas.masked_mlp import IMPLEMENTATIONS


def kv_score(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    gram: jax.Array | None = None,
    columns: str = "l2",
    values: str = "none",
    group: str = "mean",
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scores [B, K, S] float32 of keys and values k, v [B, K, S, H] under queries q [B, W, N, H].

    Positions [B, W] and [B, S] int32, -1 for padding and empty slots; a key is seen when it is not
    later than the query and, with a `window`, fewer than that many positions back. Weights are the
    softmax over the keys seen, of scores q.k / sqrt(H), capped as softcap * tanh(score / softcap).
    columns: the 2-norm of a key's weights over the W queries, or their mean over those that are no
    padding. values: 1, ||v||, or sqrt(v G_n v^T) with `gram` [N, H, H] float32, which is
    ||v W_O^n|| for G_n = W_O^n W_O^n^T; gram is not read otherwise. group "mean": products of both,
    averaged over the query heads n of a KV head; "literal": weights averaged before the norm, times
    the averaged norms. Keys that no query sees score 0. Raises ValueError for shapes and dtypes
    that disagree and for unknown names. Without an implementation the TPU kernel runs on a TPU
    where it can, XLA elsewhere. LaProx, arXiv 2605.07234, Eq. 8 and 9.
    """
    rule = Rule(columns=columns, values=values, group=group, window=window, softcap=softcap)
    if implementation is None:
        implementation = _preferred(q, k, rule)
    _check_rule(rule, gram, implementation)
    _check_shapes(q, k, v, query_positions, key_positions, gram)
    arrays = (q, k, v, query_positions, key_positions, gram)
    if implementation == "pallas_gpu":
        return xla.kv_score(*arrays, rule, xla.GPU_BLOCK_VALUES)
    if implementation not in ("pallas_tpu", "pallas_interpret"):
        return xla.kv_score(*arrays, rule)
    reason = tpu.obstacle(q, k, rule)
    if reason is not None:
        raise ValueError(f"kv_score cannot run on {implementation!r}: {reason}: use 'xla'")
    return tpu.kv_score(*arrays, rule, interpret=implementation == "pallas_interpret")


def _preferred(q: jax.Array, k: jax.Array, rule: Rule) -> str:
    """What serves these arrays best on this machine."""
    backend = jax.default_backend()
    if backend == "tpu" and q.ndim == k.ndim == 4 and tpu.obstacle(q, k, rule) is None:
        return "pallas_tpu"
    return "pallas_gpu" if backend == "gpu" else "xla"


def _check_rule(rule: Rule, gram: jax.Array | None, implementation: str) -> None:
    names = {
        "columns": (rule.columns, COLUMNS),
        "values": (rule.values, VALUES),
        "group": (rule.group, GROUPS),
        "implementation": (implementation, IMPLEMENTATIONS),
    }
    for what, (name, known) in names.items():
        if name not in known:
            raise ValueError(f"kv_score {what} {name!r} is unknown: use one of {known}")
    if rule.values == "projected" and gram is None:
        raise ValueError("kv_score values 'projected' needs gram [N,H,H]: give it, or use 'norm'")
    if rule.window is not None and rule.window < 1:
        raise ValueError(
            f"kv_score window is {rule.window}, the least is 1: use None for no window"
        )
    if rule.softcap is not None and not rule.softcap > 0:
        raise ValueError(f"kv_score softcap is {rule.softcap}, not above 0: use None for no cap")


def _check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    gram: jax.Array | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"kv_score needs q [B,W,N,H] and k, v [B,K,S,H], got {q.shape}, {k.shape}, {v.shape}"
        )
    (B, W, N, H), (K, S) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != H:
        raise ValueError(f"kv_score q has B={B}, H={H}, but k has B={k.shape[0]}, H={k.shape[3]}")
    if not H or not K or N % K:
        raise ValueError(
            f"kv_score needs H of 1 or more and N a multiple of K, got {H=}, {N=}, {K=}"
        )
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"kv_score needs q, k, v in one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if query_positions.shape != (B, W) or key_positions.shape != (B, S):
        raise ValueError(
            f"kv_score needs positions [B,W]={(B, W)} and [B,S]={(B, S)}, "
            f"got {query_positions.shape}, {key_positions.shape}"
        )
    if query_positions.dtype.kind != "i" or key_positions.dtype.kind != "i":
        found = f"{query_positions.dtype}, {key_positions.dtype}"
        raise ValueError(f"kv_score needs integer positions, got {found}")
    if gram is not None and (gram.shape != (N, H, H) or gram.dtype != jnp.float32):
        raise ValueError(
            f"kv_score needs gram [N,H,H]={(N, H, H)} float32, got {gram.shape} {gram.dtype}"
        )


__all__ = ["COLUMNS", "GROUPS", "IMPLEMENTATIONS", "VALUES", "Rule", "kv_score"]
