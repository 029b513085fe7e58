"""Ratios become exact counts and scores become exact sets."""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.masked_mlp import Selection, choose, select_top
from popjax.families import model_config
from popjax.given_partition import checked_partitions
from popjax.methods import OnlinePruning
from popjax.sparsity import (
    ChannelBudget,
    ChannelPartition,
    channel_budget,
    ffn_ratio,
    partition_by_rank,
    rounded,
)
from tests.popjax.published_models import FFN_RATIOS, LLAMA_2_7B
from tests.popjax.tiny_models import CONFIGS

CONFIG = CONFIGS["llama"]


def partition(retained: Any, candidate: Any, k_selected: int = 0) -> ChannelPartition:
    return ChannelPartition(
        jnp.asarray(retained, jnp.int32), jnp.asarray(candidate, jnp.int32), k_selected=k_selected
    )


@pytest.mark.parametrize(
    ("ratio", "budget"),
    [(0.5, ChannelBudget(691, 154, 77)), (0.25, ChannelBudget(1075, 154, 77))],
)
def test_the_worked_examples(ratio: float, budget: ChannelBudget) -> None:
    assert channel_budget(1536, ratio, 0.05) == budget


@pytest.mark.parametrize(
    ("value", "whole"),
    # 0.15 * 20 and 0.29 * 50 fall below their exact product, 3 and 14.5, in binary.
    [(0.15 * 20, 3), (0.29 * 50, 15), (2.5, 3), (3.5, 4), (2.4999, 2), (0.0, 0)],
)
def test_halves_round_up_and_floats_do_not_fool(value: float, whole: int) -> None:
    assert rounded(value) == whole


@given(
    size=st.integers(1, 40_000),
    ratio=st.floats(0, 1),
    delta=st.floats(0, 1),
    granularity=st.sampled_from([1, 1, 8, 128]),
)
def test_budgets_add_up(size: int, ratio: float, delta: float, granularity: int) -> None:
    budget = channel_budget(size, ratio, delta, granularity)
    assert 0 <= budget.k_selected <= budget.candidate
    assert 0 <= budget.retained <= budget.retained + budget.candidate <= size
    assert budget.retained <= budget.active <= budget.retained + budget.candidate
    for count in (budget.retained, budget.retained + budget.candidate, budget.active):
        assert count in (0, size) or count % granularity == 0
    if granularity == 1:
        assert budget.active == size - rounded(ratio * size)


@given(size=st.integers(1, 4000), percent=st.integers(0, 100), band=st.integers(0, 100))
def test_budgets_of_decimal_ratios_are_those_of_exact_arithmetic(
    size: int, percent: int, band: int
) -> None:
    def exact(share: Fraction) -> int:
        return math.floor(share * size + Fraction(1, 2))

    ratio, delta = Fraction(percent, 100), Fraction(band, 100)
    retained = size - exact(min(ratio + delta, Fraction(1)))
    pruned = exact(max(ratio - delta, Fraction(0)))
    budget = channel_budget(size, percent / 100, band / 100)
    assert budget.retained == retained
    assert budget.candidate == size - retained - pruned
    assert budget.active == size - exact(ratio)


@pytest.mark.parametrize("size", [1, 2, 48, 1536])
def test_extreme_ratios(size: int) -> None:
    assert channel_budget(size, 0.0).active == size
    assert channel_budget(size, 1.0) == ChannelBudget(0, 0, 0)
    assert channel_budget(size, 0.5, 0.5).candidate == size


@pytest.mark.parametrize("name", FFN_RATIOS)
def test_ffn_ratios_of_the_paper(name: str) -> None:
    raw, at_20, at_40 = FFN_RATIOS[name]
    config = model_config(raw)
    assert round(100 * ffn_ratio(config, 0.2), 1) == at_20
    assert round(100 * ffn_ratio(config, 0.4), 1) == at_40


def test_a_model_ratio_that_the_ffn_cannot_give() -> None:
    with pytest.raises(ValueError, match="model_ratio 0.9 needs an FFN ratio of 1.347"):
        ffn_ratio(model_config(LLAMA_2_7B), 0.9)


# Few distinct values, so that most draws have ties at the cut.
SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1e-30, 3e38, 2.0]), min_size=1, max_size=24)


