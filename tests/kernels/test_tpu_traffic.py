"""Bytes that the TPU kernels fetch, against the least possible.

Blocks are counted by walking the grid through the index maps that the kernels use, rows by counting
the copies that an interpreted kernel starts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.row_products import tpu

# D and F of real models; shares of the channels evaluated and projected at ratio 0.5, band 0.1.
MODELS = {"135M": (576, 1536), "8B": (4096, 14336), "70B": (8192, 28672)}
RETAINED, EVALUATED, ACTIVE = 0.45, 0.55, 0.5
WORST = 1.05
BYTES = 2  # of a weight in bfloat16


def blocks_fetched(D: int, units: np.ndarray, count: int) -> int:
    """Bytes of one matrix that the pipeline copies: a block whenever the index map moves on."""
    spec: Any = tpu.block_spec((D,))
    last, total = None, 0
    for i in range(len(units)):
        place = tuple(int(x) for x in spec.index_map(i, units, np.asarray([count])))
        if place != last:
            total += math.prod(spec.block_shape) * BYTES
        last = place
    return total


@pytest.mark.parametrize("model", MODELS)
def test_packed_blocks_fetch_hardly_more_than_the_rows_in_use(model: str) -> None:
    D, F = MODELS[model]
    retained, E, active = (round(share * F) for share in (RETAINED, EVALUATED, ACTIVE))
    on = np.zeros(-(-E // tpu.LANES) * tpu.LANES, bool)
    on[:retained] = True
    on[np.random.default_rng(0).permutation(np.arange(retained, E))[: active - retained]] = True
    used = on.reshape(-1, tpu.LANES).any(axis=1)
    every, listed = np.arange(used.size), np.argsort(~used, kind="stable")
    read = 2 * blocks_fetched(D, every, every.size)
    read += blocks_fetched(D, listed, int(used.sum()))
    # A last block that reaches past the packed rows is counted whole: at most one a matrix.
    partial = 3 * (on.size - E) * D * BYTES
    assert read <= WORST * (2 * E + active) * D * BYTES + partial


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_blocks_beyond_the_count_are_not_fetched(count: int) -> None:
    units = np.random.default_rng(0).permutation(12)
    # With nothing to read the pipeline still fills its buffer once, from the first of the list.
    assert blocks_fetched(64, units, count) == max(count, 1) * tpu.LANES * 64 * BYTES


class Counted:
    """A copy whose starts and waits are counted when they happen, not when they are traced."""

    counts = {"start": 0, "wait": 0}

    def __init__(self, copy: Any) -> None:
        self._copy = copy

    def start(self) -> None:
        jax.debug.callback(lambda: self._add("start"))
        self._copy.start()

    def wait(self) -> None:
        jax.debug.callback(lambda: self._add("wait"))
        self._copy.wait()

    @classmethod
    def _add(cls, name: str) -> None:
        cls.counts[name] += 1


@pytest.mark.parametrize("count", [0, 1, 128, 200, 300])
@pytest.mark.parametrize("matrices", [1, 2])
def test_rows_are_fetched_once_each(
    count: int, matrices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tpu.pltpu.make_async_copy
    monkeypatch.setattr(tpu.pltpu, "make_async_copy", lambda *a: Counted(real(*a)))
    monkeypatch.setattr(Counted, "counts", {"start": 0, "wait": 0})
    w = jnp.ones((320, 8, tpu.LANES))
    rows = jnp.asarray(np.random.default_rng(0).permutation(320)[:300], jnp.int32)
    asked = jnp.asarray([count], jnp.int32)
    jax.block_until_ready(
        tpu.expand(jnp.ones((1, 1024)), [w] * matrices, rows, asked, size=1, interpret=True)
    )
    jax.effects_barrier()
    assert Counted.counts == {"start": count * matrices, "wait": count * matrices}
    tpu.contract(jnp.ones((1, 300)), w, rows, asked, size=1, interpret=True).block_until_ready()
    jax.effects_barrier()
    assert Counted.counts == {"start": count * (matrices + 1), "wait": count * (matrices + 1)}


@pytest.mark.parametrize("matrices", [1, 2])
def test_the_cost_estimate_is_what_a_full_list_takes(matrices: int) -> None:
    D, F, N = 1024, 384, 4
    w = jnp.ones((F, D), jnp.bfloat16)
    cost = tpu.cost([w] * matrices, N, F)
    assert cost.flops == 2 * N * F * D * matrices
    assert cost.bytes_accessed == BYTES * D * (F * matrices + N) + 4 * N * F * matrices
