"""The masked feed-forward layer: every implementation against plain NumPy in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masked_mlp import (
    ACTIVATIONS,
    IMPLEMENTATIONS,
    gated_channels,
    masked_mlp,
    project,
    project_gathered,
)

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


def inputs(B: int, T: int, D: int, F: int, dtype: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
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


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("share", ["none", "one", "half", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_of_a_chosen_mask(
    shape: tuple[int, int, int, int], share: str, dtype: str, implementation: str | None
) -> None:
    B, T, D, F = shape
    weights = inputs(B, T, D, F, dtype)
    active = {"none": 0, "one": min(1, F), "half": F // 2, "all": F}[share]
    mask = random_mask(B, T, F, active)
    call = functools.partial(
        masked_mlp,
        activation="silu",
        select=lambda h: mask,
        active=active,
        implementation=implementation,
    )
    out, used = jax.jit(call)(*weights)
    assert (out.dtype, out.shape) == (weights[0].dtype, (B, T, D))
    assert used is not None and (np.asarray(used) == np.asarray(mask)).all()
    wanted = oracle(*weights, "silu", np.asarray(mask))
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted, rtol=0, atol=tolerance(D, F, dtype)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    weights = inputs(2, 3, 8, 16, "float32")
    call = functools.partial(
        masked_mlp, activation=activation, select=lambda h: None, active=16, implementation=None
    )
    out, mask = call(*weights)
    assert mask is None
    wanted = oracle(*weights, activation, True)
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=0, atol=tolerance(8, 16, "float32"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_choice_sees_the_channels(implementation: str) -> None:
    weights = inputs(2, 1, 8, 16, "float32")
    h = gated_channels(*weights[:3], "silu")

    def loudest(seen: jax.Array) -> jax.Array:
        assert (np.asarray(seen) == np.asarray(h)).all()
        return jnp.abs(seen) >= jax.lax.top_k(jnp.abs(seen), 4)[0][..., 3:]

    out, mask = masked_mlp(
        *weights, activation="silu", select=loudest, active=4, implementation=implementation
    )
    assert mask is not None and (np.asarray(mask).sum(axis=-1) == 4).all()
    wanted = oracle(*weights, "silu", np.asarray(mask))
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=0, atol=tolerance(8, 16, "float32"))


def test_a_mask_shared_by_the_batch_broadcasts() -> None:
    h, down = jnp.ones((3, 2, 5)), jnp.eye(5)
    shared = jnp.array([[[True, False, True, False, False]] * 2])
    wanted = [[[1.0, 0.0, 1.0, 0.0, 0.0]] * 2] * 3
    assert project(h, down, shared).tolist() == wanted
    assert project_gathered(h, down, jnp.broadcast_to(shared, h.shape), 2).tolist() == wanted
    assert project_gathered(h, down, shared, 2).tolist() == wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_channel_cannot_be_heard(bad: float) -> None:
    h = jnp.array([[[1.0, bad, 2.0]]])
    mask = jnp.array([[[True, False, True]]])
    down = jnp.ones((3, 2))
    assert project(h, down, mask).tolist() == [[[3.0, 3.0]]]
    assert project_gathered(h, down, mask, 2).tolist() == [[[3.0, 3.0]]]


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ([(1, 1, 8), (4, 8), (4, 8), (5, 8)], "got .*5, 8"),
        ([(1, 1, 7), (4, 8), (4, 8), (4, 8)], "got .*1, 1, 7"),
    ],
)
def test_shapes_that_disagree_are_refused(shapes: list[Any], complaint: str) -> None:
    arrays = [jnp.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=complaint):
        masked_mlp(*arrays, activation="silu", select=lambda h: None, active=4)


def test_an_unknown_implementation_is_refused() -> None:
    arrays = inputs(1, 1, 8, 4, "float32")
    with pytest.raises(ValueError, match="'fast' is unknown: use one of .*masked.*gathered"):
        masked_mlp(
            *arrays, activation="silu", select=lambda h: None, active=4, implementation="fast"
        )
