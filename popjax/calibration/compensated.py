"""Rounding to a few bits that makes up for its own errors, by what the rows are multiplied with.

Columns are rounded one after the other, and what is lost in one is made up in those still to come,
as the second moments of the inputs have it (GPTQ, arXiv 2210.17323, equations 2 and 3, with the
Cholesky form and damping of its section 3.3). Leaves out where the moments come from: that is
`input_moments.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kernels_pallas.row_products import QuantizedRows, most_steps, quantized_rows

# Share of the mean second moment that is added to each, so that the inverse exists (GPTQ's own).
_DAMPING = 0.01
# Scales tried for a group, as shares of the one that reaches its largest weight: the errors of
# many weights count for more than that of the largest.
_SHARES = np.linspace(0.7, 1.0, 13)


def compensated(
    w: np.ndarray, moments: np.ndarray, bits: int, group: int, scale_dtype: np.dtype
) -> QuantizedRows:
    """Rows w [F, D] in `bits` (4, 6 or 8), a scale of `scale_dtype` for each `group` of weights.

    moments [D, D]: sum or mean of x x^T over the inputs x that the rows are multiplied with. Of a
    group the scale is chosen that leaves the least squared error, inputs taken as uncorrelated.
    Raises ValueError for moments of another width, not finite, or all zero, and as `quantized` does
    for bits and group.
    """
    D = w.shape[1]
    most = most_steps(D, bits, group)
    if moments.shape != (D, D) or not np.isfinite(moments).all() or not moments.trace() > 0:
        raise ValueError(
            f"second moments {list(moments.shape)} of inputs do not fit rows of {D}, are not "
            "finite or are all zero: measure them on this model, in float32 if it overflows"
        )
    energy = np.diag(moments)
    damped = moments.astype(np.float64) + _DAMPING * energy.mean() * np.eye(D)
    # The inverse is factor^T factor; row j says where an error in column j is made up.
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    left = np.ascontiguousarray(w.T, np.float32)  # [D, F]: columns are worked, so they lie together
    values = np.empty(left.shape, np.int8)
    scales = np.empty((D // group, left.shape[1]), np.float32)
    for number, start in enumerate(range(0, D, group)):
        here = slice(start, start + group)
        scales[number] = _scales(left[here], energy[here], most, scale_dtype)
        errors = _round_group(left[here], values[here], scales[number], factor[here, here], most)
        left[start + group :] -= factor[here, start + group :].T @ errors
    return quantized_rows(jnp.asarray(values.T), jnp.asarray(scales.T), bits)


def _scales(block: np.ndarray, energy: np.ndarray, most: int, dtype: np.dtype) -> np.ndarray:
    """The scale [F] of least squared error for weights [group, F], each counted by its energy."""
    largest = np.abs(block).max(axis=0) / most
    best, least = largest, np.full(largest.shape, np.inf, np.float32)
    for share in _SHARES:
        # As it will be stored: what rounding the scale costs is made up for as well.
        scale = (largest * share).astype(dtype).astype(np.float32)
        missed = _steps(block, scale, most) * scale - block
        error = np.einsum("gf,g->f", missed * missed, energy)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _round_group(
    block: np.ndarray, values: np.ndarray, scale: np.ndarray, factor: np.ndarray, most: int
) -> np.ndarray:
    """Round weights [group, F] into `values`; what is still to be made up [group, F] in others."""
    errors = np.empty(block.shape, np.float32)
    for j in range(block.shape[0]):
        values[j] = _steps(block[j], scale, most)
        errors[j] = (block[j] - values[j] * scale) / factor[j, j]
        block[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return errors


def _steps(w: np.ndarray, scale: np.ndarray, most: int) -> np.ndarray:
    """w in whole steps of a scale [F], at most `most` of them either way."""
    return np.clip(np.round(w / np.where(scale == 0, 1.0, scale)), -most, most)


__all__ = ["compensated"]
