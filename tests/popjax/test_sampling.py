"""The sampler: each filter keeps what its definition says, and draws follow their probabilities."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popjax.sampling import (
    SamplingConfig,
    choose,
    min_p_filter,
    penalised,
    processed,
    ranked_filter,
    row_keys,
    without_eos,
)

V = 12
EPS = float(np.finfo(np.float32).eps)
# Coarse values, so that ties are common, with room for very unlikely tokens.
ROW = st.lists(st.integers(-60, 60).map(lambda n: n / 4), min_size=V, max_size=V)
ROWS = st.lists(ROW, min_size=2, max_size=2).map(lambda rows: np.array(rows, np.float32))
ranked = jax.jit(ranked_filter)
thinned = jax.jit(min_p_filter)


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@given(logits=ROWS, k=st.integers(1, V))
def test_top_k_keeps_the_k_largest_and_their_ties(logits: np.ndarray, k: int) -> None:
    out = np.asarray(ranked(jnp.asarray(logits), jnp.int32(k), jnp.float32(1.0)))
    least = np.sort(logits, axis=-1)[:, [V - k]]
    kept = np.isfinite(out)
    assert (kept == (logits >= least)).all()
    assert (out[kept] == logits[kept]).all()


@given(logits=ROWS, p=st.floats(0, 1, width=32))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    out = np.asarray(ranked(jnp.asarray(logits), jnp.int32(V), jnp.float32(p)))
    kept = np.isfinite(out)
    slack = V * EPS
    for row, share, keeps in zip(logits, probabilities(logits), kept, strict=True):
        assert keeps[row.argmax()]
        assert row[keeps].min() > row[~keeps].max(initial=-np.inf)
        assert share[keeps].sum() >= p - slack
        # Without its least likely value (and whatever ties with it) the set falls short of p.
        above = row > row[keeps].min()
        assert not above.any() or share[above].sum() < p + slack


@given(logits=ROWS, k=st.integers(1, V), p=st.floats(2**-7, 1, width=32))
def test_top_p_works_on_what_top_k_left(logits: np.ndarray, k: int, p: float) -> None:
    both = ranked(jnp.asarray(logits), jnp.int32(k), jnp.float32(p))
    first = ranked(jnp.asarray(logits), jnp.int32(k), jnp.float32(1.0))
    after = ranked(first, jnp.int32(V), jnp.float32(p))
    assert np.asarray(both).tolist() == np.asarray(after).tolist()


def test_a_top_p_of_one_keeps_tokens_too_unlikely_for_a_float32_sum() -> None:
    logits = jnp.array([[40.0, 0.0, -40.0, -80.0]])
    out = ranked_filter(logits, jnp.int32(4), jnp.float32(1.0))
    assert np.isfinite(np.asarray(out)).all()


@given(logits=ROWS, p=st.floats(2**-10, 1, width=32))
def test_min_p_is_a_share_of_the_largest(logits: np.ndarray, p: float) -> None:
    kept = np.isfinite(np.asarray(thinned(jnp.asarray(logits), jnp.float32(p))))
    distance = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float64)
    # The floor is one rounding of a number of up to 30 away from log(p).
    slack = 32 * EPS
    assert kept[distance >= math.log(p) + slack].all()
    assert not kept[distance < math.log(p) - slack].any()
    assert kept.any(axis=-1).all()


@given(logits=ROWS, penalty=st.floats(0.5, 2, width=32), data=st.data())
def test_penalty_touches_only_what_was_seen(
    logits: np.ndarray, penalty: float, data: st.DataObject
) -> None:
    bits = st.lists(st.booleans(), min_size=V, max_size=V)
    seen = np.array([data.draw(bits), data.draw(bits)])
    out = np.asarray(penalised(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(penalty)))
    assert (out[~seen] == logits[~seen]).all()
    wanted = np.where(logits > 0, logits / penalty, logits * penalty)
    np.testing.assert_allclose(out[seen], wanted[seen], rtol=EPS)
    if penalty > 1:
        assert (out[seen] <= logits[seen]).all()


@pytest.mark.parametrize(("step", "blocked"), [(0, True), (2, True), (3, False)])
def test_end_tokens_wait_for_the_minimum_length(step: int, blocked: bool) -> None:
    values = SamplingConfig(min_new_tokens=3).values((1, 4, 99), V)
    out = without_eos(jnp.zeros((1, V)), values, jnp.int32(step))
    ends = np.flatnonzero(np.isneginf(np.asarray(out[0]))).tolist()
    assert ends == ([1, 4] if blocked else [])


def drawn(config: SamplingConfig, logits: np.ndarray, rows: int = 1, step: int = 0) -> np.ndarray:
    """One token for each of `rows` rows of the same logits [V]."""
    flags, values = config.flags(), config.values((), logits.size)
    batch = jnp.tile(jnp.asarray(logits)[None, :], (rows, 1))
    seen = jnp.zeros(batch.shape, bool)
    out = processed(batch, seen, values, flags, jnp.int32(step))
    return np.asarray(choose(out, row_keys(7, rows), flags, jnp.int32(step)))


LOGITS = np.random.default_rng(0).standard_normal(V).astype(np.float32)


def test_greedy_takes_the_first_of_the_largest() -> None:
    tied = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    assert drawn(SamplingConfig(), tied).tolist() == [1]


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(do_sample=True, temperature=1e-4),
        SamplingConfig(do_sample=True, top_k=1),
        SamplingConfig(do_sample=True, top_p=0.0),
        SamplingConfig(do_sample=True, min_p=1.0),
    ],
    ids=["temperature", "top_k", "top_p", "min_p"],
)
def test_every_filter_at_its_end_is_greedy(config: SamplingConfig) -> None:
    assert (drawn(config, LOGITS, rows=64) == LOGITS.argmax()).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_their_probabilities(temperature: float) -> None:
    rows = 20_000
    tokens = drawn(SamplingConfig(do_sample=True, temperature=temperature), LOGITS, rows)
    wanted = probabilities(LOGITS[None, :] / np.float32(temperature))[0]
    deviation = np.sqrt(wanted * (1 - wanted) / rows)
    share = np.bincount(tokens, minlength=V) / rows
    # Twelve shares, seed fixed: five standard deviations say that the distribution is wrong.
    assert (np.abs(share - wanted) < 5 * deviation).all()


def test_steps_and_rows_draw_apart() -> None:
    config = SamplingConfig(do_sample=True, temperature=5.0)
    first, second = drawn(config, LOGITS, 50, step=0), drawn(config, LOGITS, 50, step=1)
    assert (first != second).any()
    assert len(set(first.tolist())) > 3


def test_seeds_make_rows_independent_of_their_batch() -> None:
    data = jax.random.key_data
    many, alone = data(row_keys([5, 9, 5], 3)), data(row_keys([9], 1))
    assert (many[1] == alone[0]).all()
    assert (many[0] == many[2]).all()
    assert (data(row_keys(9, 1)) == alone).all()
    assert len(np.unique(np.asarray(data(row_keys(9, 4))), axis=0)) == 4


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**40, np.int64(3)])
def test_any_whole_number_is_a_seed(seed: Any) -> None:
    alone, listed = row_keys(seed, 1), row_keys([seed], 1)
    assert (jax.random.key_data(alone) == jax.random.key_data(listed)).all()


@pytest.mark.parametrize("seed", [1.5, "1", True, 2**64, None])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="not a whole number of 64 bits"):
        row_keys([seed], 1)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_the_wrong_number_of_seeds_is_refused(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(seeds)} seeds for 2 rows"):
        row_keys(seeds, 2)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"temperature": 0.0}, "temperature 0.0 is out of range: it must be at least 1e-30"),
        ({"temperature": -1}, "temperature -1 "),
        ({"temperature": math.nan}, "temperature nan "),
        ({"temperature": math.inf}, "temperature inf "),
        ({"temperature": "hot"}, "temperature 'hot' "),
        ({"temperature": True}, "temperature True "),
        ({"top_p": 1.01}, "top_p 1.01 .* at least 0 and at most 1"),
        ({"top_p": -0.1}, "top_p -0.1 "),
        ({"min_p": 2}, "min_p 2 "),
        ({"top_k": -1}, "top_k -1 "),
        ({"top_k": 2.5}, "top_k 2.5 .* whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 "),
        ({"min_new_tokens": -1}, "min_new_tokens -1 "),
        ({"min_new_tokens": 1.5}, "min_new_tokens 1.5 .* whole number"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SamplingConfig(**values)


def test_neutral_values_switch_their_part_off() -> None:
    flags = SamplingConfig(do_sample=True, top_k=0, top_p=1.0, min_p=0.0).flags()
    assert flags == SamplingConfig(do_sample=True).flags()
    assert not SamplingConfig(top_k=5, top_p=0.5, min_p=0.1).flags().ranked


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert int(SamplingConfig(do_sample=True, top_k=10**12).values((), V).top_k) == V
