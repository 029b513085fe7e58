"""A prompt prefilled once and continued under many evictions, each as if it had been run alone.

Prefilling a long prompt costs many times what scoring and moving its cache does, so all methods
observe one dense prefill. Eviction and decoding are the library's own. Leaves out what is asked of
the continuations (`kv_quality.py`, `needle.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax.buckets import bucket
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction import KvMethod
from popjax.eviction.evict import evict
from popjax.eviction.method import AttentionActs
from popjax.generate import PROGRAMS
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Outputs
from popjax.prefilling import Prefill, after_listening, prefilled
from popjax.sparsity import Params

# A share of a prompt that is nothing but what always stays.
LEAST = 1e-9


@dataclasses.dataclass(frozen=True)
class Observers(KvMethod):
    """Observes as several methods do, and never evicts: the statistic is a tuple of theirs."""

    methods: tuple[KvMethod, ...] = ()

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        return tuple(method.observe(params, layer, acts) for method in self.methods)

    def combine(self, before: Any, now: Any) -> Any:
        each = zip(self.methods, before, now, strict=True)
        return tuple(method.combine(old, new) for method, old, new in each)

    def shadow_tokens(self, slots: int) -> int:
        return max((method.shadow_tokens(slots) for method in self.methods), default=0)


class Prefilled:
    """A prompt's dense cache, and what methods saw of it, their shadow passes included.

    methods: name -> the method, at any budget: what it sees depends on none.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        prompt: Sequence[int],
        methods: Mapping[str, KvMethod],
    ) -> None:
        self.params, self.config, self.prompt = params, config, prompt
        # A budget of one token a head, since only a prefill that evicts is observed.
        observers = Observers(tokens=1, window=0, methods=tuple(methods.values()))
        asked = Prefill([prompt], config, Method(), eviction=observers)
        outputs = prefilled(params, asked, asked.inputs(), None)
        self.first, self.cache = outputs.logits, outputs.cache
        self.seen: dict[str, tuple[Any, ...]] = {}
        for i, (name, method) in enumerate(methods.items()):
            # A method that keeps everything runs no shadow pass.
            method = dataclasses.replace(method, keep=LEAST, tokens=None)
            mine = tuple(layer[i] for layer in outputs.seen)
            alone = Outputs(self.first, self.cache, seen=mine)
            # Donates the cache and gives it back as it was.
            heard = after_listening(params, dataclasses.replace(asked, eviction=method), alone)
            self.cache, self.seen[name] = heard.cache, heard.seen

    def logits(
        self, following: Sequence[int], name: str = "", eviction: KvMethod | None = None
    ) -> jax.Array:
        """Logits [n, V] that predict each of n `following` tokens, all but the last decoded.

        `eviction` is the method observed as `name` with its budget; None keeps the dense cache.
        """
        room = bucket(max(len(following) - 1, 1))
        plan = Prefill([self.prompt], self.config, Method(), eviction=eviction).plan
        if plan is None:
            cache = with_room(self.cache, room)
        else:
            layers, positions = list(self.cache.layers), self.cache.positions
            cache = kv.empty(self.config, 1, room, layers[0].k.dtype)
            kept = evict(PROGRAMS.evict, self.params, plan, layers, positions, self.seen[name])
            cache = dataclasses.replace(cache, kept=kept)
        given = self._given(following, room)
        static: dict[str, Any] = {"config": self.config, "method": Method()}
        rest = PROGRAMS.score(self.params, given, cache, None, **static)
        return jnp.concatenate([self.first, rest[0, : len(following) - 1]])

    def _given(self, following: Sequence[int], room: int) -> Inputs:
        """Inputs [1, room] of all but the last token: step t is column t."""
        steps = len(following) - 1
        tokens, positions = np.zeros((1, room), np.int32), np.full((1, room), -1, np.int32)
        tokens[0, :steps] = following[:-1]
        positions[0, :steps] = len(self.prompt) + np.arange(steps)
        return Inputs(jnp.asarray(tokens), jnp.asarray(positions))


def with_room(cache: kv.Cache, room: int) -> kv.Cache:
    """A dense cache with `room` slots for more tokens."""

    def grown(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0)])

    positions = jnp.pad(cache.positions, [(0, 0), (0, room)], constant_values=-1)
    layers = jax.tree.map(grown, cache.layers)
    return dataclasses.replace(cache, layers=layers, positions=positions)


__all__ = ["LEAST", "Observers", "Prefilled", "with_room"]
