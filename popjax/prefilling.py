"""From prompts to a cache: in one piece or in chunks, alone or after a context, then evicted.

Host code over the programs of `generate.py` and `eviction/`. Leaves out channels (`packing.py`)
and decoding (`run.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from popjax import cache as kv
from popjax import sharding
from popjax.buckets import bucket, left_padded
from popjax.config import ModelConfig
from popjax.context import Context
from popjax.depth import DepthMethod
from popjax.depth.applied import applied
from popjax.depth.method import FULL
from popjax.eviction import KvMethod, pool
from popjax.eviction.evict import Eviction, evict
from popjax.fingerprint import fingerprint
from popjax.generate import PROGRAMS
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Outputs
from popjax.request import Request, settled
from popjax.sparsity import Params, Partitions


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What is prefilled and how.

    room: slots for tokens that follow; chunk: tokens run at a time, None for all at once; kept and
    offset: what an earlier eviction left of a context, and how many tokens that context had;
    pooled: whether entries move to a pool even if all stay; align: what its heads start at
    multiples of. depth: which layers prompt tokens pass by, settled for the model.
    """

    prompts: Sequence[Sequence[int]]
    config: ModelConfig
    method: Method
    eviction: KvMethod | None = None
    room: int = 0
    chunk: int | None = None
    kept: kv.Kept | None = None
    offset: int = 0
    mesh: Mesh | None = None
    pooled: bool = False
    align: int = 1
    depth: DepthMethod | None = None

    @property
    def plan(self) -> Eviction | None:
        """The eviction that follows; None where nothing goes and no pool is asked for."""
        if self.eviction is None:
            return None
        lengths = tuple(len(prompt) for prompt in self.prompts)
        found = Eviction(self.eviction, self.config, lengths, self.align, self.apart)
        return found if found.evicts or self.pooled else None

    @property
    def apart(self) -> tuple[int, ...]:
        """Layers that get an equal share of an eviction's budget each, and compete with none."""
        if self.depth is None or self.depth.budget == "shared":
            return ()
        kinds = self.depth.prefill_layers(self.config)
        return tuple(i for i, kind in enumerate(kinds) if kind != FULL)

    def inputs(self) -> Inputs:
        """Tokens and positions [B, T], T a whole number of chunks."""
        T = bucket(max((len(prompt) for prompt in self.prompts), default=0))
        if self.chunk is not None and T > self.chunk:
            T = -(-T // self.chunk) * self.chunk
        return sharding.placed(left_padded(self.prompts, T, self.offset), "B", self.mesh)


def prefilled(
    params: Params, asked: Prefill, inputs: Inputs, partition: Partitions | None
) -> Outputs:
    """Logits, cache and statistics of the prompts; the cache has room only if nothing goes."""
    plan, T = asked.plan, inputs.tokens.shape[1]
    capacity = T + (asked.room if plan is None else plan.shadow_slots(T))
    eviction = None if plan is None else plan.method.unbudgeted
    static: dict[str, Any] = {"config": asked.config, "method": asked.method}
    static |= {"eviction": eviction, "mesh": asked.mesh}
    step = T if asked.chunk is None else min(asked.chunk, T)
    outputs = None if asked.kept is None else _nothing_yet(params, asked, inputs, capacity)
    for first in range(0, T, step):
        part = _columns(inputs, first, step)
        if asked.depth is not None:
            static["depth"] = asked.depth.plan(asked.config, last=first + step >= T)
        if outputs is None:
            outputs = PROGRAMS.prefill(params, part, partition, **static, capacity=capacity)
        else:
            outputs = PROGRAMS.extend(outputs, params, part, partition, asked.kept, **static)
    assert outputs is not None, "a prompt has at least one token"
    return outputs


def after_listening(params: Params, asked: Prefill, outputs: Outputs) -> Outputs:
    """The outputs after the shadow passes of the eviction method; themselves where it has none.

    The cache and the statistics given are donated, so `outputs` must not be held elsewhere.
    """
    plan = asked.plan
    if plan is None:
        return outputs
    slots = plan.shadow_slots(int(outputs.cache.length))
    if not slots:
        return outputs
    static = {"config": asked.config, "method": plan.method.unbudgeted}
    for each in plan.method.shadow_passes(asked.prompts, slots):
        cache, seen = PROGRAMS.evict.listen(outputs.cache, outputs.seen, params, each, **static)
        outputs = dataclasses.replace(outputs, cache=cache, seen=seen)
    return outputs


def after_eviction(
    params: Params, asked: Prefill, outputs: Outputs
) -> tuple[Outputs, kv.Kept | None]:
    """The outputs with a cache for what follows, and what stays of the prompt, if anything goes.

    Layers leave the dense cache one by one, so `outputs` must not be held elsewhere. Raises
    ValueError where scores are not finite.
    """
    plan = asked.plan
    if plan is None:
        return outputs, asked.kept
    outputs = after_listening(params, asked, outputs)
    positions, layers = outputs.cache.positions, list(outputs.cache.layers)
    dtype, seen = layers[0].k.dtype, outputs.seen
    tail = kv.empty(asked.config, len(asked.prompts), pool.tail(asked.room, asked.align), dtype)
    outputs = dataclasses.replace(outputs, cache=tail, seen=())
    kept = evict(PROGRAMS.evict, params, plan, layers, positions, seen)
    return outputs, kept


def make_context(params: Params, config: ModelConfig, request: Request) -> Context:
    """The one prompt of a request prefilled and evicted, to be continued any number of times.

    Raises ValueError for a request that the model cannot serve.
    """
    method = Method()
    mesh = sharding.mesh_of(params, config)
    request, _, _, layers = applied(request, params, config, mesh)
    if len(layers) < config.num_layers:
        raise ValueError(
            "a context holds entries of every layer, and this depth method drops some: prefill "
            "without depth="
        )
    request = settled(request, config, method)
    eviction = request.eviction_for(config, mesh) or KvMethod(window=0)
    chunk = request.prefill_chunk
    # Aligned for every implementation: what will read it is not known yet.
    asked = Prefill(
        request.prompts,
        config,
        method,
        eviction,
        chunk=chunk,
        mesh=mesh,
        pooled=True,
        align=pool.alignment(),
        depth=request.depth,
    )
    outputs = prefilled(params, asked, asked.inputs(), None)
    _, kept = after_eviction(params, asked, outputs)
    assert kept is not None
    tokens = tuple(int(token) for token in request.prompts[0])
    decided = repr(eviction) if request.depth is None else f"{eviction!r}, {request.depth!r}"
    return Context(kept, tokens, fingerprint(params, config), decided)


def _columns(inputs: Inputs, first: int, count: int) -> Inputs:
    """Columns first .. first + count - 1 of the inputs."""
    if inputs.tokens.shape[1] == count:
        return inputs
    return jax.tree.map(lambda x: x[:, first : first + count], inputs)


def _nothing_yet(params: Params, asked: Prefill, inputs: Inputs, capacity: int) -> Outputs:
    """Outputs before the first token of a prompt that follows a context."""
    rows, table = inputs.tokens.shape[0], params["embed"]["table"]
    cache = kv.empty(asked.config, rows, pool.tail(capacity, asked.align), table.dtype)
    return Outputs(jnp.zeros((rows, 0), jnp.float32), cache)


__all__ = ["Prefill", "after_eviction", "after_listening", "make_context", "prefilled"]
