"""Cache eviction on this machine: its share of a prefill, decode steps after it, and bytes held.

    python -m scripts.bench_kv --sections share --contexts 8192 --json share.json
    python -m scripts.bench_kv --sections decode --context 32768 --json decode.json

Batch 1, greedy. What is compared is interleaved round by round in one process and shown as a median
with its spread. Contexts may exceed what the model was trained for: time does not depend on it.
Leaves out quality (`kv_quality.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.choice import implementation_for
from popjax.bench import DENSE, Spread, interleaved, speedup_text
from popjax.cache import Kept
from popjax.config import ModelConfig
from popjax.eviction import KV_METHODS, KvMethod, kv_method_named
from popjax.generate import Options
from popjax.methods import OnlinePruning
from popjax.packing import pack
from popjax.report import bytes_per_token, make_report
from popjax.run import Request, RunResult, run
from scripts.bench_models import (
    DEFAULT,
    LLAMA_1B,
    BenchModel,
    as_dtype,
    named_model,
    random_model,
    random_prompt,
)
from scripts.quality import write_json
from scripts.random_cache import Decoding, random_kept

SECTIONS = ("share", "decode")
PRUNED = "and online-pruning"


def stretched(config: ModelConfig, tokens: int) -> ModelConfig:
    """The config with a context of at least `tokens`."""
    return dataclasses.replace(config, max_positions=max(config.max_positions, tokens))


def held_over_kept(kept: Kept) -> tuple[list[float], float]:
    """Bytes of the arrays over kept entries times bytes of a key and a value: by layer, and whole.

    Rows of the pool that no head uses are shared out between layers as those in use are.
    """
    starts, lengths = (np.asarray(x).reshape(len(x), -1) for x in (kept.starts, kept.lengths))
    capacity, width = kept.entries.shape
    entry = width * kept.entries.dtype.itemsize
    ends = np.append(starts[1:, 0], starts[-1, -1] + lengths[-1, -1])
    rows = (ends - starts[:, 0]) * (capacity / ends[-1])
    places = (kept.starts.nbytes + kept.lengths.nbytes) / len(starts)
    held = rows * (entry + kept.positions.dtype.itemsize) + places
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) / (lengths.sum() * entry)
    return (held / (lengths.sum(axis=1) * entry)).tolist(), float(whole)


def bytes_values(kept: Kept) -> dict[str, Any]:
    """`held_over_kept` printed, and as JSON values."""
    layers, whole = held_over_kept(kept)
    median = statistics.median(layers)
    print(
        f"  bytes held over kept entries x entry bytes: median layer {median:.3f}, most "
        f"{max(layers):.3f}, whole {whole:.3f}"
    )
    return {"layers": layers, "median": median, "whole": whole}


def share_section(model: BenchModel, method: KvMethod, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of scoring, selecting and moving, and what observing adds, over a dense prefill."""
    values: dict[str, Any] = {}
    for tokens in asked.contexts:
        config = stretched(model.config, tokens + 1)
        dense = Request([random_prompt(config, tokens)], 1, prefill_chunk=asked.prefill_chunk)
        requests = {DENSE: dense, asked.kv: dataclasses.replace(dense, eviction=method)}
        runs = interleaved(
            {k: functools.partial(run, model.params, config, v) for k, v in requests.items()},
            asked.rounds,
        )
        found = _shares([r for _, r in runs.values()])
        print(
            f"  {tokens} tokens: dense prefill {found['prefill']} s; score + select + compact "
            f"{found['evict']} of it, observing {found['observe']} of it"
        )
        kept = runs[asked.kv][0].kept
        assert kept is not None, "a budget below the prompt evicts"
        values[str(tokens)] = {name: spread.to_json() for name, spread in found.items()}
        values[str(tokens)]["bytes_held"] = bytes_values(kept)
    return values


def _shares(runs: Sequence[Sequence[RunResult]]) -> dict[str, Spread]:
    """Seconds of the dense prefill, and what eviction adds as shares of that round's."""
    dense, evicting = runs
    prefill = Spread(tuple(r.seconds["prefill"] for r in dense))
    with_observing = Spread(tuple(r.seconds["prefill"] for r in evicting)).over(prefill)
    evict = Spread(tuple(r.seconds["evict"] for r in evicting)).over(prefill)
    observe = Spread(tuple(ratio - 1 for ratio in with_observing.rounds))
    return {"prefill": prefill, "evict": evict, "observe": observe}


