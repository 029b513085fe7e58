"""Memory of packed rows: reused for the next prompt, and never while anybody can still read it."""

import gc
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gather_rows import gather_all, gather_rows, memory

W = np.arange(300 * 64, dtype=np.float32).reshape(300, 64)


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "SMALL_BYTES", 0)
    gc.collect()
    memory.release()
    yield
    memory.release()


def packed(first: int) -> jax.Array:
    return gather_rows(jnp.asarray(W), jnp.arange(first, first + 100), "host")


def test_rows_that_are_gone_leave_their_memory_to_the_next() -> None:
    rows = packed(0)
    size = rows.nbytes
    assert memory.idle_bytes() == 0
    del rows
    gc.collect()
    assert memory.idle_bytes() == size
    again = packed(7)
    assert memory.idle_bytes() == 0
    np.testing.assert_array_equal(again, W[7:107])


@pytest.mark.parametrize(
    "derive",
    [
        lambda rows: rows.reshape(-1),
        lambda rows: np.asarray(rows)[2:5],
        lambda rows: rows[3:9],
        lambda rows: jax.jit(lambda x: x)(rows),
        lambda rows: jax.device_put(rows, jax.devices()[0]),
    ],
    ids=["reshape", "numpy", "slice", "jit", "put"],
)
def test_what_was_made_from_rows_outlives_them(derive) -> None:
    rows = packed(0)
    made = derive(rows)
    wanted = np.array(made)
    del rows
    gc.collect()
    others = [packed(first) for first in (50, 150, 200)]
    np.testing.assert_array_equal(np.asarray(made), wanted)
    del others


def test_a_running_computation_keeps_its_rows() -> None:
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda i, y: y + x, x * 0))
    jax.block_until_ready(slow(packed(0)))
    gc.collect()
    out = slow(packed(100))
    gc.collect()
    others = [packed(first) for first in (0, 50, 200)]
    wanted = W[100:200] * np.float32(3000)
    np.testing.assert_allclose(out, wanted, rtol=3000 * np.finfo(np.float32).eps)
    del others


def test_matrices_of_one_call_share_a_block_until_the_last_is_gone() -> None:
    w = jnp.asarray(W)
    first, second = gather_all([w, w], [jnp.arange(100), jnp.arange(40, 140)], "host")
    del first
    gc.collect()
    assert memory.idle_bytes() == 0
    np.testing.assert_array_equal(second, W[40:140])
    size = 2 * second.nbytes
    del second
    gc.collect()
    assert memory.idle_bytes() == size


def test_a_block_a_little_too_large_serves_whole() -> None:
    rows = packed(0)
    size = rows.nbytes
    del rows
    gc.collect()
    fewer = gather_rows(jnp.asarray(W), jnp.arange(90), "host")
    assert memory.idle_bytes() == 0
    np.testing.assert_array_equal(fewer, W[:90])
    del fewer
    gc.collect()
    assert memory.idle_bytes() == size


def test_a_block_far_too_large_is_freed() -> None:
    rows = packed(0)
    del rows
    gc.collect()
    other = gather_rows(jnp.asarray(W), jnp.arange(10), "host")
    assert memory.idle_bytes() == 0
    np.testing.assert_array_equal(other, W[:10])


def test_rows_stay_on_the_device_of_the_weights() -> None:
    device = jax.devices()[3]
    rows = gather_rows(jax.device_put(W, device), jnp.arange(5), "host")
    assert rows.devices() == {device}


def test_small_rows_come_from_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALL_BYTES", 2**23)
    rows = packed(3)
    np.testing.assert_array_equal(rows, W[3:103])
    del rows
    gc.collect()
    assert memory.idle_bytes() == 0
