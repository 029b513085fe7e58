"""A jitted function whose compilations are explicit: counted, timed, and apart from its running.

`jax.jit` hides when it compiles. Reports need the two times apart, and the promise that a second
prompt of a bucket compiles nothing needs a count.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import NamedSharding


class Program:
    """`fn` compiled ahead of time once per (static values, argument shapes, dtypes, shardings).

    Keyword arguments are static and hashable, and None is the same as leaving one out; positional
    ones are pytrees of arrays.
    """

    def __init__(
        self, fn: Callable[..., Any], *, static: tuple[str, ...], donate: tuple[int, ...] = ()
    ):
        self._jitted = jax.jit(fn, static_argnames=static, donate_argnums=donate)
        self._compiled: dict[Hashable, Any] = {}
        self.compilations = 0
        self.compile_seconds = 0.0

    def __call__(self, *args: Any, **static: Any) -> Any:
        return self.compiled(*args, **static)(*args)

    def compiled(self, *args: Any, **static: Any) -> Any:
        """The executable for these arguments, compiled now if it is the first time."""
        static = {name: value for name, value in static.items() if value is not None}
        leaves, tree = jax.tree.flatten(args)
        key = (
            tuple(sorted(static.items(), key=lambda item: item[0])),
            tree,
            tuple(map(_signature, leaves)),
        )
        if key not in self._compiled:
            started = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*args, **static).compile()
            self.compile_seconds += time.perf_counter() - started
            self.compilations += 1
        return self._compiled[key]

    def clear(self) -> None:
        """Forget every executable; those that are in use elsewhere stay. Counts go on."""
        self._compiled.clear()


def program_field(fn: Callable[..., Any], *static: str, donate: tuple[int, ...] = ()) -> Any:
    """A dataclass field: a `Program` of its own for each set of them."""
    return dataclasses.field(default_factory=lambda: Program(fn, static=static, donate=donate))


def _signature(leaf: Any) -> Hashable:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        # P(None) and P() are one placement, and jax makes the one of the other.
        spec = list(sharding.spec)
        while spec and spec[-1] is None:
            spec.pop()
        sharding = (sharding.mesh, tuple(spec), sharding.memory_kind)
    return (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), sharding)
