"""One run of the core from tokens to tokens: phases in order, each timed, errors before work.

`generate.py` holds the programs; this file drives them from the host, on the mesh that the
parameters lie on where they do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from popjax import cache as kv
from popjax import renumbering, sharding
from popjax.buckets import bucket
from popjax.calibration.prepared import prepared
from popjax.config import ModelConfig
from popjax.depth.applied import applied
from popjax.depth.method import DepthPlan
from popjax.eviction.pool import alignment
from popjax.generate import PROGRAMS, DecodeState, Masks
from popjax.implementation import chosen_implementation
from popjax.methods import Method, check_evaluated
from popjax.nonfinite import not_finite
from popjax.packing import pack
from popjax.prefilling import Prefill, after_eviction, prefilled
from popjax.refreshing import Refresher
from popjax.request import Request, settled
from popjax.sampling import SamplingValues, row_keys
from popjax.sparsity import Params, Partitions


@dataclasses.dataclass
class RunResult:
    """Arrays of a finished run, one row a prompt, and what the run decided and cost.

    tokens [B, n]; counts [B] tokens of each row up to its end token; stopped [B] whether a row met
    one. partition indexes the full F channels; masks [steps, B, R+C] a layer, entry i being the
    step that produced token i+1; logits [B, n, V]. seconds: compile, prefill, evict, plan, pack,
    decode.
    implementation: how decode steps were computed, a name of masked_mlp.IMPLEMENTATIONS. kept: what
    an eviction left of the prompt, or of the context; None where nothing went, and then idle says
    why, where it was asked for; pooled_tokens: how many tokens these had, and those decoded since
    that were evicted among them. layers: those of
    the model that ran, which everything here is of; depth: what the prompts, of prompt_lengths
    after context_tokens, did at each, None where they ran all.
    """

    tokens: np.ndarray
    counts: np.ndarray
    stopped: np.ndarray
    partition: Partitions | None
    masks: Masks | None
    logprobs: np.ndarray | None
    logits: np.ndarray | None
    seconds: dict[str, float]
    steps: int
    compilations: int
    prompt_tokens: int
    cache_bytes: int
    packed_bytes: int
    implementation: str
    kept: kv.Kept | None = None
    idle: str | None = None
    pooled_tokens: int = 0
    layers: tuple[int, ...] = ()
    depth: DepthPlan | None = None
    prompt_lengths: tuple[int, ...] = ()
    context_tokens: int = 0


class _Clock:
    """Wall-clock of each phase, with compilation taken out and added up apart."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        compiled, started = PROGRAMS.compile_seconds, time.perf_counter()
        yield
        compiling = PROGRAMS.compile_seconds - compiled
        spent = time.perf_counter() - started - compiling
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


