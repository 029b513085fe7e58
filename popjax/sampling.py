"""Choosing the next token: the usual filters, in the order and with the meaning of transformers.

What is on (sampling, filters, penalty) is static; the values are data, so changing a temperature
compiles nothing. Randomness is explicit: one key a row, folded with the step number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What a caller asks for; None or the neutral value turns a filter off.

    Raises ValueError naming the value and the range where one is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        # Beyond these, float32 logits would overflow or vanish.
        _check("temperature", self.temperature, 1e-30, 1e30)
        _check("repetition_penalty", self.repetition_penalty, 1e-30, 1e30)
        _check("top_p", 1.0 if self.top_p is None else self.top_p, 0.0, 1.0)
        _check("min_p", 0.0 if self.min_p is None else self.min_p, 0.0, 1.0)
        _check("top_k", self.top_k or 0, 0, math.inf, whole=True)
        _check("min_new_tokens", self.min_new_tokens, 0, math.inf, whole=True)

    def flags(self) -> SamplingFlags:
        nucleus = self.top_p is not None and self.top_p < 1
        return SamplingFlags(
            sample=self.do_sample,
            ranked=self.do_sample and (bool(self.top_k) or nucleus),
            min_p=self.do_sample and bool(self.min_p),
            penalty=self.repetition_penalty != 1.0,
        )

    def values(self, eos_ids: Sequence[int], vocab_size: int) -> SamplingValues:
        return SamplingValues(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(min(self.top_k or vocab_size, vocab_size)),
            top_p=jnp.float32(1.0 if self.top_p is None else self.top_p),
            min_p=jnp.float32(self.min_p or 0.0),
            repetition_penalty=jnp.float32(self.repetition_penalty),
            min_new_tokens=jnp.int32(self.min_new_tokens),
            eos_ids=jnp.asarray(list(eos_ids), jnp.int32),
        )


def _check(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:
        range_ = f"at least {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
        range_ += " and a whole number" if whole else ""
        raise ValueError(f"{name} {value!r} is out of range: it must be {range_}")


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Which parts of the sampler run: static, since each changes the program."""

    sample: bool = False
    ranked: bool = False
    min_p: bool = False
    penalty: bool = False


@struct.dataclass
class SamplingValues:
    """The numbers of the sampler, all scalars but eos_ids [number of end tokens]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    min_new_tokens: jax.Array
    eos_ids: jax.Array


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits [B, V] of tokens seen [B, V] divided (if positive) or multiplied by the penalty."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def without_eos(logits: jax.Array, values: SamplingValues, step: jax.Array) -> jax.Array:
    """Logits [B, V] with the end tokens at -inf while fewer than min_new_tokens are out."""
    if values.eos_ids.shape[0] == 0:
        return logits
    early = step < values.min_new_tokens
    blocked = jnp.zeros((logits.shape[-1],), bool).at[values.eos_ids].set(True, mode="drop")
    return jnp.where(early & blocked[None, :], -jnp.inf, logits)


def ranked_filter(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf outside the top_k largest, then outside the top_p nucleus.

    Ties with the k-th largest stay. The nucleus is the smallest set of most likely tokens whose
    probability reaches top_p; the most likely token always stays.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, :]
    least_k = jnp.take_along_axis(ordered, jnp.broadcast_to(top_k - 1, (len(logits), 1)), axis=-1)
    probability = jax.nn.softmax(jnp.where(ordered >= least_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # A sum of probabilities may round to 1 before the last token: a top_p of 1 must still keep all.
    inside = ((before < top_p) | (top_p >= 1) | (rank == 0)) & (ordered >= least_k)
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def min_p_filter(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf where a probability is below min_p times the largest one."""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def processed(
    logits: jax.Array,
    seen: jax.Array | None,
    values: SamplingValues,
    flags: SamplingFlags,
    step: jax.Array,
) -> jax.Array:
    """Logits [B, V] after penalty, minimum length, temperature and the filters, in that order."""
    if flags.penalty:
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        logits = penalised(logits, seen, values.repetition_penalty)
    logits = without_eos(logits, values, step)
    if flags.sample:
        logits = logits / values.temperature
    if flags.ranked:
        logits = ranked_filter(logits, values.top_k, values.top_p)
    if flags.min_p:
        logits = min_p_filter(logits, values.min_p)
    return logits


def choose(logits: jax.Array, keys: jax.Array, flags: SamplingFlags, step: jax.Array) -> jax.Array:
    """Next tokens [B] int32 from processed logits [B, V]; keys [B] of each row's own stream."""
    if not flags.sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(key: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(draw)(keys, logits).astype(jnp.int32)


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """One random key a row: row i of a single seed, or a seed of its own for every row.

    A row given its own seed draws the same tokens whatever batch it is in.
    Raises ValueError when the number of seeds is not the number of rows, or one is no seed.
    """
    if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str) or np.ndim(seed) == 0:
        base = _key(seed)
        return jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(rows))
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows: give one seed, or one a row")
    return jax.vmap(lambda key: jax.random.fold_in(key, 0))(jnp.stack([_key(s) for s in seed]))


def _key(seed: Any) -> jax.Array:
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed {seed!r} is not a whole number of 64 bits: give one that is")
    return jax.random.key(int(seed))
