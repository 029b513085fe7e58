"""What a feed-forward layer refuses before anything runs: shapes, dtypes and counts that disagree.

Left out: what only data can show, such as rows outside the matrix, which the native kernels refuse.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp.reference import ACTIVATIONS
from kernels_pallas.masked_mlp.selection import POINTS, Selection
from kernels_pallas.row_products import QuantizedRows

Weights = tuple[jax.Array | None, jax.Array, jax.Array]


def check_weights(x: jax.Array, weights: Weights, rows: jax.Array | None, activation: str) -> None:
    """Raise ValueError unless x [B, T, D], gate, up, down [F, D] and rows [E] go together."""
    up, held = weights[1], [w for w in weights if w is not None]
    alike = len({w.shape for w in held}) == 1 and x.ndim == 3 and up.ndim in (2, 3)
    if not alike or x.shape[-1] != math.prod(up.shape[1:]):
        found = ", ".join("none" if w is None else str(w.shape) for w in weights)
        raise ValueError(
            f"masked_mlp needs x [B,T,D] and gate, up, down [E,D], got {x.shape}, {found}"
        )
    B, T, _ = x.shape
    if not B * T:
        raise ValueError(f"masked_mlp has no vector to work on: x has B = {B}, T = {T}, give one")
    dtypes = [w.dtype.name for w in held]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"masked_mlp needs gate, up, down of one dtype, got {', '.join(dtypes)}: cast them"
        )
    if rows is not None and (rows.ndim != 1 or rows.dtype != jnp.int32):
        raise ValueError(
            f"masked_mlp needs rows [E] int32, got {rows.dtype} of shape {rows.shape}: give the "
            "numbers of the channels"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}"
        )


def check_bias(bias: jax.Array | None, gate: jax.Array | None, up: jax.Array) -> None:
    """Raise ValueError unless the bias is [F] as up has rows, of a layer without a gate."""
    if bias is None:
        return
    if gate is not None:
        raise ValueError("masked_mlp takes up_bias without a gate only: leave one of them out")
    if bias.shape != up.shape[:1]:
        raise ValueError(
            f"masked_mlp needs up_bias [F] with F = {up.shape[0]}, got {bias.shape}: give each "
            "row of up one"
        )


def check_scout(
    scout: tuple[QuantizedRows, QuantizedRows] | None,
    gate: jax.Array | None,
    up: jax.Array,
    rows: jax.Array | None,
) -> None:
    """Raise ValueError unless the scout is of gate and up [E, D], all rows of a layer with both."""
    if scout is None:
        return
    if gate is None or rows is not None:
        raise ValueError("masked_mlp takes a scout of all rows of a gated layer: leave it out")
    wanted, shapes = (up.shape[0], math.prod(up.shape[1:])), [w.shape for w in scout]
    if shapes != [wanted] * 2:
        raise ValueError(
            f"masked_mlp needs a scout of gate and up [E,D] = {list(wanted)}, got {shapes}: make "
            "it of these weights"
        )


def check_given(given: jax.Array, B: int, T: int, E: int) -> None:
    """Raise ValueError unless the mask is bool [B or 1, T, E]."""
    if given.dtype != bool or given.shape not in ((B, T, E), (1, T, E)):
        raise ValueError(
            f"masked_mlp needs given [B or 1,T,E] bool with B = {B}, T = {T}, E = {E}, got "
            f"{given.dtype} of shape {given.shape}"
        )


def check_selection(selection: Selection, E: int) -> None:
    """Raise ValueError unless the selection can be made among E channels."""
    C, k = selection.num_candidate, selection.k_selected
    if selection.point not in POINTS:
        raise ValueError(f"selection point {selection.point!r} is unknown: use one of {POINTS}")
    if not 0 <= C <= E:
        raise ValueError(f"a selection of C = {C} candidates is outside 0..E = {E}: lower it")
    if selection.threshold is None and not 0 <= k <= C:
        raise ValueError(f"a selection of k = {k} candidates is outside 0..C = {C}: lower it")
    exact = selection.exact
    if exact is not None and (C != E or selection.shared or not 0 <= exact <= k):
        raise ValueError(
            f"a selection with exact = {exact} is of all E = {E} channels, for each token, and "
            f"at most its k = {k}: got C = {C}, shared = {selection.shared}"
        )
    tried = selection.tried
    ranked = selection.point == "gate" and selection.threshold is None
    if tried is not None and not (ranked and k <= tried <= C):
        raise ValueError(
            f"a selection that tries {tried} chooses by rank of the gate, and tries at least its "
            f"k = {k} and at most its C = {C} candidates: got the point {selection.point!r}"
        )
    for name in ("candidate", "weight", "threshold", "expected"):
        array = getattr(selection, name)
        if array is not None and array.shape != (C,):
            raise ValueError(
                f"the {name} of a selection has shape {array.shape}, expected [C] with C = {C}"
            )
