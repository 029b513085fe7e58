"""Sections of `bench_decode` about the CPU kernels: bandwidth, scattered rows, batches, choosing.

Interleaved like all others: the plain read that a share is taken of runs in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masked_mlp import native as native_mlp
from kernels_pallas.native.measure import SCATTERED, read_bandwidth
from popjax.bench import Spread, interleaved, speedup_text
from popjax.generate import Options
from popjax.methods import Method, OnlinePruning, RescoreAll
from popjax.report import bytes_per_token
from popjax.run import Request, run
from popjax.sparsity import ChannelPartition, Params, Partitions
from scripts.bench_models import BenchModel, as_dtype, random_prompt

BATCHES = (1, 4, 16)


def bandwidth_section(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """Dense decode in float32 and bfloat16 and with scattered rows, as a share of plain reading."""
    half = as_dtype(model.params, jnp.bfloat16)
    scattered = _scattered_request(model, asked)
    dense = Request([random_prompt(model.config, asked.prompt_tokens)], asked.new_tokens)
    cases: dict[str, tuple[Params, Request, int]] = {
        "float32": (model.params, dense, bytes_per_token(model.config, model.params)),
        "bfloat16": (half, dense, bytes_per_token(model.config, half)),
        f"{SCATTERED:.0%} of the rows": (model.params, scattered, _scattered_bytes(model)),
    }
    measures: dict[str, Callable[[], float]] = {
        name: functools.partial(_step_seconds, model, *case[:2]) for name, case in cases.items()
    }
    width = model.config.embed_dim
    measures["read"] = lambda: 1 / read_bandwidth(rounds=3)
    measures["read rows"] = lambda: 1 / read_bandwidth(rounds=3, width=width, share=SCATTERED)
    found = {k: Spread(tuple(v)) for k, (_, v) in interleaved(measures, asked.rounds).items()}
    values: dict[str, Any] = {"read_seconds_a_byte": found["read"].to_json()}
    print(f"  plain reading: {Spread(tuple(1e-9 / s for s in found['read'].rounds))} GB/s")
    for name, (_, _, size) in cases.items():
        pairs = zip(found["read"].rounds, found[name].rounds, strict=True)
        share = Spread(tuple(size * reading / step for reading, step in pairs))
        ratio = found["float32"].over(found[name])
        allowed = cases["float32"][2] / size
        values[name] = {
            **found[name].to_json(),
            "share_of_reading": share.to_json(),
            "ratio_to_dense": ratio.to_json(),
            "bytes_ratio": allowed,
        }
        print(
            f"  {name}: {Spread(tuple(1e3 * s for s in found[name].rounds))} ms a step, {share} of "
            f"plain reading; {speedup_text(ratio)}, bytes allow {allowed:.2f}"
        )
    values["read_rows_allow"] = _reading_allows(model, cases["float32"][2], found).to_json()
    return values


def _reading_allows(model: BenchModel, dense: int, found: dict[str, Spread]) -> Spread:
    """How many times faster than dense a step could be if all it did were read its rows by index.

    Memory serves scattered rows more slowly than whole arrays: whatever does the arithmetic.
    """
    rows = SCATTERED * sum(
        3 * layer.mlp_dim * model.config.embed_dim * model.params["embed"]["table"].dtype.itemsize
        for layer in model.config.layers
    )
    others = dense - rows / SCATTERED
    pairs = zip(found["read"].rounds, found["read rows"].rounds, strict=True)
    allowed = Spread(tuple(dense * a / (others * a + rows * b) for a, b in pairs))
    share = found["read"].over(found["read rows"])
    print(
        f"  reading {SCATTERED:.0%} of the rows alone: {share} of plain reading, which allows "
        f"{allowed}x"
    )
    return allowed


def batch_section(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """Decode steps of a batch: the chosen form against XLA alone, and online pruning against it."""
    values: dict[str, Any] = {}
    for batch in BATCHES:
        prompts = [random_prompt(model.config, asked.prompt_tokens)] * batch
        cases: dict[str, tuple[Method, str | None]] = {
            "dense": (Method(), None),
            "dense through XLA": (Method(), "xla"),
            "online-pruning": (OnlinePruning(ratio=asked.ratio), None),
        }
        measures = {}
        for name, (method, implementation) in cases.items():
            options = Options(implementation=implementation)
            request = Request(prompts, asked.new_tokens, method=method, options=options)
            measures[name] = functools.partial(_step_seconds, model, model.params, request)
        found = {k: Spread(tuple(v)) for k, (_, v) in interleaved(measures, asked.rounds).items()}
        values[str(batch)] = {name: spread.to_json() for name, spread in found.items()}
        over_xla = found["dense through XLA"].over(found["dense"])
        pruned = found["dense"].over(found["online-pruning"])
        print(
            f"  batch {batch}: dense {found['dense'].median * 1e3:.1f} ms a step, "
            f"{speedup_text(over_xla)} than XLA alone; online-pruning {speedup_text(pruned)}"
        )
    return values


def choosing_section(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """What choosing the best half of all channels costs, as a share of a dense decode step."""
    widths = [layer.mlp_dim for layer in model.config.layers]
    scores = [jnp.asarray(np.random.default_rng(i).random((1, 1, F))) for i, F in enumerate(widths)]
    scores = [score.astype(jnp.float32) for score in scores]
    choose = jax.jit(lambda xs: [native_mlp.select_top(x, x.shape[-1] // 2) for x in xs])
    dense = Request([random_prompt(model.config, asked.prompt_tokens)], asked.new_tokens)

    def choosing() -> float:
        started = time.perf_counter()
        for _ in range(asked.new_tokens):
            jax.block_until_ready(choose(scores))
        return (time.perf_counter() - started) / asked.new_tokens

    step = functools.partial(_step_seconds, model, model.params, dense)
    results = interleaved({"choosing": choosing, "step": step}, asked.rounds)
    found = {k: Spread(tuple(v)) for k, (_, v) in results.items()}
    share = found["choosing"].over(found["step"])
    print(f"  choosing {widths[0] // 2} of {widths[0]} in {len(widths)} layers: {share} of a step")
    return {**{k: v.to_json() for k, v in found.items()}, "share": share.to_json()}


def _step_seconds(model: BenchModel, params: Params, request: Request) -> float:
    result = run(params, model.config, request)
    return result.seconds["decode"] / (result.steps - 1)


def _scattered(model: BenchModel) -> Partitions:
    return tuple(
        ChannelPartition(
            jnp.zeros((0,), jnp.int32),
            jnp.arange(layer.mlp_dim, dtype=jnp.int32),
            k_selected=int(SCATTERED * layer.mlp_dim),
        )
        for layer in model.config.layers
    )


def _scattered_request(model: BenchModel, asked: argparse.Namespace) -> Request:
    """Dense weights and a random set of rows for every token and layer, given from outside."""
    rng, partition = np.random.default_rng(3), _scattered(model)
    masks = []
    for layer, part in zip(model.config.layers, partition, strict=True):
        order = rng.permuted(
            np.tile(np.arange(layer.mlp_dim), (asked.new_tokens - 1, 1, 1)), axis=-1
        )
        masks.append(jnp.asarray(order < part.k_selected))
    base = Request([random_prompt(model.config, asked.prompt_tokens)], asked.new_tokens)
    method = RescoreAll(1 - SCATTERED)
    return dataclasses.replace(base, method=method, partition=partition, masks=tuple(masks))


def _scattered_bytes(model: BenchModel) -> int:
    dense = bytes_per_token(model.config, model.params)
    row = 3 * model.config.embed_dim * model.params["embed"]["table"].dtype.itemsize
    unread = sum(layer.mlp_dim - int(SCATTERED * layer.mlp_dim) for layer in model.config.layers)
    return dense - unread * row
