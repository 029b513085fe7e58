"""Products with all or chosen rows: every form against NumPy in float64.

Exact claims are exact here: a batch is its rows, bit for bit, and a row that nobody names is not
read. Leaves out how weights are rounded to fewer bits (test_quantized_rows.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.row_products import (
    IMPLEMENTATIONS,
    QuantizedRows,
    contract,
    contract_rows,
    dequantized,
    expand,
    expand_many,
    expand_rows,
    quantized,
)

# Compiled: op by op, XLA would compile each of a dozen anew for every shape.
products = {
    function: jax.jit(function, static_argnums=4) for function in (expand_rows, contract_rows)
}
KINDS = ("float32", "bfloat16", "int8", "int6", "int4")
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([31, 33, 63, 67, 129, 545]))


def matrix(rng: np.random.Generator, F: int, D: int, kind: str) -> Any:
    w = jnp.asarray(rng.standard_normal((F, D)), jnp.float32)
    if kind in EPS:
        return w.astype(kind)
    return quantized(w, bits=int(kind[3:]))


def vectors(rng: np.random.Generator, N: int, width: int, kind: str) -> jax.Array:
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    return jnp.asarray(rng.standard_normal((N, width)), jnp.dtype(dtype))


def exact(w: Any) -> np.ndarray:
    return np.asarray(dequantized(w) if isinstance(w, QuantizedRows) else w, np.float64)


def close(got: jax.Array, wanted: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """Within the rounding of sums of `terms` products, whose absolute values add up to magnitude.

    The kernels add in float32. XLA may round a bfloat16 product, and each of up to eight blocks.
    """
    eps = EPS[str(got.dtype)]
    bound = magnitude * (terms + 4) * EPS["float32"]
    bound += (8 * eps * magnitude) if got.dtype == jnp.bfloat16 else 0
    assert got.shape == wanted.shape
    assert (np.abs(np.asarray(got, np.float64) - wanted) <= bound + 1e-30).all()


@st.composite
def problems(draw: Any) -> tuple[np.random.Generator, int, int, int, str]:
    kind = draw(st.sampled_from(KINDS))
    D = draw(st.sampled_from([32, 96])) if kind.startswith("int") else draw(SIZES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng, draw(st.integers(1, 16)), draw(SIZES), D, kind


def lists(
    rng: np.random.Generator, N: int, F: int, count: str, shared: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of rows [1 or N, capacity] with counts, and rubbish from there on."""
    sets, capacity = 1 if shared else N, int(rng.integers(0, F + 1)) if count == "some" else F
    rows = np.stack([rng.permutation(F)[:capacity] for _ in range(sets)])
    if count == "some":
        counts = rng.integers(0, capacity + 1, sets)
    else:
        counts = np.full(sets, {"none": 0, "one": 1, "all": capacity}[count])
    return rows, counts


def dense_lists(rows: np.ndarray, counts: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    rows, counts = np.broadcast_to(rows, (N, rows.shape[1])), np.broadcast_to(counts, (N,))
    return rows, np.arange(rows.shape[1])[None, :] < counts[:, None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12)
@given(problem=problems())
def test_products_of_all_rows(implementation: str, problem: Any) -> None:
    rng, N, F, D, kind = problem
    if kind not in EPS:
        kind = "float32"  # packed weights come with lists of rows
    w, x, h = matrix(rng, F, D, kind), vectors(rng, N, D, kind), vectors(rng, N, F, kind)
    W, X, H = exact(w), np.asarray(x, np.float64), np.asarray(h, np.float64)
    close(expand(x, w, implementation), X @ W.T, abs(X) @ abs(W).T, D)
    wide = expand(x, w, implementation, jnp.dtype("float32"))
    assert wide.dtype == jnp.float32
    close(wide, X @ W.T, abs(X) @ abs(W).T, D)
    close(contract(h, w, implementation), H @ W, abs(H) @ abs(W), F)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", EPS)
def test_several_matrices_at_once(kind: str, implementation: str) -> None:
    rng = np.random.default_rng(0)
    x = vectors(rng, 6, 33, kind).reshape(2, 3, 33)
    weights = [matrix(rng, F, 33, kind) for F in (1, 65, 20, 700)]
    for w, h in zip(weights, expand_many(x, weights, implementation), strict=True):
        assert h.shape == (2, 3, w.shape[0])
        X, W = np.asarray(x, np.float64), exact(w)
        close(h, X @ W.T, abs(X) @ abs(W).T, 33)
        if implementation == "native":
            assert h.tobytes() == expand(x, w, "native").tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12)
