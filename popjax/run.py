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

from kernels_pallas.choice import implementation_for
from kernels_pallas.masked_mlp import PALLAS
from popjax import cache as kv
from popjax import renumbering, sharding
from popjax.config import ModelConfig
from popjax.generate import PROGRAMS, DecodeState, Masks, bucket, left_padded
from popjax.methods import Method
from popjax.nn.transformer import Inputs
from popjax.packing import pack
from popjax.request import Request, settled
from popjax.sampling import SamplingValues, row_keys
from popjax.sparsity import Params, Partitions


@dataclasses.dataclass
class RunResult:
    """Arrays of a finished run, one row a prompt, and what the run decided and cost.

    tokens [B, n]; counts [B] tokens of each row up to its end token; stopped [B] whether a row met
    one. partition indexes the full F channels; masks [steps, B, R+C] a layer, entry i being the
    step that produced token i+1; logits [B, n, V]. seconds: compile, prefill, plan, pack, decode.
    implementation: how decode steps were computed, a name of masked_mlp.IMPLEMENTATIONS.
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
    method = request.method.for_model(config)
    mesh = sharding.mesh_of(params, config)
    request = settled(request, config, method)
    implementation = _implementation(request, params, mesh)
    options = dataclasses.replace(request.options, implementation=implementation)
    request = dataclasses.replace(request, options=options)
    clock, compiled = _Clock(), PROGRAMS.compilations
    inputs, keys, values = _arguments(request, config, mesh)
    partition = renumbering.to_shards(request.partition, config, mesh)
    replay = renumbering.masks_to_shards(request.masks, request.partition, config, mesh)
    rows, T = inputs.tokens.shape
    room = bucket(request.max_new_tokens)
    with clock.phase("prefill"):
        static = {"config": config, "method": method, "mesh": mesh}
        outputs = PROGRAMS.prefill(params, inputs, partition, **static, capacity=T + room)
        jax.block_until_ready(outputs)
    with clock.phase("plan"):
        partition = partition or plan_channels(outputs.statistics, config, method, mesh)
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
        state = _decode(state, (packed_params, packed, replay, values), static, request)
    _check_finite(state)
    compilations = PROGRAMS.compilations - compiled
    extra = _extra_bytes(params, packed_params)
    partition = renumbering.from_shards(partition, config, mesh)
    masks = renumbering.masks_from_shards(state.masks, partition, config, mesh)
    state = dataclasses.replace(state, masks=masks)
    return _result(request, state, partition, clock, compilations, extra)


def _implementation(request: Request, params: Params, mesh: Mesh | None) -> str:
    """What decode steps run on; ValueError where that cannot serve the request."""
    matrix = params["layer_0"]["mlp"]["down"]
    asked, vectors = request.options.implementation, len(request.prompts)
    found = implementation_for(asked, params, matrix, vectors)
    if request.options.pack:
        return found
    if mesh is not None or found not in PALLAS or (found != "pallas_gpu" and matrix.ndim == 2):
        raise ValueError(
            f"pack=False fetches rows by index, which {found!r} cannot from weights of shape "
            f"{matrix.shape} on {1 if mesh is None else mesh.size} device(s): load the model with "
            "tiles=True for 'pallas_tpu', or leave pack=True"
        )
    return found


def _arguments(
    request: Request, config: ModelConfig, mesh: Mesh | None
) -> tuple[Inputs, jax.Array, SamplingValues]:
    """Prompts, random keys and sampling values where the programs want them."""
    inputs = left_padded(request.prompts)
    keys = row_keys(request.seed, len(request.prompts))
    values = request.sampling.values(request.eos_ids, config.vocab_size)
    return sharding.placed((inputs, keys, values), ("B", "B", ""), mesh)


def plan_channels(
    statistics: tuple[Any, ...], config: ModelConfig, method: Method, mesh: Mesh | None = None
) -> Partitions | None:
    """The method's partition of every layer, None for dense; ValueError for scores not finite."""
    plan, finite = PROGRAMS.plan(statistics, config=config, method=method, mesh=mesh)
    bad = np.flatnonzero(~np.asarray(finite)).tolist()
    if bad:
        raise ValueError(
            f"channel scores of layers {bad[:8]} are not finite for this prompt: the weights or "
            "the dtype overflow; check the checkpoint (check_tensors=True) or load it in float32"
        )
    empty = [i for i, part in enumerate(plan.channels or ()) if part.evaluated == 0]
    if empty:
        raise ValueError(
            f"{method} leaves no FFN channel of layer {empty[0]}, which has "
            f"{config.layers[empty[0]].mlp_dim}: lower the ratio"
        )
    return plan.channels


def _check_finite(state: DecodeState) -> None:
    bad = np.flatnonzero(~np.asarray(state.finite)).tolist()
    if bad:
        raise ValueError(
            f"logits of rows {bad[:8]} are not finite: the weights or the dtype overflow; check "
            "the checkpoint (check_tensors=True) or load it in float32"
        )


def _mask_buffers(
    request: Request, packed: Partitions | None, rows: int, room: int, mesh: Mesh | None
) -> Masks | None:
    if packed is None or not request.options.record_masks:
        return None
    device = None if mesh is None else sharding.named("TBF", mesh)
    shapes = ((room - 1, rows, part.evaluated) for part in packed)
    return tuple(jnp.zeros(shape, bool, device=device) for shape in shapes)


def _decode(
    state: DecodeState, arguments: tuple[Any, ...], static: dict[str, Any], request: Request
) -> DecodeState:
    """Decode in one go, or in chunks where somebody listens; tokens are the same either way."""
    total, mesh = request.max_new_tokens, static["mesh"]
    while True:
        until = total
        if request.on_chunk is not None:
            done = np.asarray(state.done)
            stop = request.on_chunk(np.asarray(state.tokens)[:, : int(state.step)], done)
            stopped = sharding.placed(jnp.asarray(done | stop), "B", mesh)
            state = dataclasses.replace(state, done=stopped)
            until = min(int(state.step) + request.chunk, total)
        if int(state.step) >= total or bool(np.all(np.asarray(state.done))):
            return state
        limit = sharding.placed(jnp.int32(until), "", mesh)
        state = PROGRAMS.decode(state, *arguments, limit, **static)
        jax.block_until_ready(state)


def _extra_bytes(params: Params, packed: Params) -> int:
    """Bytes of packed arrays that are held beside the model's own."""
    own = {id(leaf) for leaf in jax.tree.leaves(params)}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(packed) if id(leaf) not in own)


def _result(
    request: Request,
    state: DecodeState,
    partition: Partitions | None,
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
        prompt_tokens=sum(len(prompt) for prompt in request.prompts),
        cache_bytes=kv.bytes_held(state.cache),
        packed_bytes=packed_bytes,
        implementation=request.options.implementation or "",
    )
