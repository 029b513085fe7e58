"""The TPU kernels interpreted on a CPU: equal to the reference, without races, frugal with bytes.

Whether they compile for a TPU is checked in tests/aot.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.row_products import reference, tpu

# Roundings that a sum of products may be off by, relative to the size of its terms.
EPS = {"float32": float(np.finfo(np.float32).eps), "bfloat16": 2.0**-8}
# D, F, dtype, what is fetched, and the form the matrix is kept in.
CASES = [
    (40, 300, "float32", "blocks", "flat"),
    (576, 1536, "float32", "blocks", "flat"),
    (576, 1536, "bfloat16", "blocks", "flat"),
    (8, 1, "bfloat16", "blocks", "flat"),
    (1024, 300, "float32", "blocks", "tiled"),
    (2048, 200, "bfloat16", "rows", "tiled"),
    (1024, 1, "float32", "rows", "tiled"),
]
SIZES = {"blocks": tpu.LANES, "rows": 1}
PLAIN: dict[str, Any] = {form: {"size": n, "interpret": True} for form, n in SIZES.items()}
COUNTS = ("none", "one", "some", "all")


def matrix(D: int, F: int, dtype: str, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal((F, D)) / math.sqrt(D)
    return jnp.asarray(values, jnp.dtype(dtype))


def drawn(units: int, counts: str) -> tuple[jax.Array, jax.Array]:
    """A list of distinct units and how many of them count."""
    order = np.random.default_rng(1).permutation(units)
    valid = {"none": 0, "one": 1, "some": max(1, units * 2 // 5), "all": units}[counts]
    return jnp.asarray(order, jnp.int32), jnp.asarray([valid], jnp.int32)


def channels(units: jax.Array, count: jax.Array, size: int, F: int) -> np.ndarray:
    """The channel of every lane of the listed units, -1 for a lane that holds none."""
    lanes = (np.asarray(units)[:, None] * size + np.arange(size)).reshape(-1)
    lanes[int(count[0]) * size :] = -1
    return np.where(lanes < F, lanes, -1)


def case(D: int, F: int, dtype: str, counts: str, form: str, kept: str) -> tuple[Any, ...]:
    w = matrix(D, F, dtype)
    units, count = drawn(-(-F // SIZES[form]), counts)
    held = w if kept == "flat" else tpu.tiled(w)
    return w, held, units, count, channels(units, count, SIZES[form], F)


def products() -> list[Any]:
    """Every case with every count; with many vectors one count, the others as slow repetitions."""
    found = []
    for *case, form, kept in CASES:
        for n in (1, 64) if form == "blocks" else (3,):
            for counts in COUNTS:
                slow = n == 64 and counts != "some"
                values = (*case, form, kept, n, counts)
                found.append(pytest.param(*values, marks=[pytest.mark.slow] if slow else []))
    return found


@pytest.mark.parametrize(("D", "F", "dtype", "form", "kept", "vectors", "counts"), products())
def test_interpreted_kernels_equal_the_reference(
    D: int, F: int, dtype: str, form: str, kept: str, counts: str, vectors: int
) -> None:
    w, held, units, count, lanes = case(D, F, dtype, counts, form, kept)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((vectors, D)), w.dtype)
    (h,) = tpu.expand(x, [held], units, count, **PLAIN[form])
    listed = jnp.asarray(np.maximum(lanes, 0))[None]
    wanted = reference.expand_rows(x.astype(jnp.float32), w.astype(jnp.float32), listed)
    wanted = np.where(lanes >= 0, np.asarray(wanted), 0)
    valid = np.arange(lanes.size) // (lanes.size // units.size) < int(count[0])
    # A lane of a listed block beyond the matrix holds anything.
    compared = (lanes >= 0) | ~valid
    error = np.abs(np.asarray(h)[:, compared] - wanted[:, compared])
    assert h.dtype == jnp.float32 and error.max(initial=0) <= 8 * EPS["float32"] * math.sqrt(D)

    values = np.where(lanes >= 0, rng.standard_normal((vectors, lanes.size)), 0)
    hidden = jnp.asarray(values, w.dtype)
    y = tpu.contract(hidden, held, units, count, **PLAIN[form])
    wanted = reference.contract_rows(hidden.astype(jnp.float32), w.astype(jnp.float32), listed)
    error = np.abs(np.asarray(y) - np.asarray(wanted)).max(initial=0)
    assert y.shape == (vectors, D) and error <= 8 * EPS["float32"] * math.sqrt(max(F, 1))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("D", "F", "form", "kept"),
    [(64, 300, "blocks", "flat"), (1024, 140, "blocks", "tiled"), (1024, 140, "rows", "tiled")],
)
def test_no_race_and_nothing_read_that_was_not_written(
    D: int, F: int, form: str, kept: str, counts: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a TPU: copies arrive when waited for, fresh memory holds NaN."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    poisoned: dict[str, Any] = {"size": SIZES[form], "interpret": params}
    w, held, units, count, lanes = case(D, F, "float32", counts, form, kept)
    x = jnp.ones((2, D), w.dtype)
    found = tpu.expand(x, [held, held], units, count, **poisoned)
    plain = tpu.expand(x, [held, held], units, count, **PLAIN[form])
    for a, b in zip(found, plain, strict=True):
        mine, other = np.asarray(a)[:, lanes >= 0], np.asarray(b)[:, lanes >= 0]
        np.testing.assert_allclose(mine, other, rtol=0, atol=8 * EPS["float32"] * math.sqrt(D))
    h = jnp.where(jnp.asarray(lanes) >= 0, jnp.ones((2, lanes.size)), 0.0)
    y = np.asarray(tpu.contract(h, held, units, count, **poisoned))
    other = np.asarray(tpu.contract(h, held, units, count, **PLAIN[form]))
    np.testing.assert_allclose(y, other, rtol=0, atol=8 * EPS["float32"] * math.sqrt(F))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("form", "kept"), [("blocks", "flat"), ("blocks", "tiled"), ("rows", "tiled")]
)
def test_what_is_not_listed_is_not_read(form: str, kept: str) -> None:
    D, F = 1024, 512
    w, held, units, count, lanes = case(D, F, "float32", "some", form, kept)
    spoilt = w.at[np.setdiff1d(np.arange(F), lanes)].set(jnp.nan)
    spoilt = spoilt if kept == "flat" else tpu.tiled(spoilt)
    x, h = jnp.ones((2, D)), jnp.ones((2, lanes.size))
    made = []
    for m in (spoilt, held):
        made.append(tpu.expand(x, [m], units, count, **PLAIN[form])[0])
        made.append(tpu.contract(h, m, units, count, **PLAIN[form]))
    for a, b in zip(made[:2], made[2:], strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("form", "kept"), [("blocks", "flat"), ("blocks", "tiled"), ("rows", "tiled")]
)
def test_a_count_above_the_list_is_the_list(form: str, kept: str) -> None:
    """200 would have rows copied from places that the list does not have."""
    _, held, units, _, lanes = case(1024, 300, "float32", "all", form, kept)
    units, lanes = units[:2], lanes[: 2 * SIZES[form]]
    x, h = jnp.ones((2, 1024)), jnp.ones((2, lanes.size))
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    made = []
    for count, interpret in ((2, True), (200, True), (200, params)):
        options: dict[str, Any] = {"size": SIZES[form], "interpret": interpret}
        counts = jnp.array([count], jnp.int32)
        hidden = tpu.expand(x, [held], units, counts, **options)[0]
        y = tpu.contract(h, held, units, counts, **options)
        made.append((np.asarray(hidden)[:, lanes >= 0], np.asarray(y)))
    for found in made[1:]:
        for a, b in zip(found, made[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=8 * EPS["float32"] * math.sqrt(1024))


@pytest.mark.parametrize(
    ("w", "vectors", "reason"),
    [
        (jax.ShapeDtypeStruct((256, 512), jnp.float16), 1, "float16, and they read bfloat16"),
        (jax.ShapeDtypeStruct((256, 512), jnp.float32), 65, "65 vectors are more than the 64"),
        (jax.ShapeDtypeStruct((256, 9, 64), jnp.float32), 1, "not whole tiles of 8 x 128"),
        (jax.ShapeDtypeStruct((256, 8, 128), jnp.bfloat16), 1, "not whole tiles of 16 x 128"),
        (jax.ShapeDtypeStruct((256, 16, 128), jnp.bfloat16), 64, None),
        (jax.ShapeDtypeStruct((3, 7), jnp.float32), 1, None),
    ],
)
def test_what_they_cannot_serve_is_said(w: Any, vectors: int, reason: str | None) -> None:
    found = tpu.obstacle(w, vectors)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "rows"])
@pytest.mark.parametrize(("D", "F"), [(4096, 14336), (8192, 28672)], ids=["8B", "70B"])
def test_matrices_of_real_models(D: int, F: int, form: str) -> None:
    """Every value a small whole number, so that sums are exact whatever their order.

    1,024 channels spread over the whole matrix: an interpreted row takes milliseconds.
    """
    size, rng = SIZES[form], np.random.default_rng(0)
    w = rng.integers(-2, 3, (F, D), np.int8).astype(jnp.bfloat16)
    held = tpu.tiled(jnp.asarray(w))
    units, count = drawn(F // size, "all")
    count = jnp.minimum(count, 1024 // size)
    units = units[: int(count[0]) + 3]
    lanes = channels(units, count, size, F)
    x, h = (rng.integers(-2, 3, (2, n), np.int8).astype(jnp.bfloat16) for n in (D, lanes.size))
    on = lanes >= 0
    rows = w[lanes[on]].astype(np.float32)
    (found,) = tpu.expand(jnp.asarray(x), [held], units, count, **PLAIN[form])
    wanted = x.astype(np.float32) @ rows.T
    assert (np.asarray(found)[:, on] == wanted).all() and not np.asarray(found)[:, ~on].any()
    hidden = np.where(on, h.astype(np.float32), 0)
    y = tpu.contract(jnp.asarray(hidden, jnp.bfloat16), held, units, count, **PLAIN[form])
    assert (np.asarray(y) == hidden[:, on] @ rows).all()
