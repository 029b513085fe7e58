"""Matrices whose rows are stored in 8, 6 or 4 bits, with one float32 scale a group of weights.

For scouts and quantised weights on the CPU: symmetric, rounded to nearest. Leaves out calibration.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

_LEAST_GROUP = 32  # what the kernels read at once
# What bits are stored as: the type of the values tells them apart in files and kernels.
_STORED = {8: jnp.dtype(jnp.int8), 6: jnp.dtype(jnp.uint16), 4: jnp.dtype(jnp.uint8)}
_LEAST = 1e-30  # numbers of vectors below it are zeros to `rounded`


@struct.dataclass
class QuantizedRows:
    """Rows of a matrix [F, D]: values int8 [F, D], uint16 [F, 3D/8] of six bits, uint8 [F, D/2].

    scales [F, D/group] float32. A four-bit weight is stored as value + 8; of every 32 weights the
    first 16 are in the low halves of 16 bytes, the others in the high halves. A six-bit weight is
    value + 32: of every 32 weights the upper four bits as of four-bit ones, then eight bytes, byte
    k with the lower two of weight k, k + 8, k + 16 and k + 24, the first lowest; two bytes make one
    of the values, the first the lower.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        return bits_of(self.values.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.values.shape
        return rows, width * self.values.dtype.itemsize * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


Rows = jax.Array | QuantizedRows


STORED_BITS = tuple(sorted(_STORED))


def bits_of(dtype: jnp.dtype) -> int:
    """Bits of a weight in rows whose values are stored in `dtype`.

    Raises ValueError for a type that none are stored in.
    """
    for bits, held in _STORED.items():
        if dtype == held:
            return bits
    raise ValueError(f"values in {dtype} are no rows of few bits: give int8, uint16 or uint8")


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

    Raises ValueError for other bits than 4, 6 and 8, or a group that is no power of two, below 32
    or does not divide the width.
    """
    if bits not in _STORED:
        raise ValueError(f"bits {bits!r} are not offered: use 4, 6 or 8")
    if group < _LEAST_GROUP or group & (group - 1) or width % group:
        raise ValueError(
            f"group {group} with rows of {width} does not work: give a power of two from "
            f"{_LEAST_GROUP} on that divides the row length"
        )
    return (1 << bits - 1) - 1


def quantized_rows(values: jax.Array, scales: jax.Array, bits: int) -> QuantizedRows:
    """Rows of given steps [F, D] int8 (of b bits: -2^(b-1) up) and scales [F, D/group], stored."""
    return QuantizedRows(_PACKED[bits](values), scales)


def dequantized(w: QuantizedRows) -> jax.Array:
    """The matrix [F, D] in float32 that the stored rows stand for."""
    values = _UNPACKED[w.bits](w.values)
    rows, groups = w.scales.shape
    grouped = values.astype(jnp.float32).reshape(rows, groups, -1)
    return (grouped * w.scales[:, :, None]).reshape(w.shape)


def rounded(x: jax.Array) -> jax.Array:
    """Vectors x [..., D], every 32 numbers rounded to 127 steps of their largest; as float32.

    What rows of four and six bits are multiplied with where integers do it: ties go to the even
    step. Raises ValueError where 32 does not divide D.
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


def _halves(values: jax.Array) -> jax.Array:
    """Numbers [F, D] below 16 as bytes [F, D/32, 16], the first 16 of 32 in the low halves."""
    halves = values.astype(jnp.uint8).reshape(values.shape[0], -1, 2, 16)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _from_halves(pairs: jax.Array) -> jax.Array:
    """Inverse of `_halves`: uint8 [F, D]."""
    return jnp.stack([pairs & 15, pairs >> 4], axis=2).reshape(pairs.shape[0], -1)


def _packed4(values: jax.Array) -> jax.Array:
    return _halves(values + 8).reshape(values.shape[0], -1)


def _unpacked4(values: jax.Array) -> jax.Array:
    pairs = values.reshape(values.shape[0], -1, 16)
    return _from_halves(pairs).astype(jnp.int8) - 8


def _packed6(values: jax.Array) -> jax.Array:
    whole = (values + 32).astype(jnp.uint8)
    # Of 32 weights four times eight, whose lower bits share bytes.
    eights = (whole & 3).reshape(whole.shape[0], -1, 4, 8)
    lower = eights[:, :, 0] | eights[:, :, 1] << 2 | eights[:, :, 2] << 4 | eights[:, :, 3] << 6
    blocks = jnp.concatenate([_halves(whole >> 2), lower], axis=2)
    pairs = blocks.reshape(whole.shape[0], -1, 2).astype(jnp.uint16)
    return pairs[:, :, 0] | pairs[:, :, 1] << 8


def _unpacked6(values: jax.Array) -> jax.Array:
    pairs = jnp.stack([values & 255, values >> 8], axis=2).astype(jnp.uint8)
    blocks = pairs.reshape(values.shape[0], -1, 24)
    lower = jnp.stack([blocks[:, :, 16:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    whole = _from_halves(blocks[:, :, :16]) << 2 | lower.reshape(values.shape[0], -1)
    return whole.astype(jnp.int8) - 32


def _as_they_are(values: jax.Array) -> jax.Array:
    return values


_PACKED = {8: _as_they_are, 6: _packed6, 4: _packed4}
_UNPACKED = {8: _as_they_are, 6: _unpacked6, 4: _unpacked4}