def run(params: Params, config: ModelConfig, request: Request) -> RunResult:
    """Generate from token prompts.

    Raises ValueError, before anything is compiled, for a request that the model cannot serve, and
    after prefill or decode for channel scores or logits that are not finite.
    """
    mesh, whole = sharding.mesh_of(params, config), (params, config)
    request, params, config, layers = applied(request, params, config, mesh)
    request, params, decoding = prepared(request, params, config, mesh, (*whole, layers))
    method = request.method.for_model(config)
    request = settled(request, config, method)
    implementation = chosen_implementation(request, params, mesh)
    options = dataclasses.replace(request.options, implementation=implementation)
    request = dataclasses.replace(request, options=options)
    clock, compiled = _Clock(), PROGRAMS.compilations
    asked = _prefill(request, config, method, mesh)
    inputs, keys, values = asked.inputs(), *_arguments(request, config, mesh)
    partition = renumbering.to_shards(request.partition, config, mesh)
    replay = renumbering.masks_to_shards(request.masks, request.partition, config, mesh)
    rows, room = len(request.prompts), asked.room
    with clock.phase("prefill"):
        outputs = prefilled(params, asked, inputs, partition)
        jax.block_until_ready(outputs)
    with clock.phase("evict"):
        outputs, kept = after_eviction(params, asked, outputs)
        jax.block_until_ready(kept)
    with clock.phase("plan"):
        if partition is None:
            partition = plan_channels(outputs.statistics, config, method, mesh, params)
    params = decoding
    packed_params, packed_config, packed = params, config, None
    with clock.phase("pack"):
        if partition is not None:
            packed_params, packed_config, packed = pack(
                params, config, partition, mesh, copy=request.options.pack
            )
            jax.block_until_ready(packed_params)
    with clock.phase("decode"):
        static = {"flags": request.sampling.flags(), "options": request.options, "mesh": mesh}
        buffers = _mask_buffers(request, packed, rows, room, mesh)
        state = PROGRAMS.start(
            outputs.cache, outputs.logits, inputs, keys, buffers, values, **static, room=room
        )
        del outputs
        static |= {"config": packed_config, "method": method}
        refresh = _refresher(request, packed_params, packed, packed_config, method, asked)
        arguments = (packed_params, packed, replay, values)
        state, kept, entered = _decode(state, arguments, kept, static, request, refresh)
    _check_finite(state, params)
    compilations = PROGRAMS.compilations - compiled
    extra = _extra_bytes(params, packed_params)
    partition = renumbering.from_shards(partition, config, mesh)
    masks = renumbering.masks_from_shards(state.masks, partition, config, mesh)
    state = dataclasses.replace(state, masks=masks)
    result = _result(request, state, partition, kept, clock, compilations, extra)
    plan = None if request.depth is None else request.depth.plan(config)
    pooled = result.pooled_tokens + entered
    idle = None
    if asked.eviction is not None and kept is None:
        idle = asked.eviction.idle(result.prompt_lengths)
    more = {"idle": idle, "pooled_tokens": pooled}
    return dataclasses.replace(result, layers=layers, depth=plan, **more)


def _prefill(request: Request, config: ModelConfig, method: Method, mesh: Mesh | None) -> Prefill:
    """How the prompts of a request are prefilled."""
    context = request.context
    return Prefill(
        prompts=request.prompts,
        config=config,
        method=method,
        eviction=request.eviction_for(config, mesh),
        room=bucket(request.max_new_tokens),
        chunk=request.prefill_chunk,
        kept=None if context is None else context.of_rows(len(request.prompts)),
        offset=0 if context is None else len(context.tokens),
        mesh=mesh,
        align=alignment(request.options.implementation),
        depth=request.depth,
    )


def _arguments(
    request: Request, config: ModelConfig, mesh: Mesh | None
) -> tuple[jax.Array, SamplingValues]:
    """Random keys and sampling values where the programs want them."""
    keys = row_keys(request.seed, len(request.prompts))
    values = request.sampling.values(request.eos_ids, config.vocab_size)
    return sharding.placed((keys, values), ("B", ""), mesh)


def plan_channels(
    statistics: tuple[Any, ...],
    config: ModelConfig,
    method: Method,
    mesh: Mesh | None = None,
    params: Params | None = None,
) -> Partitions | None:
    """The method's partition of every layer, None for dense; ValueError for scores not finite."""
    plan, finite = PROGRAMS.plan(statistics, config=config, method=method, mesh=mesh)
    bad = np.flatnonzero(~np.asarray(finite)).tolist()
    if bad:
        what = f"channel scores of layers {bad[:8]} are not finite for this prompt"
        raise not_finite(what, params)
    check_evaluated(method, config, [part.evaluated for part in plan.channels or ()])
    return plan.channels


def _check_finite(state: DecodeState, params: Params) -> None:
    bad = np.flatnonzero(~np.asarray(state.finite)).tolist()
    if bad:
        raise not_finite(f"logits of rows {bad[:8]} are not finite", params)


def _mask_buffers(
    request: Request, packed: Partitions | None, rows: int, room: int, mesh: Mesh | None
) -> Masks | None:
    if packed is None or not request.options.record_masks:
        return None
    device = None if mesh is None else sharding.named("TBF", mesh)
    shapes = ((room - 1, rows, renumbering.mask_columns(part, mesh)) for part in packed)
    return tuple(jnp.zeros(shape, bool, device=device) for shape in shapes)


