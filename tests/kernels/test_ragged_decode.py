"""Attention over ranges of a pool and a tail against NumPy in float64.

What lies outside the ranges and in empty slots of the tail is NaN in every test. Leaves out the
kernels of accelerators, which are tested beside this file.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.ragged_decode import ragged_decode
from kernels_pallas.ragged_decode.reference import ragged_decode as reference

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
POOL = 1500  # several chunks of the XLA form, of which ranges fill a part


def through(form: str) -> Any:
    """The operation in one form, compiled: op by op, XLA would compile each of forty anew."""
    if form == "reference":
        return jax.jit(reference, static_argnames=("window", "softcap"))
    static = ("window", "softcap", "implementation")
    compiled = jax.jit(ragged_decode, static_argnames=static)
    return lambda *arrays, **options: compiled(*arrays, implementation=form, **options)


class Arrays(NamedTuple):
    """The arguments of the operation in their order."""

    q: jax.Array
    entries: jax.Array
    positions: jax.Array
    starts: jax.Array
    lengths: jax.Array
    tail_k: jax.Array
    tail_v: jax.Array
    query_positions: jax.Array
    tail_positions: jax.Array

    def row(self, b: int) -> "Arrays":
        whole = {"entries": self.entries, "positions": self.positions}
        cut = {name: array[b : b + 1] for name, array in self._asdict().items()}
        return Arrays(**{**cut, **whole})


def spread(rng: np.random.Generator, lengths: np.ndarray, pool: int) -> np.ndarray:
    """First rows of ranges of these lengths, in shuffled order with gaps between."""
    gaps = rng.multinomial(pool - lengths.sum(), np.full(lengths.size + 1, 1 / (lengths.size + 1)))
    starts, at = np.zeros(lengths.size, np.int32), 0
    for gap, head in zip(gaps[:-1], rng.permutation(lengths.size), strict=True):
        starts[head] = at + gap
        at = starts[head] + lengths.flat[head]
    return starts.reshape(lengths.shape)


def inputs(
    seed: int, B: int, T: int, K: int, G: int, H: int, M: int, dtype: str = "float32"
) -> Arrays:
    """Heads of none, one or many entries; the context is of 600 tokens, the tail partly filled."""
    rng = np.random.default_rng(seed)
    most = min(600, POOL // (B * K))
    lengths = rng.choice([0, 1, int(rng.integers(2, most)), most], (B, K))
    starts = spread(rng, lengths, POOL)
    entries = np.full((POOL, 2 * H), np.nan)
    positions = rng.integers(-1, 600, POOL)  # of rows outside all ranges: anything
    for start, length in zip(starts.flat, lengths.flat, strict=True):
        entries[start : start + length] = rng.standard_normal((length, 2 * H))
        positions[start : start + length] = np.sort(rng.choice(600, length, replace=False))
    tail = np.full((B, M), -1)
    keys, values = (np.full((B, K, M, H), np.nan) for _ in "kv")
    for b in range(B):
        filled = int(rng.integers(0, M + 1))
        slots = rng.permutation(M)[:filled]
        tail[b, slots] = 600 + rng.permutation(filled)
        for x in (keys, values):
            x[b, :, slots] = rng.standard_normal((filled, K, H))
    # Some queries are not the last tokens: what is later must not be seen.
    queries = rng.integers(500, 600 + M + 1, (B, 1)) + np.arange(T)
    floats = (jnp.asarray(x, jnp.dtype(dtype)) for x in (entries, keys, values))
    held, tail_k, tail_v = floats
    q = jnp.asarray(rng.standard_normal((B, T, K * G, H)), jnp.dtype(dtype))
    whole = (jnp.asarray(x, jnp.int32) for x in (positions, starts, lengths, queries, tail))
    position, start, length, query, tail_position = whole
    return Arrays(q, held, position, start, length, tail_k, tail_v, query, tail_position)


def oracle(arrays: Arrays, window: int | None, softcap: float | None) -> np.ndarray:
    a = Arrays(*(np.asarray(x, None if x.dtype == np.int32 else np.float64) for x in arrays))
    B, T, N, H = a.q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        k = n * a.starts.shape[1] // N
        held = slice(a.starts[b, k], a.starts[b, k] + a.lengths[b, k])
        positions = np.concatenate([a.positions[held], a.tail_positions[b]])
        back = a.query_positions[b, t] - positions
        seen = (positions >= 0) & (back >= 0) & (window is None or back < window)
        if not seen.any():
            continue
        scores = np.concatenate([a.entries[held, :H], a.tail_k[b, k]])[seen] @ a.q[b, t, n]
        scores /= np.sqrt(H)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        values = np.concatenate([a.entries[held, H:], a.tail_v[b, k]])[seen]
        out[b, t, n] = weights @ values / weights.sum()
    return out


def tolerance(arrays: Arrays) -> float:
    """A score is off by H + 8 roundings, which its weight repeats; S weighted values are added."""
    H, S = arrays.q.shape[-1], 600 + arrays.tail_k.shape[2]
    values = max(
        float(np.nanmax(np.abs(np.asarray(x, np.float64)), initial=1.0))
        for x in arrays
        if x.dtype != jnp.int32
    )
    rounded = EPS["bfloat16"] if arrays.q.dtype == jnp.bfloat16 else 0.0
    # |score| <= |q| |k| / sqrt(H), of order sqrt(H) for normal numbers: 6 sigma at most.
    return values * (EPS["float32"] * (2 * 6 * (H + 8) + S + 8) + rounded)


@pytest.mark.parametrize("form", ["native", "xla", "reference"])
@settings(max_examples=10)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 3]),
    K=st.integers(1, 3),
    G=st.sampled_from([1, 3, 4, 5]),
    H=st.sampled_from([1, 7, 33, 64]),
    M=st.sampled_from([0, 1, 40, 300]),
    window=st.sampled_from([None, 1, 300]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    dtype=st.sampled_from(sorted(EPS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_over_range_and_tail(
    form: str,
    B: int,
    T: int,
    K: int,
    G: int,
    H: int,
    M: int,
    window: int | None,
    softcap: float | None,
    dtype: str,
    seed: int,
) -> None:
    arrays = inputs(seed, B, 1 if form == "native" else T, K, G, H, M, dtype)
    out = through(form)(*arrays, window=window, softcap=softcap)
    assert (out.dtype, out.shape) == (arrays.q.dtype, arrays.q.shape)
    wanted = oracle(arrays, window, softcap)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0, atol=tolerance(arrays))


@pytest.mark.parametrize("form", ["native", "xla", "reference"])
def test_a_query_that_sees_nothing_gets_zeros(form: str) -> None:
    arrays = inputs(0, 3, 1, 2, 3, 8, 20)
    # A padded row; one of empty heads and an empty tail; one whose keys are out of its window.
    queries = jnp.array([[-1], [700], [2000]], jnp.int32)
    lengths = arrays.lengths.at[1].set(0)
    tail = arrays.tail_positions.at[1].set(-1)
    changed = arrays._replace(query_positions=queries, lengths=lengths, tail_positions=tail)
    assert not np.asarray(through(form)(*changed, window=100)).any()


@pytest.mark.parametrize("dtype", EPS)
def test_a_batch_is_its_rows_bit_for_bit(dtype: str) -> None:
    arrays = inputs(2, 5, 1, 2, 3, 33, 300, dtype)
    together = np.asarray(through("native")(*arrays, window=580))
    for b in range(5):
        alone = through("native")(*arrays.row(b), window=580)
        assert np.asarray(alone).tobytes() == together[b : b + 1].tobytes()


@pytest.mark.parametrize("form", ["native", "xla"])
def test_longer_neighbours_change_nothing(form: str) -> None:
    arrays = inputs(2, 5, 1, 2, 3, 33, 300)
    operation = through(form)
    own = (jnp.arange(5) == 3)[:, None]
    starts = jnp.where(own, arrays.starts, 0)
    lengths = jnp.where(own, arrays.lengths, POOL)
    wanted = np.asarray(operation(*arrays))
    found = np.asarray(operation(*arrays._replace(starts=starts, lengths=lengths)))
    assert found[3].tobytes() == wanted[3].tobytes()
    assert np.isfinite(wanted).all() and wanted[3].any()


@pytest.mark.parametrize("form", ["native", "xla"])
def test_bfloat16_may_come_as_bits_and_the_tail_flat(form: str) -> None:
    arrays = inputs(3, 2, 1, 3, 2, 16, 40, "bfloat16")
    wanted = through(form)(*arrays)
    changed = arrays._asdict()
    for name in ("entries", "tail_k", "tail_v"):
        changed[name] = jax.lax.bitcast_convert_type(changed[name], jnp.uint16)
    for name in ("tail_k", "tail_v"):
        changed[name] = changed[name].reshape(6, 40, 16)
    assert through(form)(*changed.values()).tobytes() == wanted.tobytes()
    # Queries in another dtype than the cache keep theirs.
    out = through(form)(*arrays._replace(q=arrays.q.astype(jnp.float32)))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(out, np.float64),
        oracle(arrays, None, None),
        rtol=0,
        atol=tolerance(arrays._replace(q=arrays.q.astype(jnp.float32))),
    )


@pytest.mark.parametrize("form", ["native", "xla"])
def test_large_scores_do_not_overflow(form: str) -> None:
    arrays = inputs(4, 2, 1, 1, 2, 8, 20)
    arrays = arrays._replace(q=arrays.q * 1e6)
    out = np.asarray(through(form)(*arrays))
    # One weight is one and the others zero, but for scores as close as their rounding.
    np.testing.assert_allclose(out, oracle(arrays, None, None), rtol=0, atol=1e-5)
    out = np.asarray(through(form)(*arrays, softcap=2.0))
    np.testing.assert_allclose(out, oracle(arrays, None, 2.0), rtol=0, atol=tolerance(arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])
@pytest.mark.parametrize("T", [1, 5])
def test_xla_holds_chunks_and_never_the_pool(T: int, dtype: str) -> None:
    B, K, H, M, E = 2, 4, 32, 1000, 200_000

    def shaped(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    tails = (shaped(B, K, M, H, dtype=dtype),) * 2
    q, pool = shaped(B, T, 2 * K, H, dtype="float32"), shaped(E, 2 * H, dtype=dtype)
    ranges = (shaped(E), shaped(B, K), shaped(B, K))
    program = jax.jit(ragged_decode).lower(q, pool, *ranges, *tails, shaped(B, T), shaped(B, M))
    memory = program.compile().memory_analysis()
    assert memory is not None
    # A chunk of 256 rows of 8 heads, once as it lies and twice in float32, and scores.
    assert memory.temp_size_in_bytes < 6 * 256 * 8 * 2 * H * 4 < pool.size * pool.dtype.itemsize / 8


@pytest.mark.parametrize("implementation", ["auto", "pallas_tpu", "pallas_gpu"])
def test_what_no_kernel_serves_runs_through_xla(implementation: str) -> None:
    arrays = inputs(5, 1, 3, 2, 2, 7, 20)
    out = through(implementation)(*arrays)
    assert out.tobytes() == through("xla")(*arrays).tobytes()


def test_arrays_and_options_that_do_not_work_are_refused() -> None:
    arrays = inputs(6, 2, 1, 2, 2, 8, 20)
    half = jnp.bfloat16
    for changed, complaint in (
        ({"q": arrays.q[:, 0]}, r"q \[B,T,N,H\]"),
        ({"q": arrays.q[:, :, :3]}, "query heads a multiple of KV heads, got 3, 2"),
        ({"entries": arrays.entries[:, :15]}, r"entries \(\(?1500, 16\)"),
        ({"positions": arrays.positions[1:]}, r"positions \(1500,\).* got \(1499,\)"),
        ({"lengths": arrays.lengths[:1]}, r"lengths \(2, 2\)"),
        ({"tail_v": arrays.tail_v[:, :1]}, r"tail_v \(2, 2, 20, 8\) or \(4, 20, 8\)"),
        ({"query_positions": arrays.query_positions[:1]}, r"query_positions \(2, 1\)"),
        ({"tail_positions": arrays.tail_positions[:1]}, r"tail_positions \(2, 20\)"),
        ({"tail_k": arrays.tail_k.astype(half)}, "entries and tail alike"),
        ({"q": arrays.q.astype(jnp.float16)}, "queries in float32 or bfloat16"),
        ({"starts": arrays.starts.astype(jnp.int16)}, "starts in int32, got int16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ragged_decode(*arrays._replace(**changed))
    for options, complaint in (
        ({"window": 0}, "window is 0, must be at least 1"),
        ({"softcap": 0.0}, "softcap is 0.0, must be positive"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"implementation": "fast"}, "'fast' is unknown"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ragged_decode(*arrays, **options)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (POOL, 1), (POOL - 5, 6), (3, -1)])
def test_the_cpu_kernel_refuses_ranges_outside_the_pool(start: int, length: int) -> None:
    arrays = inputs(7, 2, 1, 2, 1, 8, 20)
    starts, lengths = arrays.starts.at[1, 0].set(start), arrays.lengths.at[1, 0].set(length)
    changed = arrays._replace(starts=starts, lengths=lengths)
    with pytest.raises(jax.errors.JaxRuntimeError, match="leaves its pool of 1500 entries"):
        through("native")(*changed).block_until_ready()


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_of_nothing_is_refused_for_a_dense_cache_too(window: int) -> None:
    k = jnp.ones((1, 1, 4, 8))
    positions = jnp.zeros((1,), jnp.int32), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=f"window is {window}, must be at least 1"):
        decode_attention(jnp.ones((1, 2, 8)), k, k, *positions, window=window)