@given(
    problem=problems(),
    count=st.sampled_from(["none", "one", "some", "all"]),
    shared=st.booleans(),
)
def test_products_of_chosen_rows(
    implementation: str, problem: Any, count: str, shared: bool
) -> None:
    rng, N, F, D, kind = problem
    w = matrix(rng, F, D, kind)
    rows, counts = lists(rng, N, F, count, shared)
    x, h = vectors(rng, N, D, kind), vectors(rng, N, rows.shape[1], kind)
    places = jnp.asarray(rows, jnp.int32), jnp.asarray(counts, jnp.int32)
    rows, valid = dense_lists(rows, counts, N)
    W, X, H = exact(w)[rows], np.asarray(x, np.float64), np.asarray(h, np.float64)
    W, H = np.where(valid[:, :, None], W, 0), np.where(valid, H, 0)
    out = products[expand_rows](x, w, *places, implementation)
    close(out, np.einsum("ND,NCD->NC", X, W), np.einsum("ND,NCD->NC", abs(X), abs(W)), D)
    out = products[contract_rows](h, w, *places, implementation)
    wanted, size = np.einsum("NC,NCD->ND", H, W), np.einsum("NC,NCD->ND", abs(H), abs(W))
    close(out, wanted, size, rows.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", ["all", "shared", "per row"])
@pytest.mark.parametrize(("N", "F", "D"), [(2, 5, 32), (7, 67, 96), (16, 545, 64)])
def test_a_batch_is_its_rows_bit_for_bit(N: int, F: int, D: int, listed: str, kind: str) -> None:
    rng = np.random.default_rng(F)
    # A width that is no multiple of what is worked at once, where the kind allows one.
    D += 0 if kind.startswith("int") else 5
    w = matrix(rng, F, D, kind)
    rows, counts = lists(rng, N, F, "all", listed == "shared")
    counts = rng.integers(0, F + 1, counts.shape)
    x, h = vectors(rng, N, D, kind), vectors(rng, N, F, kind)
    for function, v in ((expand_rows, x), (contract_rows, h)):
        several = listed == "per row"

        def run(v: jax.Array, i: slice, function: Any = function) -> np.ndarray:
            if listed == "all":
                whole = expand if function is expand_rows else contract
                return np.asarray(whole(v, w, "native"))
            j = i if several else slice(None)  # noqa: B023
            places = jnp.asarray(rows[j], jnp.int32), jnp.asarray(counts[j], jnp.int32)
            return np.asarray(function(v, w, *places, "native"))

        together = run(v, slice(None))
        for n in range(N):
            alone = run(v[n : n + 1], slice(n, n + 1))
            assert alone.tobytes() == together[n : n + 1].tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_count_for_every_list_and_one_list_for_every_count(implementation: str) -> None:
    w, x = jnp.eye(4), jnp.arange(1.0, 9.0).reshape(2, 4)
    rows = jnp.array([[3, 1]])
    h = expand_rows(x, w, rows, jnp.array([1, 2]), implementation)
    assert h.tolist() == [[4.0, 0.0], [8.0, 6.0]]
    y = contract_rows(jnp.ones((2, 2)), w, rows, jnp.array([1, 2]), implementation)
    assert y.tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    rows = jnp.array([[3, 1], [0, 2]])
    h = expand_rows(x, w, rows, jnp.array([1]), implementation)
    assert h.tolist() == [[4.0, 0.0], [5.0, 0.0]]
    y = contract_rows(jnp.ones((2, 2)), w, rows, jnp.array([1]), implementation)
    assert y.tolist() == [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_counts_are_data(implementation: str) -> None:
    traces = []

    @jax.jit
    def both(x: jax.Array, w: jax.Array, rows: jax.Array, counts: jax.Array) -> jax.Array:
        traces.append(0)
        h = expand_rows(x, w, rows, counts, implementation)
        return contract_rows(h, w, rows, counts, implementation)

    rng = np.random.default_rng(0)
    w, x = matrix(rng, 40, 9, "float32"), vectors(rng, 1, 9, "float32")
    order = rng.permutation(40)
    for count in (0, 1, 17, 40):
        rows = jnp.asarray(order[None], jnp.int32)
        out = np.asarray(both(x, w, rows, jnp.array([count])), np.float64)
        W = exact(w)[order[:count]]
        wanted = np.asarray(x, np.float64) @ W.T @ W
        np.testing.assert_allclose(out, wanted, rtol=0, atol=EPS["float32"] * 40 * 9 * 30)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_rows_that_nobody_names_are_not_read(kind: str) -> None:
    rng = np.random.default_rng(0)
    named = rng.permutation(129)[:31]
    w = np.full((129, 37), np.nan, np.float32)
    w[named] = rng.standard_normal((31, 37))
    rows = np.concatenate([named, [-7, 10**6, named[0]]])[None]  # rubbish beyond the count
    x, h = vectors(rng, 3, 37, kind), vectors(rng, 3, 34, kind)
    places = jnp.asarray(rows, jnp.int32), jnp.array([31], jnp.int32)
    out = expand_rows(x, jnp.asarray(w, x.dtype), *places, "native")
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert not np.asarray(out, np.float32)[:, 31:].any()
    out = contract_rows(h, jnp.asarray(w, x.dtype), *places, "native")
    assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("rows", "counts", "complaint"),
    [
        ([[0, 4]], [2], r"row 4 is outside 0\.\.3"),
        ([[0, -1]], [2], r"row -1 is outside 0\.\.3"),
        ([[1, 2, 1]], [3], "row 1 is named twice"),
        ([[0, 1], [3, 3]], [2, 2], "row 3 is named twice"),
        ([[0, 1]], [3], r"count 3 is outside 0\.\.2"),
        ([[0, 1]], [-1], r"count -1 is outside 0\.\.2"),
        ([[0], [1], [2]], [1, 1, 1], "one list of rows, or one a vector"),
    ],
    ids=str,
)
def test_lists_that_cannot_be_are_refused(
    rows: list[list[int]], counts: list[int], complaint: str, jitted: bool
) -> None:
    w, x = jnp.ones((4, 8)), jnp.ones((2, 8))
    h = jnp.ones((2, len(rows[0])))
    for function, v in ((expand_rows, x), (contract_rows, h)):
        run = jax.jit(function, static_argnums=4) if jitted else function
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"popjax: .*{complaint}"):
            jax.block_until_ready(run(v, w, jnp.array(rows), jnp.array(counts), "native"))


