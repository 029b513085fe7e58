"""The masked feed-forward layer: every implementation against plain NumPy in float64.

Which channels are chosen is tested in test_selection.py, packed weights in test_quantized_rows.py,
what is refused in test_masked_mlp_refusals.py.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

from kernels_pallas.masked_mlp import (
    ACTIVATIONS,
    IMPLEMENTATIONS,
    POINTS,
    Selection,
    gated_channels,
    masked_mlp,
    project,
    project_gathered,
)

# What runs without an accelerator.
HERE = [name for name in IMPLEMENTATIONS if name not in ("pallas_tpu", "pallas_gpu")]
SHAPES = [(1, 1, 8, 16), (3, 2, 8, 5), (2, 1, 1, 1), (1, 4, 33, 129), (1, 1, 8, 0)]
# Roundings that a sum of n products may be off by, relative to the size of its terms.
EPS = {"float32": float(np.finfo(np.float32).eps), "bfloat16": 2.0**-8}


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x) if x.size else x


OPENED = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def inputs(B: int, T: int, D: int, F: int, dtype: str, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, T, D))
    weights = (rng.standard_normal((F, D)) / math.sqrt(size) for size in (D, D, F + 1))
    return tuple(jnp.asarray(array, jnp.dtype(dtype)) for array in (x, *weights))


def random_mask(B: int, T: int, F: int, active: int) -> jax.Array:
    rng = np.random.default_rng(1)
    order = rng.permuted(np.tile(np.arange(F), (B, T, 1)), axis=-1)
    return jnp.asarray(order < active)


def oracle(x: Any, gate: Any, up: Any, down: Any, activation: str, mask: Any) -> np.ndarray:
    x, gate, up, down = (np.asarray(array, np.float64) for array in (x, gate, up, down))
    h = OPENED[activation](x @ gate.T) * (x @ up.T)
    return np.where(mask, h, 0) @ down


def tolerance(D: int, F: int, dtype: str) -> float:
    # Values of order ten at most; two products chained, of D and of F terms.
    return 10 * EPS[dtype] * (math.sqrt(D) + math.sqrt(F) + 1)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(
    ("share", "dtype"),
    [
        pytest.param(share, dtype, marks=[pytest.mark.slow] if repeats else [])
        for dtype in EPS
        for share in ("none", "one", "half", "all")
        # The dtype changes roundings, not which channels count.
        for repeats in [dtype == "bfloat16" and share != "half"]
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_of_a_given_mask(
    shape: tuple[int, int, int, int], share: str, dtype: str, implementation: str
) -> None:
    B, T, D, F = shape
    weights = inputs(B, T, D, F, dtype)
    active = {"none": 0, "one": min(1, F), "half": F // 2, "all": F}[share]
    mask = random_mask(B, T, F, active)
    call = functools.partial(
        masked_mlp,
        activation="silu",
        selection=Selection(num_candidate=F, k_selected=active),
        implementation=implementation,
    )
    out, used = jax.jit(call)(*weights, given=mask)
    assert (out.dtype, out.shape) == (weights[0].dtype, (B, T, D))
    assert used is not None and (np.asarray(used) == np.asarray(mask)).all()
    wanted = oracle(*weights, activation="silu", mask=np.asarray(mask))
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted, rtol=0, atol=tolerance(D, F, dtype)
    )


@settings(max_examples=30)
@given_by(
    B=st.integers(1, 16),
    F=st.integers(1, 400),
    D=st.one_of(st.integers(1, 40), st.sampled_from([65, 130])),
    dtype=st.sampled_from(sorted(EPS)),
    shared=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernels_over_drawn_shapes(
    B: int, F: int, D: int, dtype: str, shared: bool, share: float, activation: str, seed: int
) -> None:
    weights = inputs(B, 1, D, F, dtype, seed)
    mask = np.random.default_rng(seed).random((1 if shared else B, 1, F)) < share
    out, used = masked_mlp(
        *weights, activation=activation, given=jnp.asarray(mask), implementation="native"
    )
    assert used is not None and used.shape == mask.shape
    wanted = oracle(*weights, activation=activation, mask=mask)
    # The kernels keep h in float32: only the result is rounded to the dtype.
    atol = tolerance(D, F, "float32") + EPS[dtype] * np.abs(wanted)
    assert (np.abs(np.asarray(out, np.float64) - wanted) <= atol).all()


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, implementation: str) -> None:
    weights = inputs(2, 3, 8, 16, "float32")
    out, mask = masked_mlp(*weights, activation=activation, implementation=implementation)
    assert mask is None
    wanted = oracle(*weights, activation=activation, mask=True)
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=0, atol=tolerance(8, 16, "float32"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_large_values(activation: str) -> None:
    _, gate, up, down = inputs(1, 1, 8, 16, "float32")
    x = jnp.asarray([[[3e4, -2e4, 1e4, 0, 0, 5e3, -4e4, 1e3]]])
    out, _ = masked_mlp(x, gate, up, down, activation=activation, implementation="native")
    with np.errstate(over="ignore"):
        wanted = oracle(x, gate, up, down, activation, True)
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=1e-4)


@pytest.mark.parametrize("implementation", HERE)
def test_the_choice_sees_the_channels(implementation: str) -> None:
    weights = inputs(2, 1, 8, 16, "float32")
    loudness = np.abs(np.asarray(gated_channels(*weights[:3], activation="silu")))
    out, mask = masked_mlp(
        *weights,
        activation="silu",
        selection=Selection(num_candidate=16, k_selected=4),
        implementation=implementation,
    )
    assert (np.asarray(mask) == (loudness >= np.sort(loudness)[..., -4:-3])).all()
    wanted = oracle(*weights, activation="silu", mask=np.asarray(mask))
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=0, atol=tolerance(8, 16, "float32"))


@pytest.mark.parametrize("dtype", EPS)
def test_a_mask_of_all_channels_is_no_mask_bit_for_bit(dtype: str) -> None:
    weights = inputs(5, 1, 67, 301, dtype)
    call = functools.partial(masked_mlp, *weights, activation="silu", implementation="native")
    wanted, none = call()
    assert none is None
    everything = [Selection(num_candidate=200, k_selected=200, point=point) for point in POINTS]
    everything += [
        Selection(num_candidate=301, threshold=jnp.full((301,), -1.0), shared=shared)
        for shared in (False, True)
    ]
    for selection in everything:
        out, mask = call(selection=selection)
        assert mask is not None and np.asarray(mask).all()
        assert np.asarray(out).tobytes() == np.asarray(wanted).tobytes()
    for rows in (1, 5):
        out, _ = call(given=jnp.ones((rows, 1, 301), bool))
        assert np.asarray(out).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("point", [None, *POINTS])
@pytest.mark.parametrize(("F", "D"), [(5, 3), (301, 67), (1030, 40)])
def test_a_batch_is_its_rows_bit_for_bit(F: int, D: int, point: str | None, dtype: str) -> None:
    x, *weights = inputs(7, 1, D, F, dtype)
    selection = None
    if point is not None:
        selection = Selection(num_candidate=F - 1, k_selected=F // 3, point=point)
    call = functools.partial(
        masked_mlp, activation="silu", selection=selection, implementation="native"
    )
    out, mask = call(x, *weights)
    for b in range(7):
        alone, own = call(x[b : b + 1], *weights)
        assert np.asarray(alone).tobytes() == np.asarray(out)[b : b + 1].tobytes()
        if mask is not None:
            assert (np.asarray(own) == np.asarray(mask)[b : b + 1]).all()


def test_a_mask_shared_by_the_batch_broadcasts() -> None:
    h, down = jnp.ones((3, 2, 5)), jnp.eye(5)
    shared = jnp.array([[[True, False, True, False, False]] * 2])
    wanted = [[[1.0, 0.0, 1.0, 0.0, 0.0]] * 2] * 3
    assert project(h, down, shared).tolist() == wanted
    assert project_gathered(h, down, jnp.broadcast_to(shared, h.shape), 2).tolist() == wanted
    assert project_gathered(h, down, shared, 2).tolist() == wanted


@pytest.mark.parametrize("T", [1, 3])
def test_a_shared_mask_is_every_rows_own(T: int) -> None:
    weights = inputs(4, T, 17, 50, "float32")
    shared = random_mask(1, T, 50, 20)
    call = functools.partial(masked_mlp, *weights, activation="silu", implementation="native")
    out, _ = call(given=shared)
    each, _ = call(given=jnp.broadcast_to(shared, (4, T, 50)))
    assert np.asarray(out).tobytes() == np.asarray(each).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_channel_cannot_be_heard(bad: float) -> None:
    h = jnp.array([[[1.0, bad, 2.0]]])
    mask = jnp.array([[[True, False, True]]])
    down = jnp.ones((3, 2))
    assert project(h, down, mask).tolist() == [[[3.0, 3.0]]]
    assert project_gathered(h, down, mask, 2).tolist() == [[[3.0, 3.0]]]
    x, *weights = inputs(1, 1, 8, 3, "float32")
    wanted, _ = masked_mlp(x, *weights, activation="silu", given=mask, implementation="native")
    # Not read at all, so the row of `down` may hold anything too.
    weights = [w.at[1].set(bad) for w in weights]
    out, _ = masked_mlp(x, *weights, activation="silu", given=mask, implementation="native")
    assert out.tolist() == wanted.tolist()


@pytest.mark.parametrize("point", POINTS)
def test_what_is_not_chosen_is_not_read(point: str) -> None:
    x, gate, up, down = inputs(3, 1, 16, 60, "float32")
    gate = gate.at[40:].set(0.0)  # silent channels, which score zero
    selection = Selection(num_candidate=60, k_selected=40, point=point)
    options = {"activation": "silu", "selection": selection, "implementation": "native"}
    wanted, mask = masked_mlp(x, gate, up, down, **options)
    assert mask is not None and not np.asarray(mask)[..., 40:].any()
    if point == "gate":
        up = up.at[40:].set(jnp.nan)
    out, _ = masked_mlp(x, gate, up, down.at[40:].set(jnp.nan), **options)
    assert np.asarray(out).tobytes() == np.asarray(wanted).tobytes()


def tiles(w: jax.Array) -> jax.Array:
    return w.reshape(w.shape[0], -1, 128)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("point", [None, "given", *POINTS])
@pytest.mark.parametrize(
    ("evaluated", "B"),
    [(0, 1), pytest.param(1, 3, marks=pytest.mark.slow), (130, 3), (300, 1)],
)
def test_rows_of_the_full_weights_are_their_packed_copy(
    evaluated: int, B: int, point: str | None, implementation: str
) -> None:
    """Rows named by index, with weights kept as tiles: nothing is packed."""
    x, *weights = inputs(B, 1, 1024, 300, "float32")
    rows = jnp.asarray(np.random.default_rng(0).permutation(300)[:evaluated], jnp.int32)
    options: dict[str, Any] = {"activation": "silu"}
    if point == "given":
        options["given"] = random_mask(B, 1, evaluated, evaluated // 3)
    elif point is not None:
        candidates = evaluated * 2 // 3
        options["selection"] = Selection(
            num_candidate=candidates, k_selected=candidates // 2, point=point
        )
    held = [tiles(w) for w in weights]
    out, mask = masked_mlp(x, *held, rows=rows, implementation=implementation, **options)
    wanted, used = masked_mlp(x, *(w[rows] for w in weights), implementation="xla", **options)
    atol = tolerance(1024, 300, "float32")
    np.testing.assert_allclose(np.asarray(out), np.asarray(wanted), rtol=0, atol=atol)
    assert (mask is None) == (used is None)
    if mask is not None and used is not None:
        assert (np.asarray(mask) == np.asarray(used)).all()


@pytest.mark.parametrize(
    ("point", "keep"),
    [
        *((POINTS[0], keep) for keep in (0, 20, 290)),
        (POINTS[1], 20),
        *(pytest.param(POINTS[1], keep, marks=pytest.mark.slow) for keep in (0, 290)),
    ],
)
def test_weights_kept_as_tiles_are_read_in_rows_or_blocks(point: str, keep: int) -> None:
    x, *weights = inputs(2, 1, 1024, 300, "float32")
    selection = Selection(num_candidate=300, k_selected=keep, point=point)
    options: dict[str, Any] = {"activation": "silu", "selection": selection}
    held = [tiles(w) for w in weights]
    out, mask = masked_mlp(x, *held, implementation="pallas_interpret", **options)
    wanted, used = masked_mlp(x, *weights, implementation="xla", **options)
    atol = tolerance(1024, 300, "float32")
    np.testing.assert_allclose(np.asarray(out), np.asarray(wanted), rtol=0, atol=atol)
    assert mask is not None and (np.asarray(mask) == np.asarray(used)).all()


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(
    ("choice", "activation"),
    [
        *((choice, "relu") for choice in ("all", "given", "scored")),
        ("all", "gelu"),
        *(pytest.param(choice, "gelu", marks=pytest.mark.slow) for choice in ("given", "scored")),
    ],
)
def test_a_layer_without_a_gate(choice: str, activation: str, implementation: str) -> None:
    x, _, up, down = inputs(2, 1, 24, 150, "float32")
    options: dict[str, Any] = {"activation": activation, "implementation": implementation}
    if choice == "given":
        options["given"] = random_mask(2, 1, 150, 60)
    elif choice == "scored":
        options["selection"] = Selection(num_candidate=100, k_selected=30)
    if implementation == "xla_gathered":
        options["selection"] = Selection(num_candidate=150, k_selected=60)
    out, mask = masked_mlp(x, None, up, down, **options)
    h = OPENED[activation](np.asarray(x, np.float64) @ np.asarray(up, np.float64).T)
    on = np.ones(h.shape, bool) if mask is None else np.asarray(mask)
    if choice == "scored" and implementation != "xla_gathered":
        loud = np.abs(h[..., 50:])
        assert (on[..., 50:] == (loud >= np.sort(loud)[..., -30:-29])).all() and on[..., :50].all()
    wanted = np.where(on, h, 0) @ np.asarray(down, np.float64)
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=0, atol=tolerance(24, 150, "float32"))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_has_the_dtype_of_x(dtype: str, implementation: str) -> None:
    x, *weights = inputs(2, 1, 8, 16, "float32")
    selection = Selection(num_candidate=16, k_selected=4)
    options: dict[str, Any] = {"activation": "silu", "selection": selection}
    x = x.astype(dtype)
    out, _ = masked_mlp(x, *weights, implementation=implementation, **options)
    assert out.dtype == x.dtype


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_shared_choice_is_made_for_every_step(by_rows: bool) -> None:
    """Three steps use the channels of three choices, more than any one of them has."""
    x, *weights = inputs(2, 3, 1024, 300, "float32")
    rows = jnp.arange(0, 300, 2, dtype=jnp.int32) if by_rows else None
    selection = Selection(num_candidate=100, k_selected=10, shared=True)
    options: dict[str, Any] = {"activation": "silu", "selection": selection, "rows": rows}
    held = [tiles(w) for w in weights]
    out, mask = masked_mlp(x, *held, implementation="pallas_interpret", **options)
    wanted, used = masked_mlp(x, *held, implementation="xla", **options)
    assert mask is not None and (np.asarray(mask) == np.asarray(used)).all()
    assert len(np.unique(np.asarray(mask), axis=1)[0]) == 3
    atol = tolerance(1024, 300, "float32")
    np.testing.assert_allclose(np.asarray(out), np.asarray(wanted), rtol=0, atol=atol)
