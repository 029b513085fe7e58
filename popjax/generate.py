"""The functional core of generation: prefill -> plan -> pack -> decode, tokens in, tokens out.

Every phase is one compiled program over explicit parameters, partition and masks. Lengths are
rounded up to buckets, so a second prompt of a bucket compiles nothing. Text, checkpoints and
reports are elsewhere (`model.py`, `report.py`); `run.py` drives the phases. With a `mesh` each
program runs on the shards of every device at once (`sharding.py`); configs are of the whole model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from kernels_pallas.masked_mlp import PALLAS
from popjax import cache as kv
from popjax import sharding
from popjax.config import ModelConfig
from popjax.depth.method import DepthPlan
from popjax.depth.unseen import planned
from popjax.eviction.evict import Programs as EvictionPrograms
from popjax.eviction.method import KvMethod
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Outputs, Transformer
from popjax.program import Program, program_field
from popjax.sampling import SamplingFlags, SamplingValues, choose, processed
from popjax.sparsity import Params, Partitions, Plan

Masks = tuple[jax.Array, ...]


@struct.dataclass
class DecodeState:
    """Everything that one decode step hands to the next; M is the bucket of new tokens.

    tokens [B, M] int32 so far, last [B] the token to feed next at positions [B], done [B] rows that
    met an end token, finite [B] rows whose logits always were, step (scalar) tokens out per row,
    keys [B]. Optional: logprobs [B, M], logits [B, M, V], masks [M-1, B, R+C] a layer (entry i
    made token i+1), seen [B, V].
    """

    tokens: jax.Array
    last: jax.Array
    positions: jax.Array
    done: jax.Array
    finite: jax.Array
    step: jax.Array
    keys: jax.Array
    cache: kv.Cache
    logprobs: jax.Array | None
    logits: jax.Array | None
    masks: Masks | None
    seen: jax.Array | None


def _letters() -> tuple[Outputs, DecodeState]:
    """Outputs of prefill and DecodeState with axis letters in place of arrays."""
    everywhere, rows, heads, channels, masks = cast(Any, ("", "B", "BK", "F", "TBF"))
    cache = kv.Cache(layers=heads, positions=rows, length=everywhere)
    state: dict[str, Any] = {field.name: rows for field in dataclasses.fields(DecodeState)}
    state |= {"step": everywhere, "cache": cache, "masks": masks}
    return Outputs(rows, cache, statistics=channels, seen=rows), DecodeState(**state)


# What a mesh splits. The leading axis of a method's statistics is F.
OUTPUTS, STATE = _letters()


@dataclasses.dataclass(frozen=True)
class Options:
    """Static switches of a run: which by-products are kept, and how decode steps are computed.

    pack: whether the rows of a partition are copied side by side, or fetched by index.
    """

    logprobs: bool = False
    logits: bool = False
    record_masks: bool = False
    implementation: str | None = None
    pack: bool = True


@sharding.over_mesh(sharding.param_letters, "B", "F", outs=OUTPUTS)
def prefill(
    params: Params,
    inputs: Inputs,
    partition: Partitions | None,
    *,
    config: ModelConfig,
    method: Method,
    capacity: int,
    eviction: KvMethod | None = None,
    depth: DepthPlan | None = None,
    mesh: Mesh | None = None,
) -> Outputs:
    """Run the prompt into a fresh cache of `capacity` slots; logits [B, V] of its last token."""
    config, shards = sharding.local_config(config, mesh), sharding.tensor_axes(mesh)
    eviction, dtype = eviction or KvMethod(), params["embed"]["table"].dtype
    model = Transformer(config, method, shards=shards, eviction=eviction, depth=depth)
    cache = kv.empty(config, inputs.tokens.shape[0], capacity, dtype)
    return _apply(model, params, "prefill", inputs, cache, partition)


@sharding.over_mesh(OUTPUTS, sharding.param_letters, "B", "F", "", outs=OUTPUTS)
def extend(
    before: Outputs,
    params: Params,
    inputs: Inputs,
    partition: Partitions | None,
    kept: kv.Kept | None,
    *,
    config: ModelConfig,
    method: Method,
    eviction: KvMethod | None = None,
    depth: DepthPlan | None = None,
    mesh: Mesh | None = None,
) -> Outputs:
    """Outputs after a further chunk of the prompt, given those of what came before it.

    The chunk attends to everything before, and to what an eviction `kept`; statistics are combined
    as the methods say. Where nothing was observed before, they are those of the chunk.
    """
    config, shards = sharding.local_config(config, mesh), sharding.tensor_axes(mesh)
    eviction = eviction or KvMethod()
    model = Transformer(config, method, shards=shards, eviction=eviction, depth=depth)
    cache = dataclasses.replace(before.cache, kept=kept)
    now = _apply(model, params, "prefill", inputs, cache, partition)
    now = dataclasses.replace(now, cache=dataclasses.replace(now.cache, kept=None))
    if not before.statistics:
        return now
    pairs = zip(before.statistics, now.statistics, strict=True)
    statistics = tuple(method.combine(old, new) for old, new in pairs)
    pairs = zip(before.seen, now.seen, strict=True)
    # Layers that earlier chunks passed by have observed nothing before.
    seen = tuple(new if old is None else eviction.combine(old, new) for old, new in pairs)
    return dataclasses.replace(now, statistics=statistics, seen=seen)


@sharding.over_mesh("F", outs=("F", ""))
def make_plan(
    statistics: tuple[Any, ...], *, config: ModelConfig, method: Method, mesh: Mesh | None = None
) -> tuple[Plan, jax.Array]:
    """The method's plan, and whether each layer's statistic is finite [L]."""
    finite = [
        jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(statistic)]))
        if jax.tree.leaves(statistic)
        else jnp.bool_(True)
        for statistic in statistics
    ]
    plan = planned(method, sharding.local_config(config, mesh), statistics)
    return plan, sharding.on_all(jnp.stack(finite), mesh)


@sharding.over_mesh(sharding.param_letters, "B", OUTPUTS.cache, "F", outs="B")
def score(
    params: Params,
    inputs: Inputs,
    cache: kv.Cache,
    partition: Partitions | None,
    *,
    config: ModelConfig,
    method: Method,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Logits [B, T, V] of given tokens decoded after a prefill, each masked as its own step."""
    config, shards = sharding.local_config(config, mesh), sharding.tensor_axes(mesh)
    model = Transformer(config, method, shards=shards)
    return _apply(model, params, "decode", inputs, cache, partition, None, True).logits