def test_shapes_that_disagree_are_refused() -> None:
    w = jnp.ones((4, 8))
    for run, complaint in (
        (lambda: expand(jnp.ones((2, 9)), w, "native"), "rows of 8 weights .* vectors of 9"),
        (lambda: contract(jnp.ones((2, 5)), w, "native"), "vectors of 5 .* lists of 4 rows"),
        (
            lambda: contract_rows(jnp.ones((2, 3)), w, jnp.array([[1, 2]]), None, "native"),
            "vectors of 3 .* lists of 2 rows",
        ),
        (lambda: expand(jnp.ones((2, 8), jnp.float16), w, "native"), "float32 or bfloat16"),
        (lambda: expand(jnp.ones((2, 8)), w.astype(jnp.float16), "native"), "float32, bfloat16"),
        (lambda: expand(jnp.ones((2, 8)), w.astype(jnp.int8), "native"), "float32 scale"),
        (
            lambda: expand_many(jnp.ones((2, 9)), [w], "native")[0],
            "rows of 8 weights .* vectors of 9",
        ),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"popjax: .*{complaint}"):
            jax.block_until_ready(run())


def test_nothing_to_do() -> None:
    assert expand(jnp.ones((0, 8)), jnp.ones((4, 8)), "native").shape == (0, 4)
    assert expand(jnp.ones((2, 8)), jnp.ones((0, 8)), "native").shape == (2, 0)
    assert contract(jnp.ones((2, 0)), jnp.ones((0, 3)), "native").tolist() == [[0.0] * 3] * 2
    empty = jnp.zeros((2, 0), jnp.int32)
    assert expand_rows(jnp.ones((2, 8)), jnp.ones((4, 8)), empty, None, "native").shape == (2, 0)
    out = contract_rows(jnp.ones((2, 0)), jnp.ones((4, 3)), empty, None, "native")
    assert out.tolist() == [[0.0] * 3] * 2