def decode_section(
    model: BenchModel, method: KvMethod, asked: argparse.Namespace
) -> dict[str, Any]:
    """Whole decode steps at a long context: dense, with an evicted cache, and pruned as well."""
    tokens, new = asked.context, asked.new_tokens
    kept_name, config = f"{asked.kv} {asked.keep:.0%}", stretched(model.config, tokens + new)
    implementation = implementation_for(None, model.params, model.params["layer_0"]["mlp"]["down"])
    common: dict[str, Any] = {"options": Options(implementation=implementation)}
    kept = random_kept(method, config, tokens, model.params["embed"]["table"].dtype)
    pruning = OnlinePruning(ratio=asked.ratio)
    short = run(model.params, config, Request([random_prompt(config, 64)], 2, method=pruning))
    assert short.partition is not None, "a pruning method plans a partition"
    packed, narrow, partition = pack(model.params, config, short.partition)
    cases = {
        DENSE: Decoding(model.params, config, tokens, new, **common),
        kept_name: Decoding(model.params, config, tokens, new, kept=kept, **common),
        f"{kept_name} {PRUNED}": Decoding(
            packed, narrow, tokens, new, kept=kept, method=pruning, partition=partition, **common
        ),
    }
    dense_bytes = bytes_per_token(config, model.params)
    pruned_bytes = make_report(
        model="", method="", config=config, params=model.params, result=short, load_seconds=0.0
    ).read_bytes_per_token
    read = dict(zip(cases, (dense_bytes, dense_bytes, pruned_bytes), strict=True))
    for name, case in cases.items():
        numbers = cache_numbers_read(config, tokens, new, case.kept)
        read[name] += numbers * kept.entries.dtype.itemsize
    measures = {name: case.seconds for name, case in cases.items()}
    steps = {k: Spread(tuple(v)) for k, (_, v) in interleaved(measures, asked.rounds).items()}
    values: dict[str, Any] = {"context": tokens, "implementation": implementation}
    values["cases"] = {name: _against_dense(name, steps, read) for name in cases}
    return {**values, "bytes_held": bytes_values(kept)}


def cache_numbers_read(config: ModelConfig, tokens: int, new: int, kept: Kept | None) -> int:
    """Numbers in the keys and values that a step reads, halfway through `new` tokens."""
    total = 0
    for i, layer in enumerate(config.layers):
        entries = layer.num_kv_heads * min(tokens, layer.window or tokens)
        if kept is not None:
            entries = int(np.asarray(kept.lengths[i]).sum())
        total += 2 * layer.head_dim * (entries + layer.num_kv_heads * (new // 2))
    return total


def _against_dense(name: str, steps: dict[str, Spread], read: dict[str, int]) -> dict[str, Any]:
    """One case's step as JSON values, printed; a share of what bytes allow only where faster."""
    values = {"step_seconds": steps[name].to_json(), "read_bytes": read[name]}
    shown = f"  {name}: {Spread(tuple(1e3 * s for s in steps[name].rounds))} ms a step"
    if name == DENSE:
        print(f"{shown}, reads {read[name] / 1e6:.0f} MB")
        return values
    ratio, allowed = steps[DENSE].over(steps[name]), read[DENSE] / read[name]
    values |= {"ratio_to_dense": ratio.to_json(), "bytes_ratio": allowed}
    values["speedup"] = speedup_text(ratio)
    line = f"{shown}; {values['speedup']}; bytes allow {allowed:.2f}"
    if ratio.low > 1:
        values["share_of_bytes_ratio"] = ratio.median / allowed
        line += f", share reached {values['share_of_bytes_ratio']:.2f}"
    print(line)
    return values


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--random", action="store_true", help="random layers of 1B-class width")
    parser.add_argument("--layers", type=int, default=2, help="how many with --random")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--kv", choices=list(KV_METHODS), default="laprox")
    parser.add_argument("--keep", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192], help="of section share")
    parser.add_argument("--prefill-chunk", type=int, help="of section share")
    parser.add_argument("--context", type=int, default=32768, help="of section decode")
    parser.add_argument("--new-tokens", type=int, default=32, help="of section decode")
    parser.add_argument("--ratio", type=float, default=0.5, help="FFN ratio of the pruned case")
    parser.add_argument("--json", type=Path, help="also write every round's numbers here")
    asked = parser.parse_args(argv)
    if asked.keep >= 1:
        parser.error(f"--keep {asked.keep:g} evicts nothing: give a share below 1")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    if asked.random:
        model = random_model({**LLAMA_1B, "num_hidden_layers": asked.layers})
        name = f"{asked.layers} random layers as wide as Llama-3.2-1B's"
        print(f"{name}: shares of a prefill are as in the whole model, whose layers are alike")
    else:
        model, name = named_model(asked.model), asked.model
    params = as_dtype(model.params, jnp.dtype(asked.dtype))
    model = dataclasses.replace(model, params=params)
    del params
    method = kv_method_named(asked.kv, keep=asked.keep).for_model(model.config)
    measured: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count(), "model": name}
    measured |= {"dtype": asked.dtype, "kv": asked.kv, "keep": asked.keep}
    sections = {"share": share_section, "decode": decode_section}
    for section in asked.sections:
        print(f"{name}, {section}:", flush=True)
        measured[section] = sections[section](model, method, asked)
    if asked.json is not None:
        write_json(asked.json, measured)


if __name__ == "__main__":
    main()
