"""A mixture of experts as pure functions: one router, and two ways to the same output.

`dense` evaluates every expert for every token and says what is meant. `ragged` sorts tokens by
expert, so that each matrix meets its own tokens: prompts, and decoding where XLA runs. A third,
which reads rows by index, is `expert_rows`. E are the experts held here; a token whose expert is E
goes nowhere: padding, or an expert of another device. Leaves out which channels are on: that is
`expert_masks`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas import grouped_products
from kernels_pallas.masked_mlp import ACTIVATIONS, NATIVE
from kernels_pallas.row_products import expand
from popjax.config import MoeConfig
from popjax.sparsity import Params


@struct.dataclass
class Routes:
    """Where tokens go: experts [N, k] int32, the best first, and their weights [N, k] float32."""

    experts: jax.Array
    weights: jax.Array


def route(
    x: jax.Array,
    router: jax.Array,
    moe: MoeConfig,
    valid: jax.Array,
    first: jax.Array | int = 0,
    implementation: str = "xla",
) -> Routes:
    """The routes of tokens x [N, D] by a router [X, D]; those not valid [N] go nowhere.

    Softmax in float32, then the top_k, ties to the lower expert; `renormalise` makes their weights
    sum to one. `first` is the first of all experts that is held here.
    """
    products = implementation if implementation in NATIVE else "xla"
    shares = jax.nn.softmax(expand(x, router, products, jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(shares, moe.top_k)
    if moe.renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    here = experts.astype(jnp.int32) - first
    held = valid[:, None] & (here >= 0) & (here < moe.here)
    return Routes(jnp.where(held, here, moe.here), weights)


@struct.dataclass
class Order:
    """Pairs of a token and an expert sorted by expert.

    pairs [N k]: their places before, token by token; sizes [E]: how many each expert has. Pairs
    that go nowhere are last.
    """

    pairs: jax.Array
    sizes: jax.Array

    def sort(self, each: jax.Array) -> jax.Array:
        """each [N k, ...] of pairs, token by token, as sorted."""
        return each[self.pairs]

    def tokens(self, each: jax.Array, top_k: int) -> jax.Array:
        """each [N, ...] of tokens for the sorted pairs [N k, ...]."""
        return each[self.pairs // top_k]

    def back(self, each: jax.Array) -> jax.Array:
        """Inverse of `sort`."""
        return each[jnp.argsort(self.pairs)]


def order_of(routes: Routes, experts: int) -> Order:
    """The pairs of routes sorted by expert, tokens in order within one."""
    flat = routes.experts.reshape(-1)
    pairs = jnp.argsort(flat, stable=True).astype(jnp.int32)
    ends = jnp.searchsorted(flat[pairs], jnp.arange(experts, dtype=jnp.int32), side="right")
    sizes = jnp.diff(ends, prepend=jnp.zeros((1,), ends.dtype))
    return Order(pairs, sizes.astype(jnp.int32))


def weighted(y: jax.Array, routes: Routes) -> jax.Array:
    """The sum [N, D] over a token's experts of y [N k, D] times their weights."""
    N, k = routes.experts.shape
    each = y.reshape(N, k, y.shape[-1]).astype(jnp.float32)
    return jnp.sum(each * routes.weights[:, :, None], axis=1).astype(y.dtype)


def dense(x: jax.Array, routes: Routes, weights: Params, activation: str) -> jax.Array:
    """Output [N, D] of tokens x [N, D] with gate, up and down [E, F, D], every expert worked."""
    gate, up = (jnp.einsum("ND,EFD->NEF", x, weights[name]) for name in ("gate", "up"))
    y = jnp.einsum("NEF,EFD->NED", ACTIVATIONS[activation](gate) * up, weights["down"])
    share = jax.nn.one_hot(routes.experts, y.shape[1], dtype=jnp.float32)
    share = jnp.einsum("NkE,Nk->NE", share, routes.weights)
    return jnp.einsum("NE,NED->ND", share, y.astype(jnp.float32)).astype(x.dtype)


def ragged(x: jax.Array, routes: Routes, weights: Params, activation: str) -> jax.Array:
    """As `dense`, working only the experts that tokens go to."""
    order = order_of(routes, weights["down"].shape[0])
    h = ragged_channels(x, order, routes, weights, activation)
    return ragged_output(h, order, routes, weights)


def ragged_channels(
    x: jax.Array, order: Order, routes: Routes, weights: Params, activation: str
) -> jax.Array:
    """h [N k, F] of sorted pairs; zeros of those that go nowhere."""
    given = order.tokens(x, routes.experts.shape[1])
    matrices = [weights["gate"], weights["up"]]
    gate, up = grouped_products.expand(given, matrices, order.sizes)
    return ACTIVATIONS[activation](gate) * up


def ragged_output(h: jax.Array, order: Order, routes: Routes, weights: Params) -> jax.Array:
    """Output [N, D] of h [N k, F] of sorted pairs."""
    y = grouped_products.contract(h, weights["down"], order.sizes)
    return weighted(order.back(y), routes)
