"""The feed-forward layer without a gate, with a bias: every implementation against NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masked_mlp import IMPLEMENTATIONS, Selection, masked_mlp

# What runs without an accelerator.
HERE = [name for name in IMPLEMENTATIONS if name not in ("pallas_tpu", "pallas_gpu")]
B, T, D, F, C, K = 2, 2, 128, 150, 60, 20
EPS = float(np.finfo(np.float32).eps)


def inputs(tiles: bool = False) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x [B, T, D], up, down [F, D] or as tiles of a TPU's memory, bias [F]."""
    rng = np.random.default_rng(0)
    width = 8 * 128 if tiles else D
    x, bias = rng.standard_normal((B, T, width)), rng.standard_normal(F)
    up, down = rng.standard_normal((2, F, width)) / math.sqrt(width)
    if tiles:
        up, down = (w.reshape(F, 8, 128) for w in (up, down))
    made = (jnp.asarray(array, jnp.float32) for array in (x, up, down, bias))
    return tuple(made)  # type: ignore[return-value]


def oracle(x: Any, up: Any, down: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    """h [B, T, F] and down [F, D] in float64."""
    x, bias = np.asarray(x, np.float64), np.asarray(bias, np.float64)
    up, down = (np.asarray(w, np.float64).reshape(len(w), -1) for w in (up, down))
    return np.maximum(x @ up.T + bias, 0), down


def close(found: Any, wanted: np.ndarray) -> None:
    # Two products chained, of values of order ten at most.
    atol = 10 * EPS * (math.sqrt(8 * 128) + math.sqrt(F))
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", HERE)
def test_all_given_and_chosen_channels(implementation: str) -> None:
    x, up, down, bias = inputs()
    h, wide = oracle(x, up, down, bias)
    options = {"activation": "relu", "up_bias": bias, "implementation": implementation}
    out, mask = masked_mlp(x, None, up, down, **options)
    assert mask is None
    close(out, h @ wide)
    given = jnp.asarray(np.random.default_rng(1).random((B, T, F)) < 0.4)
    out, used = masked_mlp(x, None, up, down, given=given, **options)
    assert used is not None and (np.asarray(used) == np.asarray(given)).all()
    close(out, np.where(given, h, 0) @ wide)
    chosen = Selection(num_candidate=C, k_selected=K)
    out, used = masked_mlp(x, None, up, down, selection=chosen, **options)
    assert used is not None
    used = np.asarray(used)
    assert used[..., : F - C].all() and (used[..., F - C :].sum(axis=-1) == K).all()
    least = np.where(used, h, np.inf)[..., F - C :].min(axis=-1)
    most = np.where(used, -np.inf, h)[..., F - C :].max(axis=-1)
    assert (least >= most - 1e-5).all()
    close(out, np.where(used, h, 0) @ wide)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_the_bias_of_rows_that_are_fetched_by_index(implementation: str) -> None:
    x, up, down, bias = inputs(tiles=True)
    rows = jnp.asarray(np.random.default_rng(2).permutation(F)[:30].astype(np.int32))
    options = {"activation": "relu", "up_bias": bias, "implementation": implementation}
    out, _ = masked_mlp(x, None, up, down, rows=rows, **options)
    h, wide = oracle(x, up, down, bias)
    close(out, h[..., rows] @ wide[np.asarray(rows)])


def test_a_bias_that_does_not_fit_is_refused() -> None:
    x, up, down, bias = inputs()
    with pytest.raises(ValueError, match=r"up_bias \[F\] with F = 150, got \(149,\)"):
        masked_mlp(x, None, up, down, activation="relu", up_bias=bias[1:])
    with pytest.raises(ValueError, match="takes up_bias without a gate only"):
        masked_mlp(x, up, up, down, activation="relu", up_bias=bias)