def _apply(model: Transformer, params: Params, method: str, *arguments: Any) -> Outputs:
    return cast(Outputs, model.apply({"params": params}, *arguments, method=method))


def emit(
    state: DecodeState, logits: jax.Array, values: SamplingValues, flags: SamplingFlags
) -> DecodeState:
    """The state with one more token a row, chosen from logits [B, V]. Finished rows stay as is."""
    step = state.step
    chosen = choose(processed(logits, state.seen, values, flags, step), state.keys, flags, step)
    token = jnp.where(state.done, 0, chosen)
    ended = jnp.any(token[:, None] == values.eos_ids[None, :], axis=-1)
    rows = jnp.arange(token.shape[0])

    def at_step(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, value, step, axis=1)

    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = at_step(logprobs, jax.nn.log_softmax(logits, axis=-1)[rows, token])
    return dataclasses.replace(
        state,
        tokens=at_step(state.tokens, token),
        last=token,
        done=state.done | ended,
        finite=state.finite & (state.done | jnp.all(jnp.isfinite(logits), axis=-1)),
        step=step + 1,
        logprobs=logprobs,
        logits=None if state.logits is None else at_step(state.logits, logits),
        seen=None if state.seen is None else state.seen.at[rows, token].set(True),
    )


@sharding.over_mesh(OUTPUTS.cache, "B", "B", "B", "TBF", "", outs=STATE)
def start(
    cache: kv.Cache,
    logits: jax.Array,
    inputs: Inputs,
    keys: jax.Array,
    masks: Masks | None,
    values: SamplingValues,
    *,
    flags: SamplingFlags,
    options: Options,
    room: int,
    mesh: Mesh | None = None,
) -> DecodeState:
    """The decode state after prefill: buffers for `room` tokens, the first from logits [B, V]."""
    B, V = logits.shape
    seen = None
    if flags.penalty:
        real = jnp.where(inputs.positions >= 0, inputs.tokens, V)
        seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], real].set(True, mode="drop")
    state = DecodeState(
        tokens=jnp.zeros((B, room), jnp.int32),
        last=jnp.zeros((B,), jnp.int32),
        positions=inputs.positions[:, -1] + 1,
        done=jnp.zeros((B,), bool),
        finite=jnp.ones((B,), bool),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        cache=cache,
        logprobs=jnp.zeros((B, room), jnp.float32) if options.logprobs else None,
        logits=jnp.zeros((B, room, V), jnp.float32) if options.logits else None,
        masks=masks,
        seen=seen,
    )
    return emit(state, logits, values, flags)


