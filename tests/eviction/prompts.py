"""Prompts as attention layers see them: random heads of rows of uneven length, and what stays.

`kept` goes through a method as prefill and eviction do, without a model: observe and score layer by
layer, then allocate. Budgets are data there, so the programs serve all budgets of a method.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.evict import choose
from popjax.eviction.method import AttentionActs, KvMethod, LayerEntries

N, K, H, D = 4, 2, 8, 16
LAYER = LayerConfig(num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=8)


@dataclasses.dataclass(frozen=True)
class Heads:
    """One layer of one prompt of n tokens: q [n, N, H], k and v [K, n, H], o [N, H, D]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray

    @property
    def queries(self) -> int:
        """Query heads that share a KV head."""
        return self.o.shape[0] // self.k.shape[0]


Prompt = tuple[Heads, ...]  # a layer each


def prompt(length: int, seed: int, layers: int = 2, heads: int = N, kv_heads: int = K) -> Prompt:
    """A prompt whose keys and values differ in size, in float32."""
    rng = np.random.default_rng([seed, length])
    weights = np.random.default_rng(seed)
    made = []
    for i in range(layers):
        shapes = ((length, heads, H), (kv_heads, length, H), (kv_heads, length, H))
        q, k, v = (rng.standard_normal(shape) for shape in shapes)
        q *= 0.4 * 3**i  # later layers attend to fewer tokens
        v *= np.exp(rng.standard_normal((kv_heads, length, 1)))
        o = weights.standard_normal((heads, H, D)) / np.sqrt(heads * H)
        made.append(Heads(*(x.astype(np.float32) for x in (q, k, v, o))))
    return tuple(made)


def acts(rows: Sequence[Prompt], layer: int, slots: int) -> tuple[dict[str, Any], AttentionActs]:
    """Parameters of attention, and what it shows of rows padded on the left to `slots`."""
    q, k, v = ([getattr(row[layer], name) for row in rows] for name in "qkv")
    before = [slots - len(one) for one in q]
    pads = list(zip(before, q, k, v, strict=True))
    # Pads are no zeros: nothing may count them.
    q = jnp.stack([_padded(one, n, 0) for n, one, _, _ in pads])
    k = jnp.stack([_padded(one, n, 1) for n, _, one, _ in pads])
    v = jnp.stack([_padded(one, n, 1) for n, _, _, one in pads])
    places = jnp.asarray([[max(s - n, -1) for s in range(slots)] for n in before], jnp.int32)
    x = jnp.zeros((len(rows), slots, D))
    o = {"o": jnp.asarray(rows[0][layer].o)}
    return o, AttentionActs(x, q, k, v, places, places, jnp.int32(0))


def _padded(x: np.ndarray, before: int, axis: int) -> np.ndarray:
    width = [(0, 0)] * x.ndim
    width[axis] = (before, 0)
    return np.pad(x, width, constant_values=3.0)


@functools.cache
def _score(method: KvMethod, layer: LayerConfig) -> Any:
    """The scores of one layer, compiled once for all of them."""

    def run(params: Any, seen: AttentionActs) -> jax.Array:
        statistic = method.observe(params, layer, seen)
        entries = LayerEntries(seen.k, seen.v, seen.key_positions)
        return method.score(params, layer, statistic, entries)

    return jax.jit(run)


_choose = jax.jit(choose, static_argnames=("method", "config", "align"))


def ran(
    method: KvMethod, rows: Sequence[Prompt], budgets: Sequence[int], slots: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which entries stay, bool [L, K, n] a row, and their scores [..., n] as the method gave them.

    budgets: entries a head on average, window included, one a row.
    """
    heads = rows[0][0]
    layer = dataclasses.replace(
        LAYER, num_heads=heads.o.shape[0], num_kv_heads=heads.k.shape[0], head_dim=H
    )
    config = ModelConfig("llama", 8, D, (layer,) * len(rows[0]), max_positions=64)
    layers = [acts(rows, i, slots) for i in range(len(rows[0]))]
    scores = tuple(_score(method, layer)(*one) for one in layers)
    lengths = [row[0].q.shape[0] for row in rows]
    arrays = (jnp.asarray(x, jnp.int32) for x in (lengths, budgets))
    static = {"method": method, "config": config, "align": 1}
    keep, *_ = _choose(scores, layers[0][1].key_positions, *arrays, **static)
    whole, given = np.stack(keep), np.stack(scores)
    row_axis = given.ndim - 3
    assert not any(whole[:, b, :, : slots - n].any() for b, n in enumerate(lengths)), "pads stay"
    return (
        [whole[:, b, :, slots - n :] for b, n in enumerate(lengths)],
        [given.take(b, axis=row_axis)[..., slots - n :] for b, n in enumerate(lengths)],
    )


def kept(
    method: KvMethod, rows: Sequence[Prompt], budgets: Sequence[int], slots: int
) -> list[np.ndarray]:
    """The first result of `ran`."""
    return ran(method, rows, budgets, slots)[0]
