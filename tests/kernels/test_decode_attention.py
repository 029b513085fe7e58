"""Attention of one token over its cache: the kernel and its reference against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.decode_attention.reference import decode_attention as reference

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
# Compiled: op by op, XLA would compile each of a dozen anew for every shape.
FORMS = {
    "native": decode_attention,
    "reference": jax.jit(reference, static_argnames=("window", "softcap")),
}


def inputs(seed: int, B: int, K: int, G: int, S: int, H: int, dtype: str = "float32") -> Any:
    """Arrays q, k, v and positions: each row has its own length, in shuffled slots."""
    rng = np.random.default_rng(seed)
    shapes = (B, K * G, H), (B, K, S, H), (B, K, S, H)
    arrays = (jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype)) for shape in shapes)
    keys = np.full((B, S), -1, np.int32)
    lengths = [int(rng.integers(1, S + 1)) for _ in range(B)]
    for b, n in enumerate(lengths):
        keys[b, rng.permutation(S)[:n]] = rng.permutation(n)
    # Some queries are not the last token: later keys must not be seen.
    queries = [max(n - 1 - int(rng.integers(0, 3)), 0) for n in lengths]
    return (*arrays, jnp.asarray(queries, jnp.int32), jnp.asarray(keys))


def oracle(
    q: Any,
    k: Any,
    v: Any,
    queries: Any,
    keys: Any,
    window: int | None,
    softcap: float | None = None,
) -> np.ndarray:
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    B, N, H = q.shape
    out = np.zeros((B, N, H))
    for b in range(B):
        back = int(queries[b]) - np.asarray(keys)[b]
        seen = (np.asarray(keys)[b] >= 0) & (back >= 0) & (window is None or back < window)
        for n in range(N if seen.any() else 0):
            head = n * k.shape[1] // N
            scores = k[b, head, seen] @ q[b, n] / np.sqrt(H)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ v[b, head, seen] / weights.sum()
    return out


def tolerance(k: jax.Array, v: jax.Array, dtype: str) -> float:
    """A score is off by D roundings, which its weight repeats; S weighted values are added up."""
    S, H = k.shape[-2:]
    values = float(np.abs(np.asarray(v, np.float64)).max())
    rounded = EPS[dtype] if dtype == "bfloat16" else 0.0
    # |score| <= |q| |k| / sqrt(H), of order sqrt(H) for normal numbers: 6 sigma at most.
    return values * (EPS["float32"] * (2 * 6 * H + S + 8) + rounded)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(
    B=st.integers(1, 4),
    K=st.integers(1, 3),
    G=st.sampled_from([1, 3, 4, 5]),
    S=st.sampled_from([1, 2, 37, 255, 256, 257, 600]),
    H=st.sampled_from([1, 7, 16, 33, 64]),
    window=st.sampled_from([None, 1, 5, 300]),
    softcap=st.sampled_from([None, 0.5, 50.0]),
    dtype=st.sampled_from(sorted(EPS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_over_what_is_seen(
    form: str,
    B: int,
    K: int,
    G: int,
    S: int,
    H: int,
    window: int | None,
    softcap: float | None,
    dtype: str,
    seed: int,
) -> None:
    arrays = inputs(seed, B, K, G, S, H, dtype)
    out = FORMS[form](*arrays, window=window, softcap=softcap)
    assert (out.dtype, out.shape) == (arrays[0].dtype, arrays[0].shape)
    atol = tolerance(*arrays[1:3], dtype=dtype)
    wanted = oracle(*arrays, window=window, softcap=softcap)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_softcap_that_caps_nothing_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap is .*, must be positive and finite"):
        decode_attention(*inputs(0, 1, 1, 1, 2, 4), softcap=softcap)


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_nothing_gets_zeros(form: str) -> None:
    q, k, v, queries, _ = inputs(0, 3, 2, 2, 300, 8)
    # No slot taken; only later keys; only keys outside the window.
    keys = np.full((3, 300), -1, np.int32)
    keys[1, :5] = np.arange(20, 25)
    keys[2, :5] = np.arange(5)
    queries = jnp.array([3, 9, 30], jnp.int32)
    out = FORMS[form](q, k, v, queries, jnp.asarray(keys), 4)
    assert not np.asarray(out).any()


def test_slots_that_are_not_seen_are_not_read() -> None:
    q, k, v, queries, keys = inputs(1, 2, 2, 3, 300, 9)
    seen = (np.asarray(keys) >= 0) & (np.asarray(keys) <= np.asarray(queries)[:, None])
    empty = ~seen[:, None, :, None]
    wanted = decode_attention(q, k, v, queries, keys)
    k, v = (jnp.where(empty, jnp.nan, array) for array in (k, v))
    assert decode_attention(q, k, v, queries, keys).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", EPS)
def test_a_batch_is_its_rows_bit_for_bit(dtype: str) -> None:
    arrays = inputs(2, 5, 2, 3, 601, 33, dtype)
    together = np.asarray(decode_attention(*arrays, window=400))
    for b in range(5):
        alone = decode_attention(*(array[b : b + 1] for array in arrays), window=400)
        assert np.asarray(alone).tobytes() == together[b : b + 1].tobytes()


def test_keys_and_values_may_come_flat_and_in_another_dtype() -> None:
    q, k, v, *positions = inputs(3, 2, 3, 2, 40, 16)
    wanted = decode_attention(q, k, v, *positions)
    flat = decode_attention(q, k.reshape(6, 40, 16), v.reshape(6, 40, 16), *positions)
    assert flat.tobytes() == wanted.tobytes()
    half = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    out = jax.jit(decode_attention)(q, *half, *positions)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(out),
        oracle(q, *half, *positions, window=None),
        rtol=0,
        atol=tolerance(*half, dtype="float32"),
    )


def test_large_scores_do_not_overflow() -> None:
    q, k, v, *positions = inputs(4, 1, 1, 1, 300, 8)
    out = decode_attention(q * 1e4, k * 1e4, v, *positions)
    np.testing.assert_allclose(
        np.asarray(out), oracle(q * 1e4, k * 1e4, v, *positions, window=None), rtol=0, atol=1e-4
    )


def test_shapes_and_dtypes_that_do_not_work_are_refused() -> None:
    q, k, v, queries, keys = inputs(0, 2, 3, 2, 8, 4)
    for arrays, complaint in (
        ((q[:, :5], k, v, queries, keys), "N a multiple of K"),
        ((q[:, :, :3], k, v, queries, keys), r"q \[B,N,H\]"),
        ((q, k, v[:, :, :7], queries, keys), r"q \[B,N,H\]|reshape"),
        ((q, k, v, queries[:1], keys), r"positions \[B\]"),
        ((q, k, v, queries, keys[:, :7]), r"positions \[B\]"),
        ((q, k, v.astype(jnp.bfloat16), queries, keys), "keys and values alike"),
        ((q, *(a.astype(jnp.float16) for a in (k, v)), queries, keys), "float32 nor bfloat16"),
    ):
        with pytest.raises((jax.errors.JaxRuntimeError, TypeError), match=complaint):
            jax.block_until_ready(decode_attention(*arrays))
