"""Matrices whose rows are stored in eight or four bits, with one float32 scale a group of weights.

For scouts and quantised weights on the CPU: symmetric, rounded to nearest. Leaves out calibration.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

_LEAST_GROUP = 32  # what the kernels read at once
_LEAST = 1e-30  # numbers of vectors below it are zeros to `rounded`


@struct.dataclass
class QuantizedRows:
    """Rows of a matrix [F, D]: values int8 [F, D], or uint8 [F, D/2] of two four-bit weights each.

    scales [F, D/group] float32. A four-bit weight is stored as value + 8; of every 32 weights the
    first 16 are in the low halves of 16 bytes, the others in the high halves.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == jnp.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.values.shape
        return rows, width * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


Rows = jax.Array | QuantizedRows


def stored(w: Rows) -> tuple[jax.Array, jax.Array]:
    """The arrays that hold a matrix: its values and its scales, of which plain ones have none."""
    if isinstance(w, QuantizedRows):
        return w.values, w.scales
    return w, jnp.zeros((0,), jnp.float32)


def quantized(w: jax.Array, bits: int = 8, group: int = 32) -> QuantizedRows:
    """Rows w [F, D] rounded to `bits`, each group of `group` weights scaled by its largest.

    Raises ValueError as `most_steps` does.
    """
    most = most_steps(w.shape[1], bits, group)
    grouped = w.astype(jnp.float32).reshape(w.shape[0], -1, group)
    scales = jnp.max(jnp.abs(grouped), axis=-1) / most
    steps = grouped / jnp.where(scales == 0, 1.0, scales)[:, :, None]
    values = jnp.clip(jnp.round(steps), -most, most).reshape(w.shape).astype(jnp.int8)
    return quantized_rows(values, scales, bits)


def most_steps(width: int, bits: int, group: int) -> int:
    """Steps that a weight of `bits` has either way, in rows of `width` weights.

    Raises ValueError for other bits than 4 and 8, or a group that is no power of two, below 32 or
    does not divide the width.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits {bits!r} are not offered: use 4 or 8")
    if group < _LEAST_GROUP or group & (group - 1) or width % group:
        raise ValueError(
            f"group {group} with rows of {width} does not work: give a power of two from "
            f"{_LEAST_GROUP} on that divides the row length"
        )
    return 127 if bits == 8 else 7


def quantized_rows(values: jax.Array, scales: jax.Array, bits: int) -> QuantizedRows:
    """Rows of given steps [F, D] int8 (of four bits: -8 to 7) and scales [F, D/group], stored."""
    return QuantizedRows(values if bits == 8 else _packed(values), scales)


def dequantized(w: QuantizedRows) -> jax.Array:
    """The matrix [F, D] in float32 that the stored rows stand for."""
    values = w.values if w.bits == 8 else _unpacked(w.values)
    rows, groups = w.scales.shape
    grouped = values.astype(jnp.float32).reshape(rows, groups, -1)
    return (grouped * w.scales[:, :, None]).reshape(w.shape)


def rounded(x: jax.Array) -> jax.Array:
    """Vectors x [..., D], every 32 numbers rounded to 127 steps of their largest; as float32.

    What four-bit rows are multiplied with where integers do it: ties go to the even step. Raises
    ValueError where 32 does not divide D.
    """
    if x.shape[-1] % _LEAST_GROUP:
        raise ValueError(
            f"vectors of {x.shape[-1]} are not rounded: give a multiple of {_LEAST_GROUP}"
        )
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, _LEAST_GROUP)
    most = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    # One operation at a time, none of which a compiler may write otherwise.
    steps = jnp.where(most < _LEAST, 0.0, 127.0 / jnp.maximum(most, _LEAST))
    return (jnp.round(blocks * steps) * (most * (1 / 127))).reshape(x.shape)


def _packed(values: jax.Array) -> jax.Array:
    halves = (values + 8).astype(jnp.uint8).reshape(values.shape[0], -1, 2, 16)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(values.shape[0], -1)


def _unpacked(values: jax.Array) -> jax.Array:
    pairs = values.reshape(values.shape[0], -1, 16)
    halves = jnp.stack([pairs & 15, pairs >> 4], axis=2)
    return halves.reshape(values.shape[0], -1).astype(jnp.int8) - 8
