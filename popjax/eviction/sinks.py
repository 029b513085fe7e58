"""What methods share that always keep the first tokens of a prompt, the attention sinks."""

from __future__ import annotations

import dataclasses

import jax

from popjax.eviction.method import KvMethod, check_whole


@dataclasses.dataclass(frozen=True)
class WithSinks(KvMethod):
    """Keeps the first `sinks` tokens besides the window, which may be empty.

    Raises ValueError for values outside their range.
    """

    window: int = 0
    sinks: int = 4

    def __post_init__(self) -> None:
        check_whole("sinks", self.sinks)
        super().__post_init__()

    @property
    def least(self) -> int:
        return self.window + self.sinks

    def protected(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        return (positions < self.sinks) | super().protected(positions, lengths)


__all__ = ["WithSinks"]