def _refresher(
    request: Request,
    params: Params,
    partition: Partitions | None,
    config: ModelConfig,
    method: Method,
    asked: Prefill,
) -> Refresher | None:
    """What cuts the cache to its budget again while decoding, where that is asked for."""
    if request.evict_every is None or asked.eviction is None:
        return None
    every = request.evict_every
    return Refresher(params, partition, config, method, asked.eviction, every, asked.align)


def _decode(
    state: DecodeState,
    arguments: tuple[Any, ...],
    kept: kv.Kept | None,
    static: dict[str, Any],
    request: Request,
    refresh: Refresher | None,
) -> tuple[DecodeState, kv.Kept | None, int]:
    """Decode in one go, or in pieces where somebody listens or the cache is evicted again.

    Also how many new tokens of all rows were evicted among. Tokens do not depend on who listens.
    """
    total, mesh, entered = request.max_new_tokens, static["mesh"], 0
    # A prompt that stayed whole lies where new tokens do, and was counted with the prompts.
    counted = _prompt_tokens(request) if kept is None else 0
    due = total if refresh is None else refresh.every + 1
    while True:
        until = min(due, total)
        if request.on_chunk is not None:
            done = np.asarray(state.done)
            stop = request.on_chunk(np.asarray(state.tokens)[:, : int(state.step)], done)
            stopped = sharding.placed(jnp.asarray(done | stop), "B", mesh)
            state = dataclasses.replace(state, done=stopped)
            until = min(int(state.step) + request.chunk, until)
        if int(state.step) >= total or bool(np.all(np.asarray(state.done))):
            return state, kept, entered
        limit = sharding.placed(jnp.int32(until), "", mesh)
        state = PROGRAMS.decode(state, *arguments, kept, limit, **static)
        jax.block_until_ready(state)
        if refresh is not None and due <= int(state.step) < total:
            entered += int(np.sum(np.asarray(state.cache.positions) >= 0)) - counted
            state, kept, counted = *refresh(state, kept), 0
            due += refresh.every


def _extra_bytes(params: Params, packed: Params) -> int:
    """Bytes of packed arrays that are held beside the model's own."""
    own = {id(leaf) for leaf in jax.tree.leaves(params)}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(packed) if id(leaf) not in own)


def _result(
    request: Request,
    state: DecodeState,
    partition: Partitions | None,
    kept: kv.Kept | None,
    clock: _Clock,
    compilations: int,
    packed_bytes: int,
) -> RunResult:
    steps = int(state.step)
    tokens = np.asarray(state.tokens)[:, :steps]
    ends = np.isin(tokens, request.eos_ids) if request.eos_ids else np.zeros(tokens.shape, bool)
    stopped = np.any(ends, axis=1)
    counts = np.where(stopped, ends.argmax(axis=1) + 1, steps)
    masks = None if state.masks is None else tuple(m[: steps - 1] for m in state.masks)
    return RunResult(
        tokens=tokens,
        counts=counts,
        stopped=stopped,
        partition=partition,
        masks=masks,
        logprobs=None if state.logprobs is None else np.asarray(state.logprobs)[:, :steps],
        logits=None if state.logits is None else np.asarray(state.logits)[:, :steps],
        seconds=clock.seconds,
        steps=steps,
        compilations=compilations,
        prompt_tokens=_prompt_tokens(request),
        prompt_lengths=tuple(len(prompt) for prompt in request.prompts),
        context_tokens=len(request.context.tokens) if request.context else 0,
        cache_bytes=kv.bytes_held(dataclasses.replace(state.cache, kept=kept)),
        packed_bytes=packed_bytes,
        implementation=request.options.implementation or "",
        kept=kept,
        pooled_tokens=len(request.context.tokens) if request.context else _prompt_tokens(request),
    )


def _prompt_tokens(request: Request) -> int:
    return sum(len(prompt) for prompt in request.prompts)
