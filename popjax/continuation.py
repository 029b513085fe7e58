"""Scoring a given continuation under decode-time pruning: the `split` protocol, teacher-forced.

The prefix is prefilled and decides the partition; the continuation is then decoded token by token
on the packed weights, all its steps in one call, each masked as its own. Scoring prefix and
continuation in one prefill would exercise no decode-time sparsity at all. Leaves out text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popjax import cache as kv
from popjax import renumbering, sharding
from popjax.buckets import bucket
from popjax.calibration.prepared import prepared
from popjax.config import ModelConfig
from popjax.depth import DepthMethod
from popjax.depth.applied import applied
from popjax.eviction import KvMethod
from popjax.generate import PROGRAMS
from popjax.methods import Method
from popjax.nn.transformer import Inputs
from popjax.packing import pack
from popjax.prefilling import Prefill, after_eviction, prefilled
from popjax.request import Request, settled
from popjax.run import plan_channels
from popjax.sparsity import Params, Partitions


def continuation_logprobs(
    params: Params,
    config: ModelConfig,
    method: Method,
    prefix_ids: Sequence[int],
    continuation_ids: Sequence[int],
    eviction: KvMethod | None = None,
    depth: DepthMethod | None = None,
) -> np.ndarray:
    """Natural log-probability [n] float32 of each of n continuation tokens after the prefix.

    The first comes from the prefill's logits, the others from n - 1 decode steps under `method`.
    Raises ValueError for what the model cannot serve and for an empty or foreign continuation.
    """
    given = [prefix_ids], [continuation_ids]
    options: dict[str, Any] = {"eviction": eviction, "depth": depth}
    logits = continuation_logits(params, config, method, *given, **options)
    tokens = jnp.asarray(np.asarray(continuation_ids, np.int32))
    padded = jnp.zeros((logits.shape[1],), jnp.int32).at[: len(continuation_ids)].set(tokens)
    return np.asarray(token_logprobs(logits[0], padded))[: len(continuation_ids)]


def continuation_logits(
    params: Params,
    config: ModelConfig,
    method: Method,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    partition: Partitions | None = None,
    eviction: KvMethod | None = None,
    depth: DepthMethod | None = None,
) -> jax.Array:
    """Logits [B, n', V] float32 that predict each continuation token, n' at least the longest n.

    Row b is meaningful up to its own length. One prefix may have several continuations: it is run
    once. Rows share a partition as in generation; `partition` replaces the one that the prefixes
    would decide. With an `eviction` the continuation sees what
    stays of the prefix; `depth` says which layers the prefix skips. Raises ValueError as
    `continuation_logprobs`.
    """
    mesh, whole = sharding.mesh_of(params, config), (params, config)
    given = Request(prefixes, 1, method, partition=partition, eviction=eviction, depth=depth)
    given, params, config, layers = applied(given, params, config, mesh)
    given, params, decoding = prepared(given, params, config, mesh, (*whole, layers))
    method = method.for_model(config)
    asked = _checked(config, dataclasses.replace(given, method=method), continuations)
    partition = renumbering.to_shards(asked.partition, config, mesh)
    static: dict[str, Any] = {"method": method, "mesh": mesh}
    steps = max(len(row) for row in continuations) - 1
    room = bucket(steps) if steps else 0
    prompts = Prefill(
        prefixes,
        config,
        method,
        asked.eviction_for(config, mesh),
        room=room,
        mesh=mesh,
        depth=asked.depth,
    )
    outputs = prefilled(params, prompts, prompts.inputs(), partition)
    outputs, kept = after_eviction(params, prompts, outputs)
    first = outputs.logits[:, None, :]
    rows = len(continuations)
    if rows > len(prefixes):
        first = jnp.broadcast_to(first, (rows, *first.shape[1:]))
    if not steps:
        return first
    if partition is None:
        partition = plan_channels(outputs.statistics, config, method, mesh, params)
    params = decoding
    if partition is not None:
        params, config, partition = pack(params, config, partition, mesh)
    steps_in = sharding.placed(_given_tokens(prefixes, continuations, room), "B", mesh)
    cache = dataclasses.replace(outputs.cache, kept=kept)
    cache = kv.repeated(cache, rows) if rows > len(prefixes) else cache
    rest = PROGRAMS.score(params, steps_in, cache, partition, config=config, **static)
    return jnp.concatenate([first, rest], axis=1)


@jax.jit
def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Natural log-probability [n] of tokens [n] under logits [n, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _given_tokens(
    prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], room: int
) -> Inputs:
    """Inputs [B, room] of all but the last token of each row, left-aligned: step t is column t."""
    tokens = np.zeros((len(continuations), room), np.int32)
    positions = np.full((len(continuations), room), -1, np.int32)
    shared = len(prefixes) < len(continuations)
    prefixes = [prefixes[0]] * len(continuations) if shared else prefixes
    for row, (prefix, given) in enumerate(zip(prefixes, continuations, strict=True)):
        n = len(given) - 1
        tokens[row, :n] = given[:n]
        positions[row, :n] = len(prefix) + np.arange(n)
    return Inputs(jnp.asarray(tokens), jnp.asarray(positions))


def _checked(
    config: ModelConfig, request: Request, continuations: Sequence[Sequence[int]]
) -> Request:
    """The request as it will be used; ValueError for anything that cannot be scored."""
    prefixes = request.prompts
    shared = len(prefixes) == 1 and len(continuations) > 1
    if not shared and len(prefixes) != len(continuations):
        raise ValueError(
            f"{len(prefixes)} prefixes for {len(continuations)} continuations: give as many of "
            "each, or one prefix for all"
        )
    for i, row in enumerate(continuations):
        if not len(row):
            raise ValueError(f"continuation {i} has no tokens: give at least one to score")
        if not 0 <= min(row) <= max(row) < config.vocab_size:
            raise ValueError(
                f"continuation {i} has a token id outside 0..{config.vocab_size - 1}: "
                "encode it with this model's tokenizer"
            )
    longest = max((len(row) for row in continuations), default=1)
    request = dataclasses.replace(request, max_new_tokens=longest)
    return settled(request, config, request.method)
