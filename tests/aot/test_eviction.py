"""LaProx over a whole model at 131,072 tokens: what scoring, choosing and moving hold at once.

Compiled for a real chip from shapes alone. The cache is there whatever is done with it; asserted is
what comes on top of it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from popjax.config import LayerConfig, ModelConfig
from popjax.eviction import LaProx, pool
from popjax.eviction.evict import choose, score_layer
from popjax.eviction.method import LayerEntries, counts
from tests.aot.chips import first_chip

pytestmark = [pytest.mark.aot, pytest.mark.slow]

# Llama-3.1-8B: 32 layers of 8 key/value heads.
LAYER = LayerConfig(num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336)
TOKENS, D = 131_072, 4096
CONFIG = ModelConfig("llama", 128, D, (LAYER,) * 32, max_positions=TOKENS)
METHOD = LaProx()
ON_TOP = 0.05  # of the cache's bytes


CHIP = functools.cache(lambda: first_chip("v5p"))


def shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=CHIP())


def held(function: Any, donate: tuple[int, ...], *arrays: Any, **static: Any) -> Any:
    """Memory of a program of these shapes."""
    program = jax.jit(functools.partial(function, **static), donate_argnums=donate)
    return program.lower(*arrays).compile().memory_analysis()


def test_global_scoring_holds_little_beside_the_cache() -> None:
    heads = (1, LAYER.num_kv_heads, TOKENS)
    k = shaped((*heads, LAYER.head_dim), jnp.bfloat16)
    cache = 2 * len(CONFIG.layers) * math.prod(k.shape) * 2
    places = shaped((1, TOKENS), jnp.int32)
    queries = shaped((1, METHOD.window, LAYER.num_heads, LAYER.head_dim), jnp.bfloat16)
    seen = queries, shaped((1, METHOD.window), jnp.int32)
    params = {"o": shaped((LAYER.num_heads, LAYER.head_dim, D), jnp.bfloat16)}
    one = held(
        score_layer, (), params, seen, LayerEntries(k, k, places), method=METHOD, layer=LAYER
    )
    scores = (shaped(heads, jnp.float32),) * len(CONFIG.layers)
    row = shaped((1,), jnp.int32)
    given = {"method": METHOD, "config": CONFIG, "align": 16}
    chosen = held(choose, (), scores, places, row, row, **given)
    windows = len(CONFIG.layers) * math.prod(queries.shape) * 2
    all_scores = len(CONFIG.layers) * math.prod(heads) * 4
    most = max(
        windows + all_scores + one.temp_size_in_bytes,
        windows + all_scores + chosen.temp_size_in_bytes + chosen.output_size_in_bytes,
    )
    assert most <= ON_TOP * cache, (most / cache, one, chosen)


def test_moving_a_layer_holds_little_beside_its_pool() -> None:
    """The pool itself is 5 % of the cache; moving one layer's entries into it holds an order."""
    heads = (1, LAYER.num_kv_heads, TOKENS)
    k = shaped((*heads, LAYER.head_dim), jnp.bfloat16)
    _, totals = counts(LaProx(keep=0.05), CONFIG, [TOKENS])
    rows = pool.capacity(sum(totals) + 15 * len(CONFIG.layers) * LAYER.num_kv_heads, 16)
    entries = shaped((rows, 2 * LAYER.head_dim), jnp.bfloat16)
    slots, starts = shaped((1, TOKENS), jnp.int32), shaped(heads[:2], jnp.int32)
    keep = shaped(heads, bool)
    arrays = (entries, shaped((rows,), jnp.int32), k, k, slots, keep, starts, starts)
    found = held(pool.fill, (0, 1), *arrays)
    assert found.alias_size_in_bytes >= rows * 2 * LAYER.head_dim * 2
    cache = 2 * len(CONFIG.layers) * math.prod(k.shape) * 2
    assert found.temp_size_in_bytes <= 0.01 * cache
