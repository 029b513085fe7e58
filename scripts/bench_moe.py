"""A mixture of experts on this machine: pruned against dense, and both phases against torch.

    python -m scripts.bench_moe --torch --json moe.json

Random layers of OLMoE-1B-7B's shape (64 experts of 1024 channels, 8 a token) and its vocabulary, in
float32, batch 1, everything interleaved round by round in one process. With --torch (extra
`parity`) `transformers`' own class runs random weights of the same shapes on as many threads as jax
has cores. Leaves out quality, which random weights have none of (`quality.py --model FOLDER` on a
trained one).
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from popjax.bench import DENSE, Spread, interleaved, speedup_text
from popjax.methods import Method
from popjax.report import make_report
from popjax.run import Request, RunResult, run
from scripts.bench_models import BenchModel, methods_at, random_model, random_prompt
from scripts.quality import write_json

OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": None,
}
TORCH = "torch"


def torch_model(raw: dict[str, Any], threads: int) -> Callable[[list[int], int], tuple[Any, Any]]:
    """A function (prompt, new_tokens) -> seconds of a prefill and of a cached greedy decode step.

    Raises ImportError where torch is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    config = AutoConfig.for_model(**raw)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def seconds(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        with torch.inference_mode():
            started = time.perf_counter()
            out = reference(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            prefilled = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = reference(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            ended = time.perf_counter()
        return prefilled - started, (ended - prefilled) / (new_tokens - 1)

    return seconds


def ours(model: BenchModel, method: Method, prompt: list[int], new: int) -> RunResult:
    """One run of popjax."""
    return run(model.params, model.config, Request([prompt], new, method))


def read_bytes(model: BenchModel, result: RunResult) -> int:
    """Bytes of weights that a decode step reads."""
    described = {"model": "", "method": "", "config": model.config, "params": model.params}
    return make_report(**described, result=result, load_seconds=0.0).read_bytes_per_token


def measured(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of torch, dense popjax and each method, printed and as JSON values."""
    prompt, new = random_prompt(model.config, asked.prompt_tokens), asked.new_tokens
    threads = os.cpu_count() or 1
    methods = methods_at(asked.ratio)
    measures: dict[str, Callable[[], Any]] = {
        name: functools.partial(ours, model, method, prompt, new)
        for name, method in methods.items()
    }
    if asked.torch:
        measures[TORCH] = functools.partial(torch_model(model.raw, threads), prompt, new)
    runs = interleaved(measures, asked.rounds)
    prefill = {name: Spread(tuple(_prefill(r) for r in found)) for name, (_, found) in runs.items()}
    steps = {name: Spread(tuple(_step(r, new) for r in found)) for name, (_, found) in runs.items()}
    for what, spreads in (("prefill", prefill), ("decode step", steps)) if asked.torch else ():
        print(f"  {what} against torch on {threads} threads: ", end="")
        print(speedup_text(spreads[TORCH].over(spreads[DENSE])), flush=True)
    read = {name: read_bytes(model, runs[name][0]) for name in methods}
    for name in methods:
        if name != DENSE:
            ratio = steps[DENSE].over(steps[name])
            allowed = read[DENSE] / read[name]
            print(f"  {name}: {speedup_text(ratio)}; bytes allow {allowed:.2f}", flush=True)
    return {
        "prefill_seconds": {name: spread.to_json() for name, spread in prefill.items()},
        "step_seconds": {name: spread.to_json() for name, spread in steps.items()},
        "read_bytes": read,
    }


def _prefill(result: Any) -> float:
    return result.seconds["prefill"] if isinstance(result, RunResult) else result[0]


def _step(result: Any, new: int) -> float:
    return result.seconds["decode"] / (new - 1) if isinstance(result, RunResult) else result[1]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--torch", action="store_true", help="also against transformers on torch")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write every round's numbers here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    model = random_model({**OLMOE, "num_hidden_layers": asked.layers})
    name = f"{asked.layers} random layers of OLMoE-1B-7B's shape"
    print(f"{name}, {asked.prompt_tokens} tokens:", flush=True)
    values = {"jax": jax.__version__, "cores": os.cpu_count(), "model": name}
    values |= measured(model, asked)
    if asked.json is not None:
        write_json(asked.json, values)


if __name__ == "__main__":
    main()