@sharding.over_mesh(STATE, sharding.param_letters, "F", "TBF", "", "", "", outs=STATE)
def decode(
    state: DecodeState,
    params: Params,
    partition: Partitions | None,
    replay: Masks | None,
    values: SamplingValues,
    kept: kv.Kept | None,
    until: jax.Array,
    *,
    config: ModelConfig,
    method: Method,
    flags: SamplingFlags,
    options: Options,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Decode until `until` tokens are out or every row is done; the same program serves streaming.

    Reads only the parameters given, so packed ones make it touch only R u C. `replay` masks
    [steps, B or 1, R+C] a layer replace the method's own. What an eviction `kept` is read, never
    written: it stays outside of what the loop carries, and of what is donated.
    """
    config, shards = sharding.local_config(config, mesh), sharding.tensor_axes(mesh)
    implementation = options.implementation or "xla"
    model = Transformer(config, method, implementation, shards)

    def going(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: DecodeState) -> DecodeState:
        # A finished row is padding from here on: position -1, never attended, never counted.
        positions = jnp.where(state.done, -1, state.positions)
        inputs = Inputs(state.last[:, None], positions[:, None])
        recorded = None if replay is None else tuple(m[state.step - 1][:, None, :] for m in replay)
        cache = dataclasses.replace(state.cache, kept=kept)
        out = _apply(model, params, "decode", inputs, cache, partition, recorded)
        masks = _record(state.masks, out.masks, state.step)
        cache = dataclasses.replace(out.cache, kept=None)
        state = dataclasses.replace(state, cache=cache, positions=state.positions + 1, masks=masks)
        return emit(state, out.logits, values, flags)

    carried = kv.merged(state.cache, as_bits=implementation not in PALLAS)
    state = dataclasses.replace(state, cache=carried)
    state = jax.lax.while_loop(going, step, state)
    return dataclasses.replace(state, cache=kv.split(state.cache))


def _record(kept: Masks | None, used: tuple, step: jax.Array) -> Masks | None:
    if kept is None:
        return None
    written = []
    for buffer, mask in zip(kept, used, strict=True):
        mask = jnp.bool_(True) if mask is None else mask[:, 0, :]
        mask = jnp.broadcast_to(mask, buffer.shape[1:])
        written.append(jax.lax.dynamic_update_index_in_dim(buffer, mask, step - 1, axis=0))
    return tuple(written)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of the core. One set a process is enough: they hold no weights."""

    prefill: Program = program_field(
        prefill, "config", "method", "capacity", "eviction", "depth", "mesh"
    )
    extend: Program = program_field(
        extend, "config", "method", "eviction", "depth", "mesh", donate=(0,)
    )
    plan: Program = program_field(make_plan, "config", "method", "mesh")
    score: Program = program_field(score, "config", "method", "mesh")
    start: Program = program_field(start, "flags", "options", "room", "mesh", donate=(0,))
    decode: Program = program_field(
        decode, "config", "method", "flags", "options", "mesh", donate=(0,)
    )

    evict: EvictionPrograms = dataclasses.field(default_factory=EvictionPrograms)

    def _all(self) -> tuple[Program, ...]:
        core = (self.prefill, self.extend, self.plan, self.score, self.start, self.decode)
        return (*core, *self.evict.all())

    def clear(self) -> None:
        """Forget every executable: each is mappings of memory, of which Linux allows 65,530."""
        for program in self._all():
            program.clear()

    @property
    def compilations(self) -> int:
        return sum(program.compilations for program in self._all())

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self._all())


# Shared by all models of the process, as jit's own cache would be.
PROGRAMS = Programs()
