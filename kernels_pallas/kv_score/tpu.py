"""Scores of cached keys as one Pallas kernel for TPU.

The grid walks the blocks of keys twice: for the normaliser of every query's softmax, kept in VMEM,
then for the columns. A step works all KV heads. Keys are the lanes of everything computed, so
columns are sums of whole vectors. A TPU keeps [S, H] of H = 64, 80 or 96 by columns, which wastes
no memory; the kernel then reads [H, S], which is the same bytes. Products of bfloat16 are one pass
of the matrix unit, those of float32 and of the Gram matrices are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.kv_score.reference import Rule, combined

LANES, SUBLANES = 128, 8
_BLOCKS = (1024, 512, 256, 128)
# What a step may hold, reckoned by `Cut.held`; the limit leaves the compiler as much again for what
# it spills. VMEM holds 95 MB or more from v5e.
_STEP_BYTES, _VMEM_BYTES = 32 * 2**20, 80 * 2**20
# Below every score, and finite: minus infinity less itself is no number.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the keys are cut into blocks, for one set of shapes."""

    B: int
    K: int
    G: int
    W: int  # queries of a window, rounded up to whole tiles
    H: int
    S: int
    itemsize: int
    block: int
    rule: Rule

    @property
    def steps(self) -> int:
        return -(-self.S // self.block)

    @property
    def by_columns(self) -> bool:
        """Whether a TPU keeps the keys as [H, S] where they are written [S, H]."""
        return self.H % LANES != 0

    @property
    def row(self) -> tuple[int, ...]:
        """What lies between heads and keys of the scores: a TPU keeps K = 3 rows one by one."""
        return (1,) if self.K % SUBLANES else ()

    @property
    def held(self) -> int:
        """Bytes of VMEM: blocks twice, statistics and Gram matrices, and what is computed."""
        caches = 2 * 2 * self.K * self.block * max(self.H, LANES) * self.itemsize
        statistics = 2 * self.K * self.G * self.W * LANES * 4
        weights = 3 * self.G * self.W * self.block * 4
        if self.rule.values != "projected":
            return caches + statistics + weights
        width = -(-self.H // LANES) * LANES
        grams = 2 * self.K * self.G * self.H * width * 4
        return caches + statistics + weights + grams + 2 * self.G * self.H * self.block * 4

    def keys(self) -> pl.BlockSpec:
        """The block of keys at every step of the grid (row, pass, block)."""
        return self._cache(lambda b, p, i: i)

    def values(self) -> pl.BlockSpec:
        """The block of values: the first, and not fetched again, all through the first pass."""
        return self._cache(lambda b, p, i: p * i)

    def scores(self) -> pl.BlockSpec:
        """The block of scores, which is written out when the second pass has left it."""
        shape, rest = (1, self.K, *self.row, self.block), (0,) * len(self.row)
        return pl.BlockSpec(shape, lambda b, p, i: (b, 0, *rest, p * i))

    def places(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.block), lambda b, p, i: (b, 0, i))

    def _cache(self, place: Any) -> pl.BlockSpec:
        if self.by_columns:
            shape = (1, self.K, self.H, self.block)
            return pl.BlockSpec(shape, lambda *at: (at[0], 0, 0, place(*at)))
        shape = (1, self.K, self.block, self.H)
        return pl.BlockSpec(shape, lambda *at: (at[0], 0, place(*at), 0))

    def cost(self) -> pl.CostEstimate:
        keys = self.B * self.K * self.S * self.H
        weights = self.B * self.K * self.G * self.W * self.S
        flops = 2 * 2 * weights * self.H
        read = 2 * keys * self.itemsize + 4 * self.B * self.S * (self.K + 2)
        if self.rule.values != "none":
            read += keys * self.itemsize
        if self.rule.values == "projected":
            flops += 2 * keys * self.G * self.H
            read += self.K * self.G * self.H * self.H * 4
        return pl.CostEstimate(flops=flops, transcendentals=2 * weights, bytes_accessed=read)


def cut(q: Any, k: Any, rule: Rule) -> Cut:
    """The largest blocks that fit, of q [B, W, N, H] and k [B, K, S, H]."""
    (B, W, N, H), (K, S) = q.shape, k.shape[1:3]
    rounded = -(-W // SUBLANES) * SUBLANES
    fixed = (B, K, N // K, rounded, H, S, k.dtype.itemsize)
    found = [Cut(*fixed, block if block < S else S, rule) for block in _BLOCKS]
    return next((how for how in found if how.held <= _STEP_BYTES), found[-1])


def obstacle(q: Any, k: Any, rule: Rule) -> str | None:
    """Why this kernel cannot serve q [B, W, N, H] and k [B, K, S, H]; None where it can."""
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the keys are {k.dtype}, and it reads bfloat16 and float32"
    (_, W, N, H), K = q.shape, k.shape[1]
    if H % SUBLANES:
        return f"H = {H} is no multiple of {SUBLANES}"
    how = cut(q, k, rule)
    if how.held > _STEP_BYTES:
        return (
            f"{W=} queries of {N=} heads on {K=}, {H=} hold {how.held} bytes of VMEM a step, more "
            f"than {_STEP_BYTES}"
        )
    return None


def kv_score(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    gram: jax.Array | None,
    rule: Rule,
    interpret: Any = False,
) -> jax.Array:
    """Scores [B, K, S] float32; see `kernels_pallas.kv_score.kv_score`."""
    (B, W, _, H), (K, S) = q.shape, k.shape[1:3]
    if not (B * W * S):
        return jnp.zeros((B, K, S), jnp.float32)
    how = cut(q, k, rule)
    more = ((0, 0), (0, how.W - W))
    # Queries that fill up the tile are padding: they see nothing.
    places = jnp.pad(query_positions, more, constant_values=-1)[:, :, None]
    queries = jnp.pad(q, (*more, (0, 0), (0, 0))).reshape(B, how.W, K, how.G, H)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    turned = (lambda x: x.swapaxes(2, 3)) if how.by_columns else (lambda x: x)
    arrays = [queries, places, key_positions[:, None], turned(k)]
    specs = [_whole(queries), _whole(places), how.places(), how.keys()]
    if rule.values != "none":
        arrays, specs = [*arrays, turned(v)], [*specs, how.values()]
    if rule.values == "projected" and gram is not None:
        grams = gram.reshape(K, how.G * H, H)
        arrays.append(grams)
        specs.append(pl.BlockSpec(grams.shape, lambda *_: (0, 0, 0)))
    found = pl.pallas_call(
        lambda *refs: _step(how, refs[: len(arrays)], *refs[len(arrays) :]),
        jax.ShapeDtypeStruct((B, K, *how.row, S), jnp.float32),
        grid=(B, 2, how.steps),
        in_specs=specs,
        out_specs=how.scores(),
        scratch_shapes=[pltpu.VMEM((K, how.G * how.W, 1), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=how.cost(),
        interpret=interpret,
        name="kv_score",
    )(*arrays)
    return found.reshape(B, K, S)


def _whole(x: jax.Array) -> pl.BlockSpec:
    """One row of x [B, ...], all through its steps."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, p, i: (b, *(0 for _ in x.shape[1:])))


def _step(how: Cut, arrays: tuple[Any, ...], out: Any, most: Any, total: Any) -> None:
    """One block of one pass. After the first pass `most` is the logarithm of the normaliser."""
    q, at, places, k = arrays[:4]
    second, i = pl.program_id(1) == 1, pl.program_id(2)
    seen = _seen(how, at[0], places[0], i)

    @pl.when(jnp.logical_not(second) & (i == 0))
    def _() -> None:
        most[...] = jnp.full(most.shape, _LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def attended(j: Any) -> jax.Array:
        scores = _dot(q[0, j], k[0, j], 0 if how.by_columns else 1) * jnp.float32(how.H**-0.5)
        if how.rule.softcap is not None:
            scores = how.rule.softcap * jnp.tanh(scores / how.rule.softcap)
        return jnp.where(seen[None], scores.reshape(how.G, how.W, how.block), -jnp.inf)

    def normalise(j: Any, _: None) -> None:
        scores = attended(j).reshape(how.G * how.W, how.block)
        higher = jnp.maximum(most[j], jnp.max(scores, axis=1, keepdims=True))
        added = jnp.sum(jnp.exp(scores - higher), axis=1, keepdims=True)
        total[j] = total[j] * jnp.exp(most[j] - higher) + added
        most[j] = higher

    def write(j: Any, _: None) -> None:
        weights = jnp.exp(attended(j) - most[j].reshape(how.G, how.W, 1))
        count = jnp.maximum(jnp.sum(jnp.where(at[0] >= 0, 1.0, 0.0), axis=0, keepdims=True), 1.0)
        found = combined(weights, _norms(how, arrays[4:], j), count, how.rule)
        anyone = jnp.max(jnp.where(seen, 1.0, 0.0), axis=0, keepdims=True) > 0
        out[0, pl.ds(j, 1)] = jnp.where(anyone, found, 0.0).reshape(1, *how.row, how.block)

    @pl.when(jnp.logical_not(second))
    def _() -> None:
        lax.fori_loop(0, how.K, normalise, None)

    @pl.when(jnp.logical_not(second) & (i == how.steps - 1))
    def _() -> None:
        # A query that sees nothing keeps a finite one, under which all its weights are exp(-inf).
        sums = total[...]
        most[...] += jnp.log(jnp.where(sums > 0, sums, 1.0))

    @pl.when(second)
    def _() -> None:
        lax.fori_loop(0, how.K, write, None)


def _seen(how: Cut, queries: jax.Array, keys: jax.Array, i: jax.Array) -> jax.Array:
    """Which keys of a block are seen [W, block], of positions [W, 1] and [1, block]."""
    seen = (queries >= 0) & (keys >= 0) & (keys <= queries)
    if how.rule.window is not None:
        seen &= queries - keys < how.rule.window
    if how.S % how.block:
        # The last block reaches beyond the keys, where anything may lie.
        index = i * how.block + lax.broadcasted_iota(jnp.int32, keys.shape, 1)
        seen &= index < how.S
    return seen


def _norms(how: Cut, arrays: tuple[Any, ...], j: Any) -> jax.Array | None:
    """Norms [G or 1, block] of the values of a KV head, None where they do not count."""
    if how.rule.values == "none":
        return None
    values = arrays[0][0, j].astype(jnp.float32)
    values = values if how.by_columns else values.T
    if how.rule.values == "norm":
        return jnp.sqrt(jnp.sum(values * values, axis=0, keepdims=True))
    projected = _dot(arrays[1][j], values, 0).reshape(how.G, how.H, how.block)
    return jnp.sqrt(jnp.maximum(jnp.sum(projected * values[None], axis=1), 0.0))


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [R, H] times b over this axis of b, which is H."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=exact, preferred_element_type=jnp.float32)
