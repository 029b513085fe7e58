"""Products of groups of vectors, by blocks and ragged: each vector with the matrix of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_products
from kernels_pallas.grouped_products import blocked, reference

E, F, D = 5, 6, 8
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((E, F, D)), jnp.float32)
# Sizes of the groups, and vectors beyond the last.
CASES = {
    "uneven": ([3, 0, 40, 1, 9], 4),
    "one": ([0, 0, 1, 0, 0], 0),
    "none": ([0, 0, 0, 0, 0], 7),
    "last only": ([0, 0, 0, 0, 300], 0),
}


def given(case: str, width: int) -> tuple[jax.Array, jax.Array]:
    sizes, beyond = CASES[case]
    x = RNG.standard_normal((sum(sizes) + beyond, width))
    return jnp.asarray(x, jnp.float32), jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_each_group(case: str) -> None:
    x, sizes = given(case, D)
    found = jax.jit(grouped_products.expand)(x, [W, 2 * W], sizes)
    wanted = reference.expand(x, W, sizes)
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    np.testing.assert_allclose(found[1], 2 * wanted, atol=1e-5)
    h, sizes = given(case, F)
    found = jax.jit(grouped_products.contract)(h, W, sizes)
    np.testing.assert_allclose(found, reference.contract(h, W, sizes), atol=1e-5)
    groups = np.repeat(np.arange(E), np.asarray(sizes))
    for vector, group in enumerate(groups):
        np.testing.assert_allclose(found[vector], h[vector] @ W[group], atol=1e-5)
    assert not np.asarray(found)[len(groups) :].any()


@pytest.mark.parametrize("case", CASES)
def test_the_ragged_product_of_accelerators_is_the_same(case: str) -> None:
    x, sizes = given(case, D)
    count = int(sizes.sum())
    found = grouped_products._ragged("expand", x, W, sizes)[:count]
    np.testing.assert_allclose(found, reference.expand(x, W, sizes)[:count], atol=1e-5)


def test_gradients_are_those_of_the_reference() -> None:
    x, sizes = given("uneven", D)

    def loss(form: object, x: jax.Array, w: jax.Array) -> jax.Array:
        h = form.expand(x, w, sizes)  # type: ignore[attr-defined]
        h = h[0] if isinstance(h, list) else h
        return jnp.sum(jnp.sin(form.contract(jnp.tanh(h), w, sizes)))  # type: ignore[attr-defined]

    class Grouped:
        @staticmethod
        def expand(x: jax.Array, w: jax.Array, sizes: jax.Array) -> list[jax.Array]:
            return grouped_products.expand(x, [w], sizes)

        contract = staticmethod(grouped_products.contract)

    found = jax.grad(loss, argnums=(1, 2))(Grouped, x, W)
    wanted = jax.grad(loss, argnums=(1, 2))(reference, x, W)
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4)


def test_blocks_follow_the_size_of_groups() -> None:
    assert [blocked.block_size(m, 8) for m in (0, 64, 65, 512, 10**6)] == [8, 8, 16, 64, 128]
