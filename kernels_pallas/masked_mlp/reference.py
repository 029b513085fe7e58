"""The mathematics of a feed-forward layer over channels, in plain jnp.

    h = act(x gate^T) * (x up^T)        evaluated channels        [..., F]
    h = act(x up^T + up_bias)           those of a layer without a gate
    y = (h * m) down                    m: mask over channels     [..., D]

Weights are channel-major [F, D]: a channel is one contiguous row of each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.row_products import contract, expand

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def gated_channels(
    x: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    activation: str,
    up_bias: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """h [..., F] = act(x gate^T) * (x up^T) of x [..., D] and gate, up [F, D].

    Without a gate act(x up^T), or act(x up^T + up_bias) with up_bias [F]. `implementation`: that of
    the products.
    """
    h = expand(x, up, implementation)
    if gate is not None:
        return ACTIVATIONS[activation](expand(x, gate, implementation)) * h
    return ACTIVATIONS[activation](biased(h, up_bias))


def biased(h: jax.Array, bias: jax.Array | None) -> jax.Array:
    """h [..., F] plus bias [F] in the dtype of h; h itself without one."""
    if bias is None:
        return h
    return h + bias.astype(h.dtype).reshape((1,) * (h.ndim - 1) + bias.shape)


def project(h: jax.Array, down: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """y [..., D] = (h * mask) down; mask [..., F] bool broadcasts over leading axes."""
    if mask is not None:
        h = jnp.where(mask, h, jnp.zeros((), h.dtype))
    return contract(h, down)


def project_gathered(h: jax.Array, down: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """`project` that reads only the `count` rows of down that each mask chooses.

    h, mask [B, T, F] with exactly `count` channels on in every [b, t]; down [F, D]. Equal to
    `project` up to the order of summation, and like it in the dtype of h.
    """
    rows = _chosen_rows(mask, h.shape, count)
    return _summed(jnp.take_along_axis(h, rows, axis=-1), down, rows, h.dtype)


def gated_gathered(
    a: jax.Array, x: jax.Array, up: jax.Array, mask: jax.Array, count: int
) -> jax.Array:
    """h [B, T, F] of activated gates a [B, T, F], zero where not chosen, reading only those of up.

    x [B, T, D]; mask [B or 1, T, F] with exactly `count` on in every step.
    """
    rows = _chosen_rows(mask, a.shape, count)
    h = jnp.take_along_axis(a, rows, axis=-1) * _products(x, up, rows)
    return jnp.put_along_axis(jnp.zeros_like(a), rows, h, axis=-1, inplace=False)


def given_gathered(
    x: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    activation: str,
    mask: jax.Array,
    count: int,
) -> jax.Array:
    """y [B, T, D] of x [B, T, D], reading of gate, up and down only the `count` chosen rows.

    The rest as of `project_gathered`.
    """
    gate, up, down = weights
    rows = _chosen_rows(mask, (*x.shape[:-1], up.shape[0]), count)
    h = ACTIVATIONS[activation](_products(x, gate, rows)) * _products(x, up, rows)
    return _summed(h, down, rows, x.dtype)


def _products(x: jax.Array, w: jax.Array, rows: jax.Array) -> jax.Array:
    """h [B, T, count] of x [B, T, D] and rows [B, T, count] of w [F, D]."""
    taken = w.at[rows].get(mode="promise_in_bounds")
    return jnp.einsum("BTD,BTFD->BTF", x.astype(taken.dtype), taken).astype(x.dtype)


def _chosen_rows(mask: jax.Array, shape: tuple[int, ...], count: int) -> jax.Array:
    """The `count` channels [B, T, count] that each mask chooses, ascending."""
    # argsort of a boolean is a stable partition.
    rows = jnp.argsort(~mask, axis=-1, stable=True)[..., :count]
    return jnp.broadcast_to(rows, (*shape[:-1], count))


def _summed(h: jax.Array, down: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Not jnp.take, which answers with another shape where there is no channel at all.
    taken = down.at[rows].get(mode="promise_in_bounds")
    return jnp.einsum("BTF,BTFD->BTD", h.astype(taken.dtype), taken).astype(dtype)
