"""Time to first token with layers skipped in prefill, against dense and the ratio of their FLOPs.

    python -m scripts.bench_prefill --contexts 512 2048 8192 --json prefill.json
    python -m scripts.bench_prefill --random --layers 3 --contexts 2048

Batch 1. Both are interleaved round by round in one process; the time is that of a run that yields
one token: prefill and the choice of the token, compilation apart. Contexts may exceed what the
model was trained for: time does not depend on it. Leaves out quality (`depth_quality.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from popjax.bench import DENSE, Spread, interleaved, speedup_text
from popjax.config import ModelConfig
from popjax.depth import PrefillPruning
from popjax.depth.cost import prefill_flops
from popjax.depth.method import DepthMethod
from popjax.run import Request, RunResult, run
from scripts.bench_kv import stretched
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

SKIPPED = "prefill-pruning"
# A prompt's logits are those of one token; decoding it takes the rest.
PHASES = ("prefill", "evict", "plan", "pack", "decode")


def first_token(result: RunResult) -> float:
    """Seconds from tokens in to the first token out."""
    return sum(result.seconds[phase] for phase in PHASES)


def measured(
    model: BenchModel, config: ModelConfig, depth: DepthMethod, asked: argparse.Namespace,
    tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Seconds to the first token of dense and skipping runs, and what their FLOPs allow."""
    dense = Request([random_prompt(config, tokens)], 1, prefill_chunk=asked.prefill_chunk)
    requests = {DENSE: dense, SKIPPED: dataclasses.replace(dense, depth=depth)}
    runs = interleaved(
        {k: functools.partial(run, model.params, config, v) for k, v in requests.items()},
        asked.rounds,
    )
    times = {k: Spread(tuple(first_token(r) for r in found)) for k, (_, found) in runs.items()}
    ratio = times[DENSE].over(times[SKIPPED])
    plan = runs[SKIPPED][0].depth
    ideal = prefill_flops(config, [tokens]) / prefill_flops(config, [tokens], plan)
    print(
        f"  {tokens} tokens: dense {times[DENSE]} s, skipping {times[SKIPPED]} s; "
        f"{speedup_text(ratio)}; FLOPs allow {ideal:.3f}, share {ratio.median / ideal:.3f}",
        flush=True,
    )
    values: dict[str, Any] = {name: spread.to_json() for name, spread in times.items()}
    return {**values, "ratio": ratio.to_json(), "ideal": ideal, "share": ratio.median / ideal}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT, help="as scripts.bench_models.named_model")
    parser.add_argument("--random", action="store_true", help="layers as wide as Llama-3.2-1B's")
    parser.add_argument("--layers", type=int, default=6, help="how many, with --random")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--skip", type=float, help="share of the layers (a third)")
    parser.add_argument("--prefill-chunk", type=int, help="run prompts so many tokens at a time")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write every round's numbers here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    if asked.random:
        model = random_model({**LLAMA_1B, "num_hidden_layers": asked.layers})
        name = f"{asked.layers} random layers as wide as Llama-3.2-1B's"
    else:
        model, name = named_model(asked.model), asked.model
    model = dataclasses.replace(model, params=as_dtype(model.params, jnp.dtype(asked.dtype)))
    values: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count(), "model": name}
    values |= {"dtype": asked.dtype, "skip": asked.skip, "contexts": {}}
    print(f"{name}, {asked.dtype}:", flush=True)
    for tokens in asked.contexts:
        config = stretched(model.config, tokens + 1)
        depth = PrefillPruning(skip=asked.skip)
        values["contexts"][str(tokens)] = measured(model, config, depth, asked, tokens)
    if asked.json is not None:
        write_json(asked.json, values)


if __name__ == "__main__":
    main()
