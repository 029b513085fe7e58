"""Feed-forward layer of a pruned decode step: evaluate channels, choose, project the chosen.

Implementations. `xla`: unchosen channels are multiplied by zero and every row of `down` is read.
`xla_gathered`: only the chosen rows of `down` are, and by the gate alone those of `up`, which on
XLA's CPU backend costs three to four times a dense product (measured). `native`: the CPU kernels,
which read only what is used. `auto`: native where the cost model finds it faster, else xla.
`pallas_tpu` and `pallas_gpu`: the kernels of an accelerator; `pallas_interpret`: those for TPUs
interpreted on any device, slowly, to check them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp import checks, listed, native
from kernels_pallas.masked_mlp.reference import (
    ACTIVATIONS,
    gated_channels,
    gated_gathered,
    given_gathered,
    project,
    project_gathered,
)
from kernels_pallas.masked_mlp.scouted import foretell
from kernels_pallas.masked_mlp.selection import (
    POINTS,
    Selection,
    choose,
    choose_tried,
    select_top,
)
from kernels_pallas.masked_mlp.tpu import TpuAccess
from kernels_pallas.native.cost import prefers_native
from kernels_pallas.row_products import contract, expand

NATIVE = ("native", "auto")
PALLAS = ("pallas_tpu", "pallas_gpu", "pallas_interpret")
IMPLEMENTATIONS = ("xla", "xla_gathered", *NATIVE, *PALLAS)


def masked_mlp(
    x: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: str,
    selection: Selection | None = None,
    given: jax.Array | None = None,
    rows: jax.Array | None = None,
    up_bias: jax.Array | None = None,
    scout: native.Scout | None = None,
    implementation: str = "xla",
) -> tuple[jax.Array, jax.Array | None]:
    """FFN output [B, T, D] and the mask [B or 1, T, E] in use, None where every channel was on.

    x [B, T, D]; gate, up, down [E, D], the evaluated channels; or [F, D/128, 128] of which `rows`
    [E] int32 are evaluated (all without it), fetched one by one on `pallas_tpu`. `selection`
    chooses for every token; a bool mask `given` [B or 1, T, E] replaces it. Without a gate, h is
    act(x up^T), or act(x up^T + up_bias), up_bias being [F] as the rows of up are. A `scout`, gate
    and up [E, D] in few bits, makes the selection, by what the product would be, before any row is
    read. Raises ValueError for shapes, dtypes and counts that disagree and unknown names.
    """
    options = {"activation": activation, "selection": selection, "given": given, "rows": rows}
    _check(x, (gate, up, down), options, implementation)
    checks.check_bias(up_bias, gate, up)
    checks.check_scout(scout, gate, up, rows)
    if up_bias is not None and rows is not None:
        up_bias = up_bias[rows]
    scouted = scout is not None and _chooses(selection, given)
    by_scout = (scout, selection, given, activation, implementation)
    if implementation in PALLAS:
        if scouted:
            return _scouted(x, (gate, up, down), *by_scout)
        access = _access(implementation)
        return listed.masked_mlp(x, gate, up, down, access, up_bias=up_bias, **options)
    if up.ndim == 3:
        gate = None if gate is None else _evaluated(gate, rows)
        up, down = _evaluated(up, rows), _evaluated(down, rows)
    del options["rows"]
    if gate is None:
        h = gated_channels(x, None, up, activation, up_bias, _products(implementation))
        mask = choose(h, selection) if given is None and selection is not None else given
        held = h if mask is None else jnp.where(mask, h, jnp.zeros((), h.dtype))
        return contract(held, down, _products(implementation)), mask
    if _native(x, gate, selection, implementation):
        return native.masked_mlp(x, gate, up, down, scout=scout, **options)
    if scouted:
        return _scouted(x, (gate, up, down), *by_scout)
    return _by_xla(x, (gate, up, down), implementation == "xla_gathered", **options)


def _chooses(selection: Selection | None, given: jax.Array | None) -> bool:
    """Whether a scout is needed: for a mask from outside only if some channels are as foretold."""
    return selection is not None and (given is None or selection.exact is not None)


def _scouted(
    x: jax.Array,
    weights: checks.Weights,
    scout: native.Scout | None,
    selection: Selection | None,
    given: jax.Array | None,
    activation: str,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    """`masked_mlp` whose choice a scout makes, where the CPU kernel does not do it all."""
    gate, up, down = weights
    assert gate is not None and scout is not None and selection is not None, "see check_scout"
    told = foretell(x, scout, activation, selection, given)
    if implementation in PALLAS:
        # How many channels are on is known of a choice made here, not of a mask from outside.
        chosen = selection if given is None else None
        access = _access(implementation)
        return listed.scouted(x, (gate, up, down), access, told, chosen, activation), told.on
    if implementation == "xla_gathered":
        active = _active(selection, told.on)
        exact = active if selection.exact is None else selection.exact
        y = given_gathered(x, (gate, up, down), activation, told.exact, exact)
        rest = told.on & ~told.exact
        return y + project_gathered(told.a, down, rest, active - exact), told.on
    h = gated_channels(x, gate, up, activation)
    return project(jnp.where(told.exact, h, told.rest()), down), told.on


def _by_xla(
    x: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    gathered: bool,
    *,
    activation: str,
    selection: Selection | None,
    given: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    gate, up, down = weights
    if selection is not None and selection.point == "gate":
        a = ACTIVATIONS[activation](expand(x, gate))
        mask = choose(a, selection) if given is None else given
        if gathered:
            more = 0 if given is not None else selection.first - selection.k_selected
            h = gated_gathered(a, x, up, mask, _active(selection, mask) + more)
        else:
            h = a * expand(x, up)
        if given is None and selection.tried is not None:
            mask = choose_tried(h, mask, selection)
    else:
        h = gated_channels(x, gate, up, activation)
        mask = choose(h, selection) if given is None and selection is not None else given
    if mask is not None and gathered:
        return project_gathered(h, down, mask, _active(selection, mask)), mask
    return project(h, down, mask), mask


def _products(implementation: str) -> str:
    """The implementation of row_products that goes with one of masked_mlp."""
    return implementation if implementation in NATIVE else "xla"


def _evaluated(w: jax.Array, rows: jax.Array | None) -> jax.Array:
    flat = w.reshape(w.shape[0], -1)
    return flat if rows is None else flat[rows]


def _check(
    x: jax.Array, weights: checks.Weights, options: dict[str, Any], implementation: str
) -> None:
    selection, given, rows = (options[name] for name in ("selection", "given", "rows"))
    checks.check_weights(x, weights, rows, options["activation"])
    up = weights[1]
    if rows is not None and up.ndim == 2 and implementation != "pallas_gpu":
        raise ValueError(
            f"masked_mlp takes rows of weights [F,D/128,128] only, got {up.shape}: pack the rows"
        )
    E = up.shape[0] if rows is None else rows.shape[0]
    if given is not None:
        checks.check_given(given, x.shape[0], x.shape[1], E)
    if selection is not None:
        checks.check_selection(selection, E)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"masked_mlp implementation {implementation!r} is unknown: use one of {IMPLEMENTATIONS}"
        )
    reason = pallas_obstacle(implementation, up, x.shape[0] * x.shape[1])
    if reason is not None:
        raise ValueError(f"masked_mlp cannot run on {implementation!r}: {reason}")


def pallas_obstacle(implementation: str, w: Any, vectors: int) -> str | None:
    """Why an accelerator's kernels cannot serve w [F, D] or [F, D/128, 128]; None where they can.

    Of no concern to other implementations.
    """
    return _access(implementation).obstacle(w, vectors) if implementation in PALLAS else None


def _access(implementation: str) -> listed.Access:
    if implementation == "pallas_gpu":
        # Here, since importing Mosaic GPU takes a tenth of a second that others need not spend.
        from kernels_pallas.masked_mlp.gpu import GpuAccess

        return GpuAccess()
    return TpuAccess(interpret=implementation == "pallas_interpret")


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
    "NATIVE",
    "PALLAS",
    "POINTS",
    "Selection",
    "choose",
    "gated_channels",
    "masked_mlp",
    "pallas_obstacle",
    "project",
    "project_gathered",
    "select_top",
]
