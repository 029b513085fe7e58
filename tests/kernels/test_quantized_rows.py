"""Rows in few bits: what is stored, how far it is off, and the kernels that read it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.masked_mlp import masked_mlp, native
from kernels_pallas.row_products import (
    QuantizedRows,
    contract_rows,
    dequantized,
    expand_rows,
    quantized,
    rounded,
)

# Compiled: op by op, XLA would compile each of a dozen anew for every shape.
stored_as = jax.jit(quantized, static_argnums=(1, 2))
read_back = jax.jit(dequantized)
products = {
    function: jax.jit(function, static_argnums=4) for function in (expand_rows, contract_rows)
}
EPS = 2.0**-23
MOST = {8: 127, 6: 31, 4: 7}


def rows_of(rng: np.random.Generator, F: int, D: int) -> np.ndarray:
    # Rows of very different size, and one of zeros, for scales that matter.
    w = rng.standard_normal((F, D)) * 10.0 ** rng.integers(-6, 6, (F, 1))
    w[F // 2] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize("bits", MOST)
@settings(max_examples=15)
@given(
    F=st.integers(1, 9),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 256]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_weight_is_off_by_half_a_step(
    bits: int, F: int, groups: int, group: int, seed: int
) -> None:
    w = rows_of(np.random.default_rng(seed), F, groups * group)
    stored = stored_as(jnp.asarray(w), bits, group)
    assert (stored.bits, stored.shape) == (bits, w.shape)
    assert stored.scales.shape == (F, groups)
    assert stored.nbytes == w.size * bits // 8 + F * groups * 4
    largest = np.abs(w.reshape(F, groups, group)).max(-1, keepdims=True)
    off = np.abs(np.asarray(read_back(stored)) - w).reshape(F, groups, group)
    assert (off <= largest / MOST[bits] * (0.5 + 4 * MOST[bits] * EPS)).all()
    again = stored_as(read_back(stored), bits, group)
    assert np.asarray(again.values).tobytes() == np.asarray(stored.values).tobytes()


def test_four_bits_lie_in_halves_of_sixteen_bytes() -> None:
    # -7 .. 7 and back: the largest is 7, so every step is one and the stored value is w + 8.
    w = jnp.asarray([[*range(-7, 8), 7, *range(7, -8, -1), -7]], jnp.float32)
    stored = quantized(w, bits=4)
    assert stored.values.shape == (1, 16) and stored.values.dtype == jnp.uint8
    plus_8 = np.asarray(w, np.int64)[0] + 8
    assert np.asarray(stored.values)[0].tolist() == (plus_8[:16] + 16 * plus_8[16:]).tolist()
    assert np.asarray(stored.scales).tolist() == [[1.0]]
    assert np.asarray(dequantized(stored)).tolist() == np.asarray(w).tolist()


def test_six_bits_lie_in_twenty_four_bytes() -> None:
    # -31 and on by two, then the largest: every step is one and the stored value is w + 32.
    w = jnp.asarray([[*range(-31, 30, 2), 31]], jnp.float32)
    stored = quantized(w, bits=6)
    assert stored.values.shape == (1, 12) and stored.values.dtype == jnp.uint16
    plus_32 = (np.asarray(w, np.int64)[0] + 32).reshape(4, 8)
    upper = plus_32.reshape(2, 16) >> 2
    lower = plus_32 & 3
    wanted = [*(upper[0] + 16 * upper[1]), *(lower.T @ [1, 4, 16, 64])]
    assert np.asarray(stored.values).astype("<u2").tobytes() == bytes(wanted)
    assert np.asarray(dequantized(stored)).tolist() == np.asarray(w).tolist()


def test_rows_of_zeros_stay_zeros() -> None:
    for bits in MOST:
        assert not np.asarray(dequantized(quantized(jnp.zeros((3, 64)), bits))).any()


@pytest.mark.parametrize(
    ("bits", "group", "width", "complaint"),
    [
        (5, 32, 64, "bits 5 are not offered: use 4, 6 or 8"),
        (8, 16, 64, "group 16 .* power of two from 32 on"),
        (4, 96, 96, "group 96 .* power of two"),
        (8, 64, 96, "group 64 with rows of 96"),
        (8, 32, 33, "group 32 with rows of 33"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    bits: int, group: int, width: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        quantized(jnp.ones((2, width)), bits, group)


def test_vectors_are_rounded_block_by_block() -> None:
    x = rows_of(np.random.default_rng(0), 5, 96)
    x[1, :32] = 1e-33  # as good as nothing
    found = np.asarray(jax.jit(rounded)(x)).reshape(5, 3, 32)
    blocks = np.where(np.abs(x) > 1e-30, x.astype(np.float64), 0).reshape(5, 3, 32)
    steps = np.abs(blocks).max(-1, keepdims=True) / 127
    assert (np.abs(found - blocks) <= steps * (0.5 + 4 * 127 * EPS)).all()
    assert not found[1, 0].any() and found[1, 1].any()
    counts = found / np.where(steps == 0, 1, steps)
    assert (np.abs(counts - np.round(counts)) <= 4 * 127 * EPS).all()
    # A row says nothing of the others.
    assert np.asarray(rounded(jnp.asarray(x[3:4]))).tobytes() == found[3].tobytes()
    with pytest.raises(ValueError, match="vectors of 33 are not rounded: give a multiple of 32"):
        rounded(jnp.ones((1, 33)))


def test_they_pass_through_jit() -> None:
    stored = quantized(jnp.asarray(rows_of(np.random.default_rng(0), 3, 32)), 4)
    out = jax.jit(lambda w: w)(stored)
    assert isinstance(out, QuantizedRows) and out.shape == (3, 32)


@pytest.mark.parametrize("bits", MOST)
@pytest.mark.parametrize("implementation", ["xla", "native"])
@settings(max_examples=10)
@given(
    N=st.integers(1, 16),
    F=st.sampled_from([1, 5, 33, 131]),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_those_of_the_matrix_that_is_stored(
    implementation: str, bits: int, N: int, F: int, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    D = 3 * group
    stored = stored_as(jnp.asarray(rng.standard_normal((F, D)), jnp.float32), bits, group)
    w = np.asarray(read_back(stored), np.float64)
    order = rng.permutation(F)[: F // 2 + 1]
    rows = jnp.asarray(order[None], jnp.int32)
    x = rng.standard_normal((N, D)).astype(np.float32)
    h = rng.standard_normal((N, len(order))).astype(np.float32)
    out = products[expand_rows](jnp.asarray(x), stored, rows, None, implementation)
    bound = np.abs(x) @ np.abs(w[order]).T * (D + 4) * EPS
    assert (np.abs(np.asarray(out) - x.astype(np.float64) @ w[order].T) <= bound).all()
    out = products[contract_rows](jnp.asarray(h), stored, rows, None, implementation)
    bound = np.abs(h) @ np.abs(w[order]) * (len(order) + 4) * EPS
    assert (np.abs(np.asarray(out) - h.astype(np.float64) @ w[order]) <= bound).all()


@pytest.mark.parametrize("bits", MOST)
@pytest.mark.parametrize("group", [32, 128])
def test_the_feed_forward_layer_reads_them(group: int, bits: int) -> None:
    rng = np.random.default_rng(bits)
    B, E, D = 5, 67, 2 * group
    weights = [
        quantized(jnp.asarray(rng.standard_normal((E, D)) / D**0.5, jnp.float32), bits, group)
        for _ in range(3)
    ]
    x = jnp.asarray(rng.standard_normal((B, 1, D)), jnp.float32)
    mask = jnp.asarray(rng.random((B, 1, E)) < 0.5)
    out, used = native.masked_mlp(x, *weights, activation="silu", given=mask)
    wanted, _ = masked_mlp(x, *map(dequantized, weights), activation="silu", given=mask)
    assert used is mask
    np.testing.assert_allclose(out, wanted, rtol=0, atol=10 * EPS * (E + D))


def test_matrices_of_unlike_groups_are_refused() -> None:
    def stored(bits: int, group: int) -> QuantizedRows:
        return quantized(jnp.ones((4, 64)), bits, group)

    x = jnp.ones((1, 1, 64))
    unlike: list[tuple[Any, ...]] = [
        (stored(8, 32), stored(8, 64), stored(8, 32)),
        (stored(8, 32), stored(4, 32), stored(8, 32)),
        (stored(4, 32), stored(4, 32), jnp.ones((4, 64))),
    ]
    for weights in unlike:
        with pytest.raises(jax.errors.JaxRuntimeError, match="one dtype and one group size"):
            jax.block_until_ready(native.masked_mlp(x, *weights, activation="silu"))
    # Scales that no group fits: made by hand, since `quantized` would refuse.
    torn = QuantizedRows(jnp.ones((4, 64), jnp.int8), jnp.ones((4, 3)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="power of two from 32 on"):
        jax.block_until_ready(expand_rows(x[0], torn, jnp.array([[0]]), None, "native"))
