"""Feed-forward layer of a pruned decode step: evaluate channels, choose, project the chosen.

Implementations. `xla`: unchosen channels are multiplied by zero and every row of `down` is read.
`xla_gathered`: only the chosen rows of `down` are, which on XLA's CPU backend costs three to four
times a dense product (measured). `native`: the CPU kernels, which read only what is used.
`auto`: native where the cost model finds it faster, else xla.
"""

from __future__ import annotations

import jax

from kernels_pallas.masked_mlp import native
from kernels_pallas.masked_mlp.reference import (
    ACTIVATIONS,
    gated_channels,
    project,
    project_gathered,
)
from kernels_pallas.masked_mlp.selection import POINTS, Selection, choose, select_top
from kernels_pallas.native.cost import prefers_native
from kernels_pallas.row_products import expand

IMPLEMENTATIONS = ("xla", "xla_gathered", "native", "auto")


def masked_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: str,
    selection: Selection | None = None,
    given: jax.Array | None = None,
    implementation: str = "xla",
) -> tuple[jax.Array, jax.Array | None]:
    """FFN output [B, T, D] and the mask [B or 1, T, E] in use, None where every channel was on.

    x [B, T, D]; gate, up, down [E, D], the evaluated channels. `selection` chooses for every token;
    a bool mask `given` [B or 1, T, E] replaces it. Raises ValueError for shapes that disagree and
    unknown names.
    """
    if not gate.shape == up.shape == down.shape or x.shape[-1] != gate.shape[1]:
        raise ValueError(
            f"masked_mlp needs x [B,T,D] and gate, up, down [E,D], got {x.shape}, {gate.shape}, "
            f"{up.shape}, {down.shape}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"masked_mlp implementation {implementation!r} is unknown: use one of {IMPLEMENTATIONS}"
        )
    if selection is not None and selection.point not in POINTS:
        raise ValueError(f"selection point {selection.point!r} is unknown: use one of {POINTS}")
    if _native(x, gate, selection, implementation):
        options = {"activation": activation, "selection": selection, "given": given}
        return native.masked_mlp(x, gate, up, down, **options)
    if selection is not None and selection.point == "gate":
        a = ACTIVATIONS[activation](expand(x, gate))
        mask = choose(a, selection) if given is None else given
        h = a * expand(x, up)
    else:
        h = gated_channels(x, gate, up, activation)
        mask = choose(h, selection) if given is None and selection is not None else given
    if mask is not None and implementation == "xla_gathered":
        return project_gathered(h, down, mask, _active(selection, mask)), mask
    return project(h, down, mask), mask


def _native(
    x: jax.Array, gate: jax.Array, selection: Selection | None, implementation: str
) -> bool:
    if selection is not None and selection.shared and x.shape[1] > 1:
        return False  # one choice a step: many steps at once are for XLA
    vectors = x.shape[0] * x.shape[1]
    auto = implementation == "auto" and prefers_native("mlp", vectors, gate.dtype)
    return auto or implementation == "native"


def _active(selection: Selection | None, mask: jax.Array) -> int:
    if selection is None or selection.threshold is not None:
        raise ValueError("'xla_gathered' needs a selection with a fixed count: use 'xla'")
    return mask.shape[-1] - selection.num_candidate + selection.k_selected


__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "POINTS",
    "Selection",
    "choose",
    "gated_channels",
    "masked_mlp",
    "project",
    "project_gathered",
    "select_top",
]
