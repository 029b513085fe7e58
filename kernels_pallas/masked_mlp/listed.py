"""The feed-forward layer over lists of units: a block of channels, or one channel, each.

The choice itself stays in XLA between two kernels: it reads activations, E numbers a vector where a
matrix has E x D. How units are fetched is an `Access`, one for each kind of accelerator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kernels_pallas.masked_mlp.reference import ACTIVATIONS
from kernels_pallas.masked_mlp.scouted import Foretold
from kernels_pallas.masked_mlp.selection import Selection, choose, choose_tried


@dataclasses.dataclass(frozen=True)
class Units:
    """Which units of `size` channels are read: numbers [capacity], and how many count [1]."""

    numbers: jax.Array
    count: jax.Array
    size: int


class Access(Protocol):
    """The two products with listed units of a matrix; units past the count give or take nothing."""

    def obstacle(self, weights: jax.Array, vectors: int) -> str | None:
        """Why a matrix cannot be read so for this many vectors; None where it can."""
        ...

    def size(self, weights: jax.Array, most: int, channels: int) -> int:
        """Channels of a unit, where at most `most` of `channels` of a matrix are in use."""
        ...

    def expand(self, x: jax.Array, weights: Sequence[jax.Array], units: Units) -> list[jax.Array]:
        """h [N, capacity x size] float32 of x [N, D], for each matrix."""
        ...

    def contract(self, h: jax.Array, w: jax.Array, units: Units) -> jax.Array:
        """y [N, D] of h [N, capacity x size]."""
        ...


def masked_mlp(
    x: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    access: Access,
    *,
    activation: str,
    selection: Selection | None = None,
    given: jax.Array | None = None,
    rows: jax.Array | None = None,
    up_bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """FFN output [B, T, D] and the mask [B or 1, T, E] in use, None where every channel was on.

    `rows` [E] names the evaluated channels of the matrices, which are all of them without it. A
    mask `given` goes with the `selection` that it is of, if any. No gate: h = act(x up^T), or act(x
    up^T + up_bias) with up_bias [E] of the evaluated channels.
    """
    B, T, D = x.shape
    layer = _Layer(B * T, T, up.shape[0], rows, access)
    act, flat = ACTIVATIONS[activation], x.reshape(B * T, D)
    matrices = (up,) if gate is None else (gate, up)

    def channels(units: Units) -> jax.Array:
        first, *others = layer.expand(flat, matrices, units)
        if up_bias is not None:
            first = first + layer.at(up_bias.astype(first.dtype)[None, :], units)
        return act(first) * others[0] if others else act(first)

    def chosen(a: jax.Array, by: Selection) -> tuple[jax.Array, Units]:
        mask = choose(a.reshape(B, T, layer.evaluated), by)
        return mask, layer.used(mask, dataclasses.replace(by, k_selected=by.first), down)

    every = layer.every(up)
    if given is None and selection is None:
        # What lies beyond the last channel, in its block, is zeros and not whatever was there.
        h = layer.at(channels(every)[:, : layer.evaluated], every)
        return layer.contract(h, down, every).astype(x.dtype).reshape(x.shape), None
    if given is not None:
        mask, used = given, layer.used(given, selection, down)
        h = channels(used)
    else:
        assert selection is not None
        by_gate = gate is not None and selection.point == "gate"
        a = act(layer.expand(flat, (gate,), every)[0]) if by_gate else channels(every)
        a = a[:, : layer.evaluated]
        mask, used = chosen(a, selection)
        h = layer.at(a, used)
        h = h * layer.expand(flat, (up,), used)[0] if by_gate else h
        if selection.tried is not None:
            h = layer.back(h, used)
            mask = choose_tried(h.reshape(B, T, layer.evaluated), mask, selection)
            used = layer.used(mask, selection, down)
            h = layer.at(h, used)
    on = jnp.broadcast_to(mask, (B, T, layer.evaluated)).reshape(B * T, layer.evaluated)
    y = layer.contract(jnp.where(layer.at(on, used), h, 0.0), down, used)
    return y.astype(x.dtype).reshape(x.shape), mask


def scouted(
    x: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    access: Access,
    told: Foretold,
    selection: Selection | None,
    activation: str,
) -> jax.Array:
    """FFN output [B, T, D] of what a scout chose; `selection` says how many, where it is known."""
    B, T, D = x.shape
    gate, up, down = weights
    exact, rest = selection, None
    if selection is not None and selection.exact is not None:
        exact = dataclasses.replace(selection, k_selected=selection.exact)
        rest = dataclasses.replace(selection, k_selected=selection.k_selected - selection.exact)
    options: dict[str, Any] = {"activation": activation, "selection": exact}
    y, _ = masked_mlp(x, gate, up, down, access, given=told.exact, **options)
    if told.exact is told.on:
        return y
    layer = _Layer(B * T, T, up.shape[0], None, access)
    used = layer.used(told.on & ~told.exact, rest, down)
    h = told.rest().reshape(B * T, layer.evaluated).astype(jnp.float32)
    return y + layer.contract(layer.at(h, used), down, used).astype(x.dtype).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """How the matrices of a layer, of so many channels, are read for the vectors of some steps."""

    vectors: int
    steps: int
    channels: int
    rows: jax.Array | None
    access: Access

    @property
    def evaluated(self) -> int:
        return self.channels if self.rows is None else self.rows.shape[0]

    def every(self, weights: jax.Array) -> Units:
        units = self._size(weights, self.evaluated)
        count = -(-self.evaluated // units)
        return Units(jnp.arange(count, dtype=jnp.int32), jnp.full((1,), count, jnp.int32), units)

    def used(self, mask: jax.Array, selection: Selection | None, weights: jax.Array) -> Units:
        """The units of which any vector uses a channel, in order."""
        most = self._most(selection)
        size = self._size(weights, most)
        any_vector = jnp.any(mask.reshape(math.prod(mask.shape[:-1]), self.evaluated), axis=0)
        unit = jnp.any(self._split(any_vector, size), axis=-1)
        # argsort of a boolean is a stable partition: those in use first, ascending.
        numbers = jnp.argsort(~unit, stable=True).astype(jnp.int32)
        count = jnp.sum(unit, dtype=jnp.int32)[None]
        return Units(numbers[:most] if size == 1 else numbers, count, size)

    def at(self, values: jax.Array, units: Units) -> jax.Array:
        """values [N, E] of the channels of the listed units [N, capacity x size]."""
        listed = self._split(values, units.size)[:, units.numbers]
        return listed.reshape(values.shape[0], listed.shape[1] * units.size)

    def back(self, values: jax.Array, units: Units) -> jax.Array:
        """Inverse of `at`: values [N, E], zeros where no unit is listed."""
        count = -(-self.evaluated // units.size)
        listed = values.reshape(values.shape[0], units.numbers.shape[0], units.size)
        every = jnp.zeros((values.shape[0], count, units.size), values.dtype)
        every = every.at[:, units.numbers].set(listed)
        return every.reshape(values.shape[0], count * units.size)[:, : self.evaluated]

    def expand(self, x: jax.Array, weights: Sequence, units: Units) -> list[jax.Array]:
        return self.access.expand(x, weights, self._placed(units))

    def contract(self, h: jax.Array, w: jax.Array, units: Units) -> jax.Array:
        return self.access.contract(h, w, self._placed(units))

    def _most(self, selection: Selection | None) -> int:
        """The most channels that a choice can put on for all vectors together."""
        if selection is None or selection.threshold is not None:
            return self.evaluated
        sets = self.steps if selection.shared else self.vectors
        retained = self.evaluated - selection.num_candidate
        return min(self.evaluated, retained + selection.k_selected * sets)

    def _size(self, weights: jax.Array, most: int) -> int:
        return 1 if self.rows is not None else self.access.size(weights, most, self.channels)

    def _placed(self, units: Units) -> Units:
        if self.rows is None:
            return units
        places = self.rows[units.numbers].astype(jnp.int32)
        return dataclasses.replace(units, numbers=places)

    def _split(self, values: jax.Array, size: int) -> jax.Array:
        """values [..., E] as [..., units, size], with zeros up to whole units."""
        missing = -self.evaluated % size
        padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
        return padded.reshape(*values.shape[:-1], padded.shape[-1] // size, size)
