"""The GPU form of products with chosen rows, on a CPU: results, races, refusals.

The kernel runs in Mosaic GPU's interpreter, which looks for races and starts buffers as NaN; rows
that are not in the list are NaN too, so that reading one shows. Compiling for a real GPU is
tests/aot/test_gpu.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.row_products import gpu

pytestmark = pytest.mark.mosaic_gpu
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    interpreted: Any = plgpu  # what jax 0.10 lacks, and its types do not know
    params = interpreted.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with interpreted.force_gpu_interpret_mode(params):
        yield


def problem(
    B: int, D: int, F: int, capacity: int, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x [B, D], h [B, capacity], w [F, D] and a list [1, capacity]; rows not in it are NaN."""
    rng = np.random.default_rng(B * D + F)
    rows = rng.permutation(F)[:capacity]
    w = rng.standard_normal((F, D))
    w[np.setdiff1d(np.arange(F), rows)] = np.nan
    x, h = (jnp.asarray(rng.standard_normal((B, size)), dtype) for size in (D, capacity))
    return x, h, jnp.asarray(w, dtype), jnp.asarray(rows, jnp.int32)[None]


def close(got: jax.Array, left: np.ndarray, right: np.ndarray) -> None:
    """Equal to left @ right within float32 sums of that length, rounded once to the dtype."""
    wanted, magnitude = left @ right, np.abs(left) @ np.abs(right)
    bound = magnitude * (left.shape[1] + 1) * EPS["float32"]
    bound += np.abs(wanted) * EPS[str(got.dtype)]
    assert got.shape == wanted.shape
    assert (np.abs(np.asarray(got, np.float64) - wanted) <= bound).all()


def exact(a: jax.Array) -> np.ndarray:
    return np.asarray(a, np.float64)


@pytest.mark.parametrize("count", [0, 1, 29, 40, None])
@pytest.mark.parametrize(
    ("B", "D", "dtype"), [(1, 576, "bfloat16"), (3, 192, "float32"), (8, 64, "bfloat16")]
)
def test_the_products_are_those_of_the_chosen_rows(
    B: int, D: int, dtype: str, count: int | None
) -> None:
    x, h, w, rows = problem(B, D, 96, 40, dtype)
    counts = None if count is None else jnp.array([count], jnp.int32)
    used = np.where(np.arange(40) < (40 if count is None else count), 1.0, 0.0)
    taken = exact(w)[np.asarray(rows[0])] * used[:, None]
    close(gpu.expand_rows(x, w, rows, counts), exact(x), taken.T)
    close(gpu.contract_rows(h, w, rows, counts), exact(h), taken)


@pytest.mark.parametrize("B", [1, 2])
def test_many_programs_and_many_blocks_each(B: int) -> None:
    D, F, capacity = 2048, 1200, 400
    _, h, w, rows = problem(B, D, F, capacity, "bfloat16")
    how = gpu.cut(B, F, D, capacity, 2)
    assert how.splits > 1 and how.tiles > 1 and how.rows > 3 * how.block
    close(gpu.contract_rows(h, w, rows), exact(h), exact(w)[np.asarray(rows[0])])


def test_entries_past_the_count_may_be_anything() -> None:
    _, h, w, rows = problem(2, 64, 96, 40, "float32")
    h, rows = h.at[:, 30:].set(jnp.nan), rows.at[:, 30:].set(-7)
    taken = exact(w)[np.asarray(rows[0, :30])]
    got = gpu.contract_rows(h, w, rows, jnp.array([30], jnp.int32))
    close(got, exact(h[:, :30]), taken)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, w, rows: (jnp.zeros((9, 40)), w, rows), "1 to 8 vectors at a time, got B = 9"),
        (lambda h, w, rows: (h, w.astype(jnp.float16), rows), "float32, got float16"),
        (lambda h, w, rows: (h, w[:, :60], rows), "multiple of 64 weights, got D = 60"),
        (lambda h, w, rows: (h, w, jnp.tile(rows, (2, 1))), "one list for all vectors"),
        (lambda h, w, rows: (h[:, :0], w, rows[:, :0]), "room for a row, got none"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(
    change: Callable[..., tuple[jax.Array, ...]], reason: str
) -> None:
    _, h, w, rows = problem(2, 64, 96, 40, "float32")
    with pytest.raises(NotImplementedError, match=reason):
        gpu.contract_rows(*change(h, w, rows))


def test_an_older_jax_is_refused_for_the_kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, h, w, rows = problem(2, 64, 96, 40, "float32")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match="of jax 0.12 on"):
        gpu.contract_rows(h, w, rows)
    close(gpu.expand_rows(x, w, rows), exact(x), exact(w)[np.asarray(rows[0])].T)
