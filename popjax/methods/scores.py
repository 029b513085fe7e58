"""Channel importance: the statistics that prompt-time methods rank by.

All in float32. `H` [B, T, F] are the channel activations of the prompt's real tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from popjax.methods.method import LayerActs
from popjax.packing import down_norms
from popjax.sparsity import Params

SCORES = ("down", "gate-up", "activation")


def token_norms(h: jax.Array) -> jax.Array:
    """||H_i||_2 [F] over the batch and the tokens of h [B, T, F]."""
    return jnp.sqrt(jnp.sum(h * h, axis=(0, 1)))


def weight_scores(params: Params) -> jax.Array:
    """||Wg_i|| ||Wu_i|| ||Wd_i|| [F] of a gated FFN: importance where no token says anything."""
    norms = (down_norms(params[name]) for name in ("gate", "up", "down"))
    return functools.reduce(jnp.multiply, norms)


def gain_factors(params: Params, acts: LayerActs) -> jax.Array | None:
    """||gain Wd_i|| / ||Wd_i|| [F] where a norm multiplies the layer's output by a gain; or None.

    What a channel adds to the stream is not its row of down but that row times the gain.
    """
    if acts.gain is None:
        return None
    down = params["down"].astype(jnp.float32)
    plain = down_norms(down)
    loud = down_norms(down * acts.gain[None, :])
    return jnp.where(plain > 0, loud / jnp.where(plain > 0, plain, 1.0), 1.0)


def channel_scores(params: Params, acts: LayerActs, kind: str) -> jax.Array:
    """Importance [F] of each channel for the prompt (arXiv 2602.06822 Eq. 3).

    "down": ||H_i||_2 ||Wd_i||_2, W being the down projection, which is how we read Eq. 3
    [inferred]. "gate-up": sqrt(sum_k (Wg_ik^2 + Wu_ik^2) ||x_k||^2), the literal reading
    [inferred], kept as an ablation; of an FFN without a gate, its up alone and no bias [inferred].
    "activation": ||H_i||_2 with no weight.
    """
    if kind == "gate-up":
        x = jnp.where(acts.valid[:, :, None], acts.x.astype(jnp.float32), 0.0)
        energy = jnp.sum(x * x, axis=(0, 1))
        read = [params[name] for name in ("gate", "up") if name in params]
        squares = functools.reduce(jnp.add, (w.astype(jnp.float32) ** 2 for w in read))
        return jnp.sqrt(jnp.einsum("FD,D->F", squares, energy))
    norms = token_norms(acts.counted_channels())
    return norms * down_norms(params["down"]) if kind == "down" else norms
