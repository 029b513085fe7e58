"""Moving what stays: every entry in its place, with its true position, and no more rows than said.

Leaves out which entries those are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popjax.cache import LayerCache, bytes_held
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction import LaProx, SnapKV, StreamingLLM, pool
from popjax.eviction.evict import Eviction, Programs, check_model, evict
from popjax.eviction.method import KvMethod, counts
from tests.eviction.prompts import LAYER, D, H, K, acts, prompt

LENGTHS = (21, 13, 3)
SLOTS = 24
PROGRAMS = Programs()


def filled(keep: np.ndarray, align: int, positions: np.ndarray, seed: int = 0) -> Any:
    """A pool after every layer has moved, and the keys and values [L, B, K, S, H] it came from."""
    L, B, heads, S = keep.shape
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, L, B, heads, S, H)).astype(np.float32)
    starts, lengths = pool.places(tuple(jnp.asarray(x) for x in keep), align)
    rows = pool.capacity(int(keep.sum()) + (align - 1) * starts.size)
    held = pool.empty(H, (L, B, heads), rows, jnp.dtype(jnp.float32))
    entries, places = held.entries, held.positions
    fill = jax.jit(lambda *arrays: pool.fill(*arrays))  # traced anew: the chunk may be another
    for i in range(L):
        arrays = (jnp.asarray(x) for x in (k[i], v[i], positions, keep[i], starts[i], lengths[i]))
        entries, places = fill(entries, places, *arrays)
    return (np.asarray(x) for x in (entries, places, starts, lengths, k, v))


@pytest.mark.parametrize(
    ("share", "align", "chunk"),
    [(0.0, 1, 8), (0.4, 1, 8), (0.4, 16, 8), (1.0, 16, 8), (1, 1, 1024)],
)
def test_every_entry_lies_in_its_place(
    share: float, align: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_CHUNK", chunk)
    L, B, S = 2, 2, 19
    rng = np.random.default_rng(1)
    keep = rng.random((L, B, K, S)) < share
    keep[:, 0, 1] = False  # a head with nothing
    by_head = share == 0.4  # positions that differ between heads
    shape = (B, K, S) if by_head else (B, S)
    positions = rng.permutation(int(np.prod(shape))).reshape(shape).astype(np.int32)
    entries, places, starts, lengths, k, v = filled(keep, align, positions)
    assert (starts % align == 0).all() and (lengths == keep.sum(-1)).all()
    used = np.zeros(len(places), bool)
    for i, b, g in np.ndindex(L, B, K):
        rows = slice(starts[i, b, g], starts[i, b, g] + lengths[i, b, g])
        assert not used[rows].any()
        used[rows] = True
        slots = np.flatnonzero(keep[i, b, g])
        wanted = np.concatenate([k[i, b, g, slots], v[i, b, g, slots]], axis=-1)
        np.testing.assert_array_equal(entries[rows], wanted)
        of_head = positions[b, g] if by_head else positions[b]
        np.testing.assert_array_equal(places[rows], of_head[slots])
    assert (places[~used] == -1).all() and not entries[~used].any()


@given(entries=st.integers(0, 2**28))
def test_a_pool_wastes_at_most_a_sixteenth(entries: int) -> None:
    rows = pool.capacity(entries)
    assert entries <= rows <= max(16, entries + entries // 16)


def test_pools_of_near_sizes_share_their_shape() -> None:
    """As many shapes between n and 2 n as a sixteenth allows, whatever n is."""
    assert len({pool.capacity(n) for n in range(4096, 8192)}) <= 32


def moved(method: KvMethod, config: ModelConfig, lengths: tuple[int, ...] = LENGTHS) -> Any:
    """What an eviction leaves of random caches of a model with these layers."""
    rows = [prompt(n, seed=4, layers=config.num_layers) for n in lengths]
    layers = [acts(rows, i, SLOTS) for i in range(config.num_layers)]
    params = {f"layer_{i}": {"attn": o} for i, (o, _) in enumerate(layers)}
    pairs = zip(layers, config.layers, strict=True)
    seen = [method.observe(o, layer, shown) for (o, shown), layer in pairs]
    caches = [LayerCache(shown.k, shown.v) for _, shown in layers]
    asked = Eviction(method, config, lengths)
    kept = evict(PROGRAMS, params, asked, caches, layers[0][1].key_positions, seen)
    assert not caches, "layers must leave one by one"
    return kept, rows


def model(*layers: LayerConfig) -> ModelConfig:
    return ModelConfig("llama", 8, D, layers, max_positions=64)


@pytest.mark.parametrize("tokens", [4, 9])
def test_bytes_are_those_of_the_entries_that_stay(tokens: int) -> None:
    config, method = model(LAYER, LAYER), LaProx(tokens=tokens, window=4)
    kept, rows = moved(method, config)
    entries = sum(min(tokens, n) * K * 2 for n in LENGTHS)
    assert int(kept.lengths.sum()) == sum(counts(method, config, LENGTHS)[1]) == entries
    entry = 2 * H * 4 + 4
    places = 2 * 4 * kept.starts.size
    assert entry * entries <= bytes_held(kept) - places <= entry * max(16, entries * 17 / 16)
    for i, b, g in np.ndindex(2, len(rows), K):
        first, length = int(kept.starts[i, b, g]), int(kept.lengths[i, b, g])
        at = np.asarray(kept.positions[first : first + length])
        assert (np.diff(at) > 0).all(), "in the order of the prompt"
        heads = rows[b][i]
        wanted = np.concatenate([heads.k[g, at], heads.v[g, at]], axis=-1)
        np.testing.assert_array_equal(kept.entries[first : first + length], wanted)


@pytest.mark.parametrize("method", [LaProx(tokens=9, window=4), StreamingLLM(tokens=9)])
def test_layers_with_a_short_window_keep_it(method: KvMethod) -> None:
    """What later tokens can see: one less than the window, since they see themselves."""
    local = dataclasses.replace(LAYER, window=6)
    kept, _ = moved(method, model(LAYER, local))
    np.testing.assert_array_equal(kept.lengths[1], [[5, 5], [5, 5], [3, 3]])
    assert kept.lengths[0].sum(axis=-1).tolist() == [18, 18, 6]
    first, last = int(kept.starts[1, 0, 0]), int(kept.starts[1, 0, 1])
    assert np.asarray(kept.positions[first:last]).tolist() == [16, 17, 18, 19, 20]


def test_a_model_of_short_windows_has_no_budget_to_share() -> None:
    local = dataclasses.replace(LAYER, window=6)
    kept, _ = moved(SnapKV(tokens=9, window=4), model(local, local))
    assert kept.lengths.sum(axis=(0, 2)).tolist() == [20, 20, 12]


def test_scores_that_are_not_finite_are_refused() -> None:
    config, method = model(LAYER, LAYER), LaProx(tokens=9, window=4)
    rows = [prompt(n, seed=4) for n in LENGTHS]
    layers = [acts(rows, i, SLOTS) for i in range(2)]
    params = {f"layer_{i}": {"attn": o} for i, (o, _) in enumerate(layers)}
    seen = [method.observe(o, LAYER, shown) for o, shown in layers]
    caches = [LayerCache(shown.k, shown.v) for _, shown in layers]
    caches[1] = dataclasses.replace(caches[1], v=caches[1].v.at[0, 0, 12].set(jnp.nan))
    places = layers[0][1].key_positions
    with pytest.raises(ValueError, match=r"cache scores of layers \[1\] are not finite"):
        evict(PROGRAMS, params, Eviction(method, config, LENGTHS), caches, places, seen)


def test_layers_of_unlike_heads_share_no_pool() -> None:
    other = dataclasses.replace(LAYER, num_kv_heads=4)
    with pytest.raises(ValueError, match="one pair for all"):
        check_model(model(LAYER, other))
