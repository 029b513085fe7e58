"""Where a budget falls: exact counts, floors, ties to the lower index, for any scores and slots."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from popjax.eviction.allocation import (
    Candidates,
    layer_shares,
    over_layers,
    per_head,
    per_layer,
    with_counts,
)
from popjax.eviction.prefixkv import prefix_counts
from popjax.eviction.pyramidkv import linear_counts
from tests.eviction.oracles import EPS, top

L, B, K, S = 3, 2, 2, 11
Problem = tuple[np.ndarray, Candidates]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Scores [L, B, K, S] of few distinct values, most of them tied, and what may stay."""
    values = st.sampled_from([0.0, 0.25, 1.0, 2.5])
    scores = draw(arrays.arrays(np.float32, (L, B, K, S), elements=values))
    slots = draw(arrays.arrays(bool, (B, S)))
    count = [draw(st.integers(0, int(row.sum()))) for row in slots]
    return scores, Candidates(jnp.asarray(slots), jnp.asarray(count, jnp.int32))


@functools.cache
def compiled(function: Any, *options: Any) -> Any:
    return jax.jit(lambda scores, candidates, *rest: function(scores, candidates, *rest, *options))


def allocated(function: Any, problem: Problem, *options: Any) -> np.ndarray:
    """What stays [L, B, K, S]; only candidates do."""
    scores, candidates = problem
    chosen = compiled(function, *options)(tuple(jnp.asarray(x) for x in scores), candidates)
    found = np.stack(chosen)
    assert not (found & ~np.asarray(candidates.slots)[None, :, None]).any()
    return found


def best(scores: np.ndarray, slots: np.ndarray, count: int) -> np.ndarray:
    """The best `count` of scores [..., S] among the slots [S]."""
    return top(np.where(slots, scores, -1.0), count)


@settings(max_examples=30)
@given(problem=problems())
def test_every_head_keeps_as_many(problem: Problem) -> None:
    found = allocated(per_head, problem)
    (scores, candidates), places = problem, np.ndindex(L, B, K)
    for i, b, g in places:
        wanted = best(scores[i, b, g], np.asarray(candidates.slots[b]), int(candidates.count[b]))
        np.testing.assert_array_equal(found[i, b, g], wanted)


@settings(max_examples=30)
@given(problem=problems())
def test_all_layers_compete(problem: Problem) -> None:
    found, (scores, candidates) = allocated(over_layers, problem), problem
    for b in range(B):
        count = int(candidates.count[b]) * L * K
        wanted = best(scores[:, b], np.asarray(candidates.slots[b]), count)
        np.testing.assert_array_equal(found[:, b], wanted)


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
@settings(max_examples=30)
@given(problem=problems())
def test_heads_of_a_layer_compete_above_a_floor(floor: float, problem: Problem) -> None:
    found, (scores, candidates) = allocated(per_layer, problem, floor), problem
    for i, b in np.ndindex(L, B):
        slots, count = np.asarray(candidates.slots[b]), int(candidates.count[b])
        sure = np.stack([best(head, slots, int(count * floor)) for head in scores[i, b]])
        assert (found[i, b] | ~sure).all()
        assert found[i, b].sum() == count * K
        wanted = best(np.where(sure, np.inf, scores[i, b]), slots, count * K)
        np.testing.assert_array_equal(found[i, b], wanted)


@settings(max_examples=30)
@given(problem=problems(), data=st.data())
def test_layers_keep_their_own_counts(problem: Problem, data: st.DataObject) -> None:
    scores, candidates = problem
    most = np.asarray(candidates.slots).sum(1)
    counts = [[data.draw(st.integers(0, int(n))) for n in most] for _ in range(L)]
    given_counts = [jnp.asarray(layer, jnp.int32) for layer in counts]
    found = np.stack(compiled(with_counts)(tuple(scores), candidates, given_counts))
    for i, b, g in np.ndindex(L, B, K):
        wanted = best(scores[i, b, g], np.asarray(candidates.slots[b]), counts[i][b])
        np.testing.assert_array_equal(found[i, b, g], wanted)


@settings(max_examples=30)
@given(problem=problems())
def test_shares_of_a_layer_add_up_to_one(problem: Problem) -> None:
    scores, candidates = problem
    found = compiled(layer_shares)(jnp.asarray(scores[0]), candidates)
    shares, slots = np.asarray(found, np.float64), np.asarray(candidates.slots)[:, None]
    total = np.where(slots, scores[0], 0).sum((1, 2))
    np.testing.assert_allclose(shares.sum((1, 2)), total > 0, atol=K * S * EPS)
    assert not np.where(slots, 0, shares).any()


@functools.cache
def linear(layers: int, beta: int) -> Any:
    return jax.jit(lambda mean, available: linear_counts(mean, available, layers, beta))


@pytest.mark.parametrize("layers", [1, 2, 5, 80])
@settings(max_examples=30)
@given(data=st.data())
def test_linear_budgets_add_up(layers: int, data: st.DataObject) -> None:
    available = data.draw(st.integers(0, 2**17))
    mean, beta = data.draw(st.integers(0, available)), data.draw(st.sampled_from([1, 2, 20]))
    of_row = (jnp.asarray([x], jnp.int32) for x in (mean, available))
    counts = np.asarray(linear(layers, beta)(*of_row))[:, 0].tolist()
    assert sum(counts) == mean * layers and len(counts) == layers
    assert counts == sorted(counts, reverse=True)
    assert 0 <= counts[-1] and counts[0] <= available
    if layers > 1 and (2 - 1 / beta) * mean < available:
        # float32 holds such a product to half a unit and its rounding.
        assert abs(counts[-1] - mean / beta) <= 0.5 + 2 * mean * EPS


def brute_prefix(scores: np.ndarray, count: int) -> list[int]:
    """Counts of layers [L, c] of positive whole scores: entries with least ranked before them."""
    entries = []
    for i, layer in enumerate(scores):
        ranked = sorted(layer.tolist(), reverse=True)
        total = sum(ranked)
        entries += [(sum(ranked[:r]) / total, i, r) for r in range(len(ranked))]
    stays = [i for _, i, _ in sorted(entries)[: count * len(scores)]]
    return [stays.count(i) for i in range(len(scores))]


@settings(max_examples=30)
@given(data=st.data())
def test_prefixes_hold_one_share(data: st.DataObject) -> None:
    """Layer sums are powers of two, so that shares and their ties are exact."""
    shapes = (
        [64, 32, 16, 8, 4, 2, 1, 1],
        [16] * 8,
        [100, 4, 4, 4, 4, 4, 4, 4],
        [30, 30, 30, 30, 2, 2, 2, 2],
    )
    picked = [data.draw(st.permutations(data.draw(st.sampled_from(shapes)))) for _ in range(L)]
    scores, count = np.asarray(picked, np.float32), data.draw(st.integers(0, 8))
    slots = jnp.asarray([[True] * 8 + [False]])
    padded = [jnp.asarray(np.append(layer, 99.0)[None], jnp.float32) for layer in scores]
    candidates = Candidates(slots, jnp.asarray([count], jnp.int32))
    found = compiled(prefix_counts)(padded, candidates)
    assert [int(x[0]) for x in found] == brute_prefix(scores, count)
