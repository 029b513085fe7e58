"""The methods people compare with: each against its oracle, and what all of them promise.

Promises: exactly the budget, whatever it is; pads and other rows of the batch change nothing.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popjax.eviction import (
    H2O,
    KV_METHODS,
    AdaKV,
    CriticalKV,
    KvMethod,
    LaProx,
    PrefixKV,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    Tova,
    h2o,
    kv_method_name,
    kv_method_named,
)
from popjax.eviction.criticalkv import projected_lengths
from tests.eviction import oracles, prompts
from tests.eviction.prompts import LAYER, acts, kept, prompt

SLOTS = 24
LENGTHS = (21, 13, 3)
# Three layers: with an odd number PyramidKV has one in the middle.
ROWS = [prompt(n, seed=13, layers=3) for n in LENGTHS]

METHODS: dict[str, tuple[KvMethod, Any]] = {
    "snapkv": (SnapKV(window=4, pooling=5), lambda row, n: oracles.snapkv(row, n, 4, 5)),
    "adakv": (AdaKV(window=4, pooling=3), lambda row, n: oracles.adakv(row, n, 4, 3)),
    "criticalkv": (
        CriticalKV(window=4, pooling=3),
        lambda row, n: oracles.criticalkv(row, n, 4, 3, "head"),
    ),
    "criticalkv-layer": (
        CriticalKV(window=4, pooling=3, scope="layer"),
        lambda row, n: oracles.criticalkv(row, n, 4, 3, "layer"),
    ),
    "pyramidkv": (PyramidKV(window=4), lambda row, n: oracles.pyramidkv(row, n, 4, 7, 20)),
    "tova": (Tova(), oracles.tova),
    "h2o": (H2O(window=4), lambda row, n: oracles.h2o(row, n, 4)),
    "prefixkv": (PrefixKV(), oracles.prefixkv),
    "streaming-llm": (StreamingLLM(), oracles.streaming),
    "laprox": (LaProx(window=4), None),
}


@pytest.mark.parametrize("name", [name for name, (_, oracle) in METHODS.items() if oracle])
def test_what_stays_is_what_the_definition_says(name: str) -> None:
    method, oracle = METHODS[name]
    for budgets in ((6, 11, 3), (9, 8, 3), (14, 7, 3), (21, 13, 3)):
        found = kept(method, ROWS, budgets, SLOTS)
        for row, budget, keep in zip(ROWS[:2], budgets, found, strict=False):
            np.testing.assert_array_equal(keep, oracle(row, budget))
        assert found[2].all(), "a prompt within the window stays whole"


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=20)
@given(data=st.data())
def test_the_budget_is_met_exactly(name: str, data: st.DataObject) -> None:
    method, _ = METHODS[name]
    least = [min(method.least, n) for n in LENGTHS]
    pairs = zip(least, LENGTHS, strict=True)
    budgets = [data.draw(st.integers(low, n)) for low, n in pairs]
    for keep, budget in zip(kept(method, ROWS, budgets, SLOTS), budgets, strict=True):
        assert keep.sum() == budget * keep.shape[0] * keep.shape[1]


@pytest.mark.parametrize("name", METHODS)
def test_other_rows_of_the_batch_change_nothing(name: str) -> None:
    """That pads change nothing is seen against the oracles, which have none."""
    method, _ = METHODS[name]
    together = kept(method, ROWS, (9, 7, 3), SLOTS)
    other = [ROWS[1], prompt(SLOTS, seed=9, layers=3), ROWS[0]]
    found = kept(method, other, (7, 20, 9), SLOTS)
    np.testing.assert_array_equal(found[0], together[1])
    np.testing.assert_array_equal(found[2], together[0])


def test_what_heads_and_layers_share() -> None:
    """Which counts and choices are alike is what sets these methods apart."""
    found = {name: kept(method, ROWS, (9, 9, 3), SLOTS)[0] for name, (method, _) in METHODS.items()}
    counts = {name: keep.sum(axis=2) for name, keep in found.items()}
    for name in ("snapkv", "criticalkv", "h2o", "tova", "streaming-llm"):
        assert (counts[name] == 9).all(), name
    for name in ("tova", "prefixkv", "streaming-llm"):
        assert (found[name] == found[name][:, :1]).all(), name
    for name in ("adakv", "criticalkv-layer"):
        assert (counts[name].sum(1) == 18).all() and len(set(counts[name].flat)) > 1, name
    np.testing.assert_array_equal(counts["criticalkv-layer"], counts["adakv"])
    assert (np.diff(counts["pyramidkv"][:, 0]) < 0).all()
    assert (counts["pyramidkv"] == counts["pyramidkv"][:, :1]).all()
    assert len(set(counts["laprox"].sum(1))) > 1 and len(set(counts["prefixkv"][:, 0])) > 1


@pytest.mark.parametrize("kind", [H2O, PrefixKV])
def test_attention_adds_up_over_chunks_and_blocks(
    kind: type[H2O] | type[PrefixKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk at a time, each in blocks of queries that do not divide it, or all at once."""
    method = kind()
    (params, whole) = acts(ROWS, 0, SLOTS)
    at_once = method.observe(params, LAYER, whole)
    monkeypatch.setattr(h2o, "_QUERIES", 5)
    total = None
    for first in (0, 12):
        seen = jnp.where(whole.key_positions[0] < 0, False, jnp.arange(SLOTS) < first + 12)
        chunk = dataclasses.replace(
            whole,
            q=whole.q[:, first : first + 12],
            query_positions=whole.query_positions[:, first : first + 12],
            key_positions=jnp.where(seen[None], whole.key_positions, -1),
            slot=jnp.int32(first),
        )
        now = method.observe(params, LAYER, chunk)
        total = now if total is None else method.combine(total, now)
    tolerance = oracles.rounding(ROWS[0])
    np.testing.assert_allclose(total, at_once, rtol=tolerance, atol=tolerance)
    for row, found in zip(ROWS, np.asarray(total), strict=True):
        n = row[0].q.shape[0]
        np.testing.assert_allclose(found[:, SLOTS - n :], oracles.summed(row[0]), rtol=tolerance)
        assert not found[:, : SLOTS - n].any()


