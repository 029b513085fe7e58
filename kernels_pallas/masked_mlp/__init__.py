"""Feed-forward layer of a pruned decode step: evaluate channels, choose, project the chosen.

`masked` multiplies unchosen channels by zero and reads every row of `down`; `gathered` reads only
the chosen rows. On the CPU backend XLA's gather of rows costs three to four times a dense product
(measured), so `masked` is the default until a native kernel exists for the platform.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from kernels_pallas.masked_mlp.products import contract, expand
from kernels_pallas.masked_mlp.reference import (
    ACTIVATIONS,
    gated_channels,
    project,
    project_gathered,
)

IMPLEMENTATIONS = ("masked", "gathered")


def masked_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: str,
    select: Callable[[jax.Array], jax.Array | None],
    active: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """FFN output [B, T, D] and the mask that `select` chose from the channel activations.

    x [B, T, D]; gate, up, down [F, D]. `select` maps h [B, T, F] to a bool mask [B or 1, T, F] with
    `active` channels on in every row, or to None for all of them.
    Raises ValueError for shapes that disagree or an unknown implementation.
    """
    if not gate.shape == up.shape == down.shape or x.shape[-1] != gate.shape[1]:
        raise ValueError(
            f"masked_mlp needs x [B,T,D] and gate, up, down [F,D], got {x.shape}, {gate.shape}, "
            f"{up.shape}, {down.shape}"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"masked_mlp implementation {implementation!r} is unknown: use one of {IMPLEMENTATIONS}"
        )
    h = gated_channels(x, gate, up, activation)
    mask = select(h)
    if mask is not None and implementation == "gathered":
        return project_gathered(h, down, mask, active), mask
    return project(h, down, mask), mask


__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "contract",
    "expand",
    "gated_channels",
    "masked_mlp",
    "project",
    "project_gathered",
]
