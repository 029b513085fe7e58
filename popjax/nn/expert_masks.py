"""Which channels of a token's experts are on in a step.

Masks are [B, T, k W]: a token's experts one after the other, the best first, each with the
evaluated channels of its own partition. Scores are those of `masked_mlp.selection`, of the
candidates of each expert for itself. Left out: how h is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import select_top
from popjax.expert_partition import ExpertPartition


def expert_mask(
    h: jax.Array,
    experts: jax.Array,
    part: ExpertPartition,
    *,
    weighted: bool,
    shared: bool,
    channels: bool,
) -> jax.Array:
    """Bool mask [B, T, k, W] of h [B, T, k, W], or of all M `channels`; experts [B, T, k].

    weighted: scores are |h_i| ||Wd_i||_2, else |h_i|; shared: tokens of one step that meet in an
    expert choose together, by the L2 norm over them.
    """
    held = jnp.minimum(experts, part.retained.shape[0] - 1)
    places = part.candidate_places()
    places = places[held] if places.shape[0] > 1 else places[:, None, None, :]
    places = jnp.broadcast_to(places, (*experts.shape, part.num_candidate))
    at = part.candidate[held] if channels else places
    score = jnp.abs(jnp.take_along_axis(h, at, axis=-1).astype(jnp.float32))
    if shared:
        score = _together(score, experts, part.retained.shape[0])
    if weighted:
        assert part.candidate_norm is not None, "with_order() fills in the norms"
        score = score * part.candidate_norm[held]
    chosen = select_top(score, part.k_selected)
    return _with_retained(chosen, held, places, part)


def _with_retained(
    chosen: jax.Array, held: jax.Array, places: jax.Array, part: ExpertPartition
) -> jax.Array:
    """Mask [B, T, k, W] of the chosen candidates [B, T, k, C], with what is always on."""
    lead = chosen.shape[:-1]
    if part.in_order:
        on = jnp.ones((*lead, part.width), bool)
        mask = jnp.put_along_axis(on, places, chosen, axis=-1, inplace=False)
    else:
        retained = jnp.ones((*lead, part.num_retained), bool)
        beyond = part.width - part.num_retained - part.num_candidate
        pieces = [retained, chosen, jnp.zeros((*lead, beyond), bool)]
        mask = jnp.concatenate(pieces, axis=-1)
    return mask if part.whole is None else mask | part.whole[held][..., None]


def _together(score: jax.Array, experts: jax.Array, count: int) -> jax.Array:
    """Scores [B, T, k, C] as the L2 norm over the rows of a step that share an expert."""
    one_hot = jax.nn.one_hot(experts, count, dtype=jnp.float32)
    squares = jnp.einsum("BTkE,BTkC->TEC", one_hot, score * score, precision="highest")
    return jnp.einsum("BTkE,TEC->BTkC", one_hot, jnp.sqrt(squares), precision="highest")


def over_channels(mask: jax.Array, experts: jax.Array, part: ExpertPartition) -> jax.Array:
    """The mask [B, T, k, M] over all channels of one [B, T, k, W] over those evaluated."""
    assert part.places is not None, "with_order() fills in the places"
    held = jnp.minimum(experts, part.retained.shape[0] - 1)
    missing = part.expert_dim - mask.shape[-1]
    padded = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
    return jnp.take_along_axis(padded, part.places[held], axis=-1)