@settings(max_examples=30)  # XLA compiles anew for each number of scores
@given(scores=SCORES, data=st.data())
def test_partition_is_by_stable_rank(scores: list[float], data: st.DataObject) -> None:
    size = len(scores)
    retained = data.draw(st.integers(0, size))
    candidate = data.draw(st.integers(0, size - retained))
    part = partition_by_rank(jnp.array(scores, jnp.float32), ChannelBudget(retained, candidate, 0))
    order = np.argsort(-np.array(scores, np.float32), kind="stable")
    assert part.retained.tolist() == sorted(order[:retained])
    assert part.candidate.tolist() == sorted(order[retained : retained + candidate])


top = functools.cache(lambda count: jax.jit(functools.partial(select_top, count=count)))
WIDTH = 21


@given(
    rows=st.lists(
        st.lists(
            st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 2.0**127, width=32)),
            min_size=WIDTH,
            max_size=WIDTH,
        ),
        min_size=4,
        max_size=4,
    ),
    count=st.integers(-1, WIDTH + 1),
)
def test_select_top_is_a_stable_sort(rows: list[list[float]], count: int) -> None:
    scores = np.array(rows, np.float32)
    chosen = np.asarray(top(count)(jnp.asarray(scores)))
    kept = min(max(count, 0), WIDTH)
    wanted = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :kept]
    np.put_along_axis(wanted, order, True, axis=-1)
    assert (chosen == wanted).all()


def test_select_top_ranks_infinity_first_and_shapes_stay() -> None:
    scores = jnp.array([[[1.0, jnp.inf, 0.0, 5.0]], [[7.0, 7.0, 7.0, 7.0]]])
    wanted = [[[False, True, False, True]], [[True, True, False, False]]]
    assert select_top(scores, 2).tolist() == wanted


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([partition(range(48), [])], "partition has 1 layers, the model has 2"),
        ([partition([1, 1], []), partition([0], [])], "layer 0 names a channel twice"),
        ([partition([1], [1]), partition([0], [])], "layer 0 names a channel twice"),
        ([partition([0], []), partition([40], [])], "layer 1 names channel 40, outside 0..39"),
        ([partition([-1], [3]), partition([0], [])], "layer 0 names channel -1, outside 0..47"),
        ([partition([], []), partition([0], [])], "layer 0 keeps no channel"),
        ([partition([0], [1], 2), partition([0], [])], "k_selected 2 of layer 0 is outside 0..1"),
        ([partition([0], [1], -1), partition([0], [])], "k_selected -1 of layer 0"),
        ([ChannelPartition(np.array([0.5]), np.array([1.0]))] * 2, "holds float64 indices"),
        ([ChannelPartition(np.array([[0]]), np.array([[1]]))] * 2, "layer 0 .* one axis"),
    ],
)
def test_impossible_partitions_are_refused(parts: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        checked_partitions(parts, CONFIG)


def test_a_partition_speaks_of_its_own_sets() -> None:
    part = partition([0, 3], [1, 4], 1)
    assert (part.num_retained, part.num_candidate, part.evaluated, part.active) == (2, 2, 4, 3)
    assert part.kept_mask(6).tolist() == [True, True, False, True, True, False]


def test_a_selection_knows_where_the_candidates_are() -> None:
    h = jnp.arange(5.0)[None, None, :]
    whole = partition([0, 2, 4], [1, 3], 1)  # unpacked: every channel is evaluated
    assert choose(h, chosen(whole)).tolist() == [[[True, False, True, True, True]]]
    packed = dataclasses.replace(whole, packed=True)
    assert choose(h, chosen(packed)).tolist() == [[[True, True, True, False, True]]]
    assert partition([0], [1, 2], 2).selection() is None
    with pytest.raises(ValueError, match="pack\\(\\) the partition first"):
        whole.selection()


def chosen(part: ChannelPartition) -> Selection:
    selection = part.selection(weighted=False)
    assert selection is not None
    return selection


@pytest.mark.parametrize(
    ("method", "warning"),
    [
        # 48 channels: half of them is 24, which 32 rounds up to 32 with no room for a band.
        (
            OnlinePruning(ratio=0.5, granularity=32),
            "granularity 32 is coarse for the 48 FFN channels of layer 0: asked for ratio 0.5 with "
            "4 candidates, got 0.333 with 0; lower the granularity",
        ),
        (OnlinePruning(ratio=0.5, gamma=0.5, granularity=2), None),
        (OnlinePruning(ratio=0.5), None),
    ],
)
def test_a_granularity_that_changes_the_budget_is_said(
    method: OnlinePruning, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    method.for_model(CONFIG)
    said = [record.getMessage() for record in caplog.records if record.name == "popjax.sparsity"]
    assert said == ([] if warning is None else [warning])