def test_the_values_of_critical_are_projected_a_block_at_a_time() -> None:
    """Longer than a block, and not a multiple of one."""
    (heads,) = prompt(300, seed=2, layers=1)
    found = jax.jit(projected_lengths)(jnp.asarray(heads.v)[None], jnp.asarray(heads.o))[0]
    for g in range(prompts.K):
        norms = [abs(oracles.projected(heads, h)).sum(1) for h in oracles.group(heads, g)]
        np.testing.assert_allclose(found[g], np.mean(norms, 0), rtol=oracles.rounding((heads,)))


@pytest.mark.parametrize("length", [24, 300])
def test_values_of_halves_are_projected_as_floats_would_be(length: int) -> None:
    (heads,) = prompt(length, seed=2, layers=1)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (heads.v[None], heads.o)]
    wanted = projected_lengths(*(x.astype(jnp.float32) for x in halves))
    found = jax.jit(projected_lengths)(*halves)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=oracles.rounding((heads,)))


def compiled_bytes(run: Any, *shapes: tuple[int, ...]) -> int:
    """Temporaries of a program over float32 arrays."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(run).lower(*arrays).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_neither_attention_nor_projected_values_are_held() -> None:
    S, N, K, H, D = 4096, 8, 2, 16, 512
    layer = dataclasses.replace(LAYER, num_heads=N, num_kv_heads=K, head_dim=H)

    def observe(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        places = jnp.arange(S, dtype=jnp.int32)[None]
        seen = dataclasses.replace(
            acts(ROWS[2:], 0, 3)[1], q=q, k=k, v=v, query_positions=places, key_positions=places
        )
        return h2o.accumulated_attention(layer, seen)

    heads = (1, K, S, H)
    assert compiled_bytes(observe, (1, S, N, H), heads, heads) < 4 * N * S * S / 16
    assert compiled_bytes(projected_lengths, heads, (N, H, D)) < 4 * K * S * D / 4


@pytest.mark.parametrize("name", KV_METHODS)
def test_names_lead_to_methods_and_back(name: str) -> None:
    method = kv_method_named(name, keep=0.25, tokens=None)
    assert type(method) is KV_METHODS[name] and method.keep == 0.25
    assert kv_method_name(method) == name
    assert hash(method) == hash(kv_method_named(name, keep=0.25))


@pytest.mark.parametrize("kind", [KvMethod, *KV_METHODS.values()])
@pytest.mark.parametrize("window", [-1, 2.0, "4", True, None])
def test_every_method_checks_its_window(kind: Any, window: Any) -> None:
    for budget in ({}, {"tokens": 64}, {"keep": 0.5}):
        with pytest.raises(ValueError, match=f"window {window!r} is not a whole number"):
            kind(window=window, **budget)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: kv_method_named("snapvk"), "kv method 'snapvk' is unknown: .*nearest is 'snapkv'"),
        (lambda: kv_method_named("tova", pooling=3), "'tova' has no option 'pooling'"),
        (lambda: SnapKV(window=0), "window 0 is not a whole number of at least 1"),
        (lambda: SnapKV(pooling=4), "pooling 4 is even"),
        (lambda: SnapKV(pooling=-1), "pooling -1 is not a whole number"),
        (lambda: SnapKV(tokens=31), "tokens 31 is below the 32"),
        (lambda: SnapKV(keep=0.5, tokens=64), "one of keep and tokens"),
        (lambda: Tova(keep=0.0), "keep 0.0 is outside"),
        (lambda: Tova(keep=math.nan), "keep nan is outside"),
        (lambda: Tova(window=0), "window 0 is not"),
        (lambda: LaProx(window=2.0), "window 2.0 is not"),  # type: ignore[arg-type]
        (lambda: LaProx(scope="row"), "scope 'row' is unknown"),
        (lambda: H2O(recent=1.5), "recent 1.5 is outside 0..1"),
        (lambda: H2O(window=-1), "window -1 is not"),
        (lambda: AdaKV(floor=math.nan), "floor nan is outside 0..1"),
        (lambda: CriticalKV(first=-0.5), "first -0.5 is outside 0..1"),
        (lambda: CriticalKV(epsilon="x"), "epsilon 'x' is outside"),  # type: ignore[arg-type]
        (lambda: CriticalKV(scope="global"), "scope 'global' is unknown"),
        (lambda: PyramidKV(beta=0), "beta 0 is not"),
        (lambda: PrefixKV(sinks=-1), "sinks -1 is not"),
        (lambda: PrefixKV(tokens=4), "tokens 4 is below the 5"),
        (lambda: StreamingLLM(window=-4), "window -4 is not"),
        (lambda: StreamingLLM(tokens=3), "tokens 3 is below the 4"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()
