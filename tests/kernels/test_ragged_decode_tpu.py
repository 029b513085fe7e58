"""The TPU kernel of ragged decode attention, interpreted on a CPU: right, without races, frugal.

Whether it compiles for a TPU is checked in tests/aot.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.ragged_decode import ring, tpu
from tests.kernels.ragged_ranges import (
    FILLS,
    FORMS,
    B,
    E,
    G,
    K,
    M,
    aligned,
    as_bits,
    oracle,
    problem,
)

EPS = 2.0**-23
ROUNDED = 2.0**-8  # what one rounding to bfloat16 may change


@functools.cache
def interpreted(window: int | None, softcap: float | None) -> Any:
    """The kernel, compiled once for all fills of a form."""
    options: dict[str, Any] = {"window": window, "softcap": softcap, "interpret": True}
    return jax.jit(lambda *arrays: tpu.ragged_decode(*arrays, **options))


@pytest.mark.parametrize(
    ("H", "dtype", "window", "softcap"),
    # The plain form does nothing that the others do not.
    [pytest.param(*FORMS[0], marks=pytest.mark.slow), *FORMS[1:]],
)
def test_the_interpreted_kernel_equals_the_oracle(
    H: int, dtype: str, window: int | None, softcap: float | None
) -> None:
    for lengths, tails in FILLS:
        arrays = problem(lengths, tails, H, dtype)
        out = interpreted(window, softcap)(*as_bits(arrays))
        wanted, size = oracle(arrays, window, softcap)
        # Sums of H products, then of all entries; weights and the result are rounded to bfloat16.
        terms = (H + max(lengths) + M) * EPS + (2 * ROUNDED if dtype == "bfloat16" else 0)
        assert out.dtype == arrays[0].dtype and out.shape == wanted.shape
        error = np.abs(np.asarray(out, np.float64) - wanted)
        assert (error <= terms * size).all(), (lengths, (error / np.maximum(size, EPS)).max())


def test_no_race_and_nothing_read_that_was_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    """As on a TPU: copies arrive when waited for, fresh memory holds NaN."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays = problem(*FILLS[2], 64, "float32")
    out = tpu.ragged_decode(*arrays, window=2500, interpret=params)
    wanted, size = oracle(arrays, 2500, None)
    assert (np.abs(np.asarray(out) - wanted) <= (64 + 512 + M) * EPS * size).all()
    assert "RACE" not in "".join(capfd.readouterr())


def test_the_sums_of_a_head_depend_on_nothing_but_its_own_entries() -> None:
    H, dtype, window, softcap = FORMS[1]
    run = interpreted(window, softcap)
    lengths, others = [300, 20, 700, 45], [300, 513, 0, 45]
    first, other = (
        np.asarray(run(*as_bits(problem(n, [30, 5], H, dtype, order))), np.float32)
        for n, order in ((lengths, [0, 1, 2, 3]), (others, [3, 1, 0, 2]))
    )
    for b, k in ((0, 0), (1, 1)):
        of_head = (b, 0, slice(k * G, (k + 1) * G))
        assert first[of_head].any()
        assert (first[of_head] == other[of_head]).all()


class Counted:
    """A copy whose bytes are counted when it starts and when it is waited for."""

    moved = {"start": 0, "wait": 0}

    def __init__(self, source: Any, target: Any, sem: Any) -> None:
        self._copy = pltpu.make_async_copy(source, target, sem)
        self._bytes = target.size * target.dtype.itemsize

    def start(self) -> None:
        jax.debug.callback(lambda: self._add("start"))
        self._copy.start()

    def wait(self) -> None:
        jax.debug.callback(lambda: self._add("wait"))
        self._copy.wait()

    def _add(self, name: str) -> None:
        self.moved[name] += self._bytes


@pytest.mark.parametrize("window", [None, 10**6])
def test_only_what_is_occupied_is_fetched(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting:
        """The module with its copies counted."""

        make_async_copy = staticmethod(Counted)

        def __getattr__(self, name: str) -> Any:
            return getattr(pltpu, name)

    monkeypatch.setattr(ring, "pltpu", Counting())
    run = jax.jit(lambda *a: tpu.ragged_decode(*a, window=window, interpret=True))
    for lengths, tails in ([410, 290, 130, 700], [200, 33]), *FILLS[:2]:
        monkeypatch.setattr(Counted, "moved", {"start": 0, "wait": 0})
        jax.block_until_ready(run(*problem(lengths, tails, 64, "bfloat16")))
        jax.effects_barrier()
        row = 2 * 64 * 2
        rows = sum(map(aligned, lengths)) + K * sum(map(aligned, tails))
        blocks = sum(-(-n // ring.BLOCK) for n in lengths)
        positions = 0 if window is None else blocks * ring.POSITION_ROWS * ring.LANES * 4
        assert Counted.moved == {"start": rows * row + positions} | {"wait": rows * row + positions}
        if lengths == [410, 290, 130, 700]:  # about a twentieth of a prompt of 8k tokens
            occupied = (sum(lengths) + K * sum(tails)) * row
            assert Counted.moved["start"] - positions <= 1.05 * occupied
            assert positions <= 0.05 * occupied


def test_the_cost_estimate_is_what_everything_takes() -> None:
    arrays = problem(*FILLS[0], 64, "bfloat16")
    q = arrays[0].reshape(B * K, G, 64)
    cost = tpu.cost(q, arrays[1], arrays[5])
    rows = E + B * K * M
    assert cost.flops == 4 * G * 64 * rows and cost.transcendentals == G * rows
    assert cost.bytes_accessed == rows * 2 * 64 * 2 + 2 * q.nbytes


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"entries": shaped(64, 128, dtype=jnp.float32)}, None),
        ({"q": shaped(1, 2, 4, 64)}, "2 queries a row, and it serves one"),
        ({"q": shaped(1, 1, 4, 64, dtype=jnp.float16)}, "the queries is float16"),
        ({"entries": shaped(64, 128, dtype=jnp.uint16)}, "the pool is uint16"),
        ({"tail_k": shaped(2, 32, 64, dtype=jnp.int8)}, "the tail is int8"),
        ({"q": shaped(1, 1, 4, 80), "entries": shaped(64, 160)}, "a pool row of 160 values"),
        ({"entries": shaped(72, 128)}, "the pool has 72 rows: round them up"),
        ({"entries": shaped(0, 128)}, "the pool has 0 rows"),
        ({"tail_k": shaped(1, 2, 20, 64)}, "the tail has 20 slots: round its capacity up"),
        ({"q": shaped(1, 1, 5, 64)}, "5 query heads cannot share 2 KV heads"),
    ],
)
def test_what_it_cannot_serve_is_said(change: dict[str, Any], reason: str | None) -> None:
    given = {
        "q": shaped(1, 1, 4, 64),
        "entries": shaped(64, 128),
        "tail_k": shaped(1, 2, 32, 64),
        "starts": shaped(1, 2, dtype=jnp.int32),
    }
    found = tpu.obstacle(**given | change)
    assert found is None if reason is None else found is not None and reason in found


def test_what_it_cannot_serve_is_refused() -> None:
    arrays = list(problem(*FILLS[0], 64, "float32"))
    arrays[1] = arrays[1][:-1]
    with pytest.raises(NotImplementedError, match="cannot run: the pool has 2047 rows"):
        tpu.ragged_decode(*arrays, interpret=True)
