"""The copy of chosen rows: every implementation against NumPy indexing, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.gather_rows import gather_all, gather_rows, tpu

# Those for matrices of any shape.
PLAIN = ("xla", "host")
ROWS = [[], [0], [4, 0, 2], [1, 1, 1], list(range(7)), list(range(6, -1, -1))]


def matrix(dtype: str, width: int = 5) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((7, width))
    return np.asarray(jnp.asarray(values, jnp.dtype(dtype)))


@pytest.mark.parametrize("implementation", [None, *PLAIN])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_in_the_order_asked_for(
    rows: list[int], dtype: str, implementation: str | None
) -> None:
    w = matrix(dtype)
    out = gather_rows(jnp.asarray(w), jnp.asarray(rows, jnp.int32), implementation)
    assert isinstance(out, jax.Array)
    assert out.dtype == w.dtype
    assert np.array_equal(np.asarray(out), w[np.asarray(rows, int)])


@pytest.mark.parametrize("implementation", PLAIN)
def test_the_copy_outlives_its_source(implementation: str) -> None:
    w = jnp.asarray(matrix("float32", width=64))
    wanted = np.asarray(w)[[3, 1]].copy()
    out = gather_rows(w, jnp.array([3, 1]), implementation)
    w.delete()
    assert np.array_equal(np.asarray(out), wanted)


def test_under_jit_rows_are_taken_by_xla() -> None:
    w, rows = matrix("float32"), [5, 2]
    out = jax.jit(gather_rows)(w, jnp.asarray(rows))
    assert np.array_equal(np.asarray(out), w[rows])
    with pytest.raises(ValueError, match="'host' needs a concrete array"):
        jax.jit(lambda w: gather_rows(w, jnp.asarray(rows), "host"))(w)


def test_arrays_on_several_devices_are_taken_by_xla() -> None:
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    w = matrix("float32", width=6)
    sharded = jax.device_put(w, spec)
    out = gather_rows(sharded, jnp.array([5, 2]))
    assert np.array_equal(np.asarray(out), w[[5, 2]])
    with pytest.raises(ValueError, match="on one CPU device"):
        gather_rows(sharded, jnp.array([5, 2]), "host")


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast' is unknown: use one of .*xla.*host"):
        gather_rows(jnp.zeros((2, 2)), jnp.array([0]), "fast")


@pytest.mark.parametrize("implementation", [None, *PLAIN])
def test_many_matrices_at_once(implementation: str | None) -> None:
    weights = [matrix("float32"), matrix("bfloat16", 3), matrix("float32", 1)]
    rows = [[6, 0], [], [2, 2, 5]]
    out = gather_all(
        [jnp.asarray(w) for w in weights],
        [jnp.asarray(r, jnp.int32) for r in rows],
        implementation,
    )
    for array, w, r in zip(out, weights, rows, strict=True):
        assert array.dtype == w.dtype
        assert np.array_equal(np.asarray(array), w[np.asarray(r, int)])
    assert gather_all([], [], implementation) == []


@pytest.mark.parametrize(("dtype", "tiles"), [("float32", 8), ("float32", 16), ("bfloat16", 16)])
@pytest.mark.parametrize("count", [0, 1, 128, 129, 300])
def test_rows_kept_as_tiles_are_copied_within_the_device(
    count: int, dtype: str, tiles: int
) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((300, tiles, 128)), jnp.dtype(dtype))
    rows = jnp.asarray(rng.permutation(300)[:count], jnp.int32)
    out = gather_rows(w, rows, "pallas_interpret")
    assert out.dtype == w.dtype and np.array_equal(np.asarray(out), np.asarray(w)[rows])


def test_the_copies_race_with_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    w = jnp.arange(300 * 8 * 128, dtype=jnp.float32).reshape(300, 8, 128)
    rows = jnp.asarray(np.random.default_rng(0).permutation(300)[:140], jnp.int32)
    out = tpu.gather(w, rows, pltpu.InterpretParams(detect_races=True))
    assert np.array_equal(np.asarray(out), np.asarray(w)[rows])
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "w", [jnp.zeros((4, 8)), jnp.zeros((4, 4, 128)), jnp.zeros((4, 8, 128), jnp.bfloat16)]
)
def test_rows_that_are_not_whole_tiles_are_refused(w: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"whole tiles \[F,D/128,128\], got"):
        gather_rows(w, jnp.array([1]), "pallas_interpret")


@pytest.mark.parametrize("implementation", [None, *PLAIN, "pallas_interpret"])
def test_rows_outside_the_matrix_are_the_nearest_inside(implementation: str | None) -> None:
    w = jnp.arange(3.0)[:, None, None] * jnp.ones((1, 8, 128))
    rows = jnp.array([3, -1, 1, 500, -7], jnp.int32)
    out = gather_rows(w, rows, implementation)
    assert np.asarray(out)[:, 0, 0].tolist() == [2, 0, 1, 2, 0]


@pytest.mark.parametrize("implementation", [None, *PLAIN, "pallas_interpret"])
def test_rows_that_are_no_list_of_integers_are_refused(implementation: str | None) -> None:
    w = jnp.ones((3, 8, 128))
    for rows in (jnp.array([1.0]), jnp.ones((3,), bool), jnp.array([[1, 2]])):
        with pytest.raises(ValueError, match=r"needs rows \[R\] of integers, got (float|bool|int)"):
            gather_rows(w, rows, implementation)
