"""Decode speed and memory on this machine: against torch, the bytes read, and the prompt's cost.

    python -m scripts.bench_decode --models default random-1b --torch --json bench.json

float32, batch 1, greedy. Everything compared is interleaved round by round in one process and shown
as a median with its spread; the models are those of `bench_models.py`. Leaves out quality, which is
`quality.py`'s business.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
from kernels_pallas.choice import implementation_for
from kernels_pallas.masked_mlp import masked_mlp
from popjax.bench import DENSE, BenchResult, Spread, Weights, bench, interleaved, speedup_text
from popjax.families import family_of
from popjax.methods import Griffin, Method, OnlinePruning
from popjax.nn.ops import rms_norm
from popjax.packing import pack
from popjax.run import Request, run
from popjax.sparsity import ChannelPartitions, Params
from scripts.bench_llama_cpp import against_llama_cpp
from scripts.bench_models import (
    DEFAULT,
    RANDOM_1B,
    BenchModel,
    as_dtype,
    methods_at,
    named_model,
    random_prompt,
)
from scripts.bench_native import bandwidth_section, batch_section, choosing_section
from scripts.quality import write_json

SECTIONS = ("decode", "ffn", "prefill", "memory", "bandwidth", "batch", "choosing")


def torch_step(model: BenchModel) -> Callable[[list[int], int, int], float]:
    """A function (prompt, new_tokens, threads) -> seconds of a cached greedy decode step in torch.

    The model is `transformers`' own class with our weights, exported and read back. Raises
    ImportError where torch is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        tensors = checkpoints.export(model.params, family_of(model.raw["model_type"]).hf_rows)
        checkpoints.save_safetensors(Path(folder) / "model", tensors, config=model.raw)
        reference = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
        for parameter in reference.parameters():
            # Out of the mapped file, so that torch reads plain memory as jax does.
            parameter.data = parameter.data.clone()
    reference.eval()

    def step_seconds(prompt: list[int], new_tokens: int, threads: int) -> float:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            out = reference(torch.tensor([prompt]), use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = reference(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            return (time.perf_counter() - started) / (new_tokens - 1)

    return step_seconds


def against_torch(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """Dense decode steps of popjax and of torch with one and with two threads."""
    prompt, new = random_prompt(model.config, asked.prompt_tokens), asked.new_tokens
    torch_seconds = torch_step(model)

    half = as_dtype(model.params, jnp.bfloat16)

    def ours(params: Params) -> float:
        result = run(params, model.config, Request([prompt], new))
        return result.seconds["decode"] / (new - 1)

    measures = {"popjax": functools.partial(ours, model.params)}
    measures["popjax, bfloat16"] = functools.partial(ours, half)
    for threads in (1, 2):
        label = f"torch, {threads} thread{'s' if threads > 1 else ''}"
        measures[label] = functools.partial(torch_seconds, prompt, new, threads)
    found = {k: Spread(tuple(v)) for k, (_, v) in interleaved(measures, asked.rounds).items()}
    torch_times = (spread for name, spread in found.items() if name.startswith("torch"))
    best = min(torch_times, key=lambda spread: spread.median)
    ratio, half_ratio = best.over(found["popjax"]), best.over(found["popjax, bfloat16"])
    for name, spread in found.items():
        tokens = Spread(tuple(1 / seconds for seconds in spread.rounds))
        print(f"  {name}: {tokens} tokens/s")
    print(f"  popjax against torch's best: {speedup_text(ratio)}")
    print(f"  popjax in bfloat16 against torch's best in float32: {speedup_text(half_ratio)}")
    seconds = {name: spread.to_json() for name, spread in found.items()}
    return {
        "step_seconds": seconds,
        "torch_over_popjax": ratio.to_json(),
        "torch_over_popjax_bfloat16": half_ratio.to_json(),
    }


def decode_section(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """Whole decode steps of each method against dense, and of dense against torch where asked."""
    values = timed_steps(model, methods_at(asked.ratio), asked)
    if asked.torch:
        values["torch"] = against_torch(model, asked)
    return values


def timed_steps(
    model: Weights, methods: dict[str, Method], asked: argparse.Namespace
) -> dict[str, Any]:
    """Whole decode steps of each method against dense, and against the ratio of bytes read."""
    result = bench(
        model,
        methods,
        prompt_ids=[random_prompt(model.config, asked.prompt_tokens)],
        new_tokens=asked.new_tokens,
        rounds=asked.rounds,
    )
    values = result.to_json()
    for row in values["methods"]:
        name = row["name"]
        print(f"  {name}: {Spread(tuple(1e3 * s for s in row['decode_step']['rounds']))} ms a step")
        if name != DENSE:
            row["share_of_bytes_ratio"] = result.ratio(name).median / row["bytes_ratio"]
            print(
                f"    {row['speedup']}; bytes allow {row['bytes_ratio']:.2f}, "
                f"share reached {row['share_of_bytes_ratio']:.2f}"
            )
    return values


@functools.partial(jax.jit, static_argnames=("method", "activation", "implementation"))
def ffn_steps(
    layers: list[Params],
    partition: ChannelPartitions | None,
    x: jax.Array,
    steps: jax.Array,
    *,
    method: Method,
    activation: str,
    implementation: str,
) -> jax.Array:
    """`steps` decode steps of the FFN layers alone, x [B, 1, D] in and out."""

    def step(_: jax.Array, x: jax.Array) -> jax.Array:
        for i, mlp in enumerate(layers):
            part = None if partition is None else partition[i]
            y, _mask = masked_mlp(
                x,
                mlp["gate"],
                mlp["up"],
                mlp["down"],
                activation=activation,
                selection=None if part is None else method.selection(part),
                implementation=implementation,
            )
            # Keeps the stream finite through random layers; costs nothing beside the weights.
            x = rms_norm(x + y, jnp.ones(x.shape[-1:], x.dtype), 1e-6)
        return x

    return jax.lax.fori_loop(0, steps, step, x)


def ffn_section(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """The FFN of a decode step alone, against its ideal: channels over channels evaluated."""
    prompt = random_prompt(model.config, asked.prompt_tokens)
    x = jnp.asarray(
        np.random.default_rng(2).standard_normal((1, 1, model.config.embed_dim)), jnp.float32
    )
    names = [f"layer_{i}" for i in range(model.config.num_layers)]
    steps = jnp.int32(asked.new_tokens)
    measures: dict[str, Callable[[], float]] = {}
    ideal: dict[str, float] = {}
    for name, method in methods_at(asked.ratio).items():
        params, partition = model.params, None
        if name != DENSE:
            found = run(params, model.config, Request([prompt], 1, method=method)).partition
            assert found is not None, "a pruning method plans a partition"
            params, _, partition = pack(params, model.config, found)
            evaluated = sum(part.evaluated for part in partition)
            ideal[name] = sum(layer.mlp_dim for layer in model.config.layers) / evaluated
        mlps = [params[layer]["mlp"] for layer in names]
        one = functools.partial(
            ffn_steps,
            mlps,
            partition,
            x,
            steps,
            method=method,
            activation=model.config.activation,
            implementation=implementation_for(None, mlps),
        )
        measures[name] = functools.partial(_seconds, one, asked.new_tokens)
    found = {k: Spread(tuple(v)) for k, (_, v) in interleaved(measures, asked.rounds).items()}
    values: dict[str, Any] = {DENSE: found[DENSE].to_json()}
    print(f"  {DENSE}: {found[DENSE].median * 1e3:.2f} ms a step")
    for name, best in ideal.items():
        ratio = found[DENSE].over(found[name])
        values[name] = {**found[name].to_json(), "ratio": ratio.to_json(), "ideal": best}
        print(f"  {name}: {speedup_text(ratio)}; ideal {best:.2f}, share {ratio.median / best:.2f}")
    return values


def _seconds(call: Callable[[], jax.Array], steps: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return (time.perf_counter() - started) / steps


def prefill_section(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """What observing, planning and packing add to a prompt, as a share of its dense prefill."""
    methods: dict[str, Method] = {
        "online-pruning": OnlinePruning(ratio=asked.ratio),
        "online-pruning, dense prefill": OnlinePruning(ratio=asked.ratio, prefill="dense"),
        "griffin": Griffin(asked.ratio),
    }
    prompt = [random_prompt(model.config, asked.long_prompt_tokens)]
    result = bench(model, methods, prompt_ids=prompt, new_tokens=2, rounds=asked.rounds)
    print(f"  dense: {result[DENSE].prefill} s for {asked.long_prompt_tokens} tokens")
    values = result.to_json()
    for name in methods:
        observe, plan, packing = (Spread(phase) for phase in _added(result, name))
        total = Spread(
            tuple(map(sum, zip(observe.rounds, plan.rounds, packing.rounds, strict=True)))
        )
        values[name] = {
            "observe": observe.to_json(),
            "plan": plan.to_json(),
            "pack": packing.to_json(),
            "total": total.to_json(),
        }
        print(f"  {name}: observe {observe} + plan {plan} + pack {packing} = {total} of it")
    return values


def _added(result: BenchResult, name: str) -> tuple[tuple[float, ...], ...]:
    """Observe, plan and pack of a method, each round as a share of that round's dense prefill."""
    dense, method = result[DENSE].prefill.rounds, result[name]
    pairs = zip(method.prefill.rounds, dense, strict=True)
    observe = tuple(mine / theirs - 1 for mine, theirs in pairs)
    return observe, *(
        part.over(result[DENSE].prefill).rounds for part in (method.plan, method.pack)
    )


def memory_section(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of fresh processes, above that of the same run with a model of tiny widths.

    What is subtracted is Python, jax and the compiled programs, which do not grow with the widths.
    """
    values = {}
    for method in methods_at(asked.ratio):
        base, found = (_peak(name, method, asked, *flags) for flags in (["--tiny"], []))
        needed = found["weights"] + found["cache"] + found["packed"]
        held = found["peak"] - base["peak"]
        values[method] = {**found, "without_model": base["peak"], "share": held / needed}
        print(
            f"  {method}: {held / 1e6:.0f} MB at peak, above {base['peak'] / 1e6:.0f} MB without "
            f"the model; {held / needed:.3f} of weights + cache + packed rows"
        )
    return values


def _peak(name: str, method: str, asked: argparse.Namespace, *flags: str) -> dict[str, int]:
    command = [sys.executable, "-m", "scripts.peak_memory", "--model", name, "--method", method]
    for option in ("ratio", "prompt_tokens", "new_tokens"):
        command += [f"--{option.replace('_', '-')}", str(getattr(asked, option))]
    done = subprocess.run([*command, *flags], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEFAULT, RANDOM_1B])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-prompt-tokens", type=int, default=512, help="of section prefill")
    parser.add_argument("--torch", action="store_true", help="also time transformers on torch")
    parser.add_argument("--llama-cpp", action="store_true", help="also time llama.cpp")
    parser.add_argument("--json", type=Path, help="also write every round's numbers here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    if asked.torch and importlib.util.find_spec("torch") is None:
        sys.exit("--torch needs the package torch: install the extra `parity`, or leave it out")
    if asked.llama_cpp and importlib.util.find_spec("xllamacpp") is None:
        sys.exit("--llama-cpp needs the package xllamacpp: install the extra `bench`")
    measured: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count(), "models": {}}
    for name in asked.models:
        values = measured["models"][name] = {}
        if "memory" in asked.sections:  # before this process holds a model of its own
            print(f"{name}, memory:")
            values["memory"] = memory_section(name, asked)
        sections = {
            "decode": decode_section,
            "ffn": ffn_section,
            "prefill": prefill_section,
            "bandwidth": bandwidth_section,
            "batch": batch_section,
            "choosing": choosing_section,
        }
        chosen = {key: section for key, section in sections.items() if key in asked.sections}
        if chosen or asked.llama_cpp:
            model = named_model(name)
            for key, section in chosen.items():
                print(f"{name}, {key}:", flush=True)
                values[key] = section(model, asked)
            if asked.llama_cpp:
                print(f"{name}, llama.cpp:", flush=True)
                values["llama.cpp"] = against_llama_cpp(model, asked)
            del model  # before the next one is made beside it
    if asked.json is not None:
        write_json(asked.json, measured)


if __name__ == "__main__":
    main()
