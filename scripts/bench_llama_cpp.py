"""llama.cpp as a yardstick: the same weights decoded by it, at our bytes a weight.

They are written as GGUF files in float32 and bfloat16. Needs the extra `bench` (xllamacpp,
llama.cpp with Python bindings).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from checkpoints import export, open_gguf
from popjax.bench import Spread, interleaved, speedup_text
from popjax.default_model import GGUF_MEMBER, default_model_wheel
from popjax.families import family_of
from popjax.run import Request, run
from scripts.bench_models import BenchModel, as_dtype, random_prompt

KINDS = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}


def written(model: BenchModel, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a model of llama's architecture as GGUF, its matrices stored as `kind`.

    The tokenizer is that of the default model, with names made up for tokens beyond its own: what
    is timed neither reads nor shows text.
    """
    reader = gguf.GGUFReader(open_gguf(default_model_wheel(), member=GGUF_MEMBER).location)
    writer = gguf.GGUFWriter(target, "llama")
    for name, value in _sizes(model.raw).items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            values = _extended(name, field.contents(), model.config.vocab_size)
            writer.add_key_value(name, values, field.types[0], sub)
    for name, values in export(model.params, family_of("llama").gguf_rows):
        values = np.ascontiguousarray(values)
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(raw: dict[str, Any]) -> dict[str, int | float]:
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    head = raw.get("head_dim") or width // heads
    return {
        "llama.block_count": raw["num_hidden_layers"],
        "llama.context_length": raw["max_position_embeddings"],
        "llama.embedding_length": width,
        "llama.feed_forward_length": raw["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": raw["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        "llama.rope.freq_base": float(raw["rope_theta"]),
        "llama.rope.dimension_count": head,
        "llama.vocab_size": raw["vocab_size"],
    }


def _extended(name: str, values: Any, size: int) -> Any:
    if name == "tokenizer.ggml.tokens":
        return [*values, *(f"<unused {i}>" for i in range(len(values), size))]
    if name == "tokenizer.ggml.token_type":
        return [*values, *[int(gguf.TokenType.UNUSED)] * (size - len(values))]
    return values


def step_seconds(path: Path, threads: int, prompt: list[int], new_tokens: int) -> float:
    """Seconds of a greedy decode step in llama.cpp.

    Its server lives for this one measurement: idle, its threads keep polling, and nothing measured
    beside them would be true.
    """
    from xllamacpp.xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity = True, -1
    server = Server(params)
    asked = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True}
    answer = server.handle_completions({**asked, "cache_prompt": False})
    timings = answer["timings"]
    assert timings["predicted_n"] == new_tokens, "llama.cpp decoded what it was asked to"
    return timings["predicted_ms"] / 1e3 / (new_tokens - 1)


def against_llama_cpp(model: BenchModel, asked: argparse.Namespace) -> dict[str, Any]:
    """Dense decode steps of popjax and llama.cpp on the same weights, float32 and bfloat16."""
    prompt, new = random_prompt(model.config, asked.prompt_tokens), asked.new_tokens
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, kind in KINDS.items():
            path = Path(folder) / f"{dtype}.gguf"
            written(model, path, kind)
            params = as_dtype(model.params, jnp.dtype(dtype))
            measures = {"popjax": functools.partial(_ours, model, params, prompt, new)}
            for threads in (1, 2):
                call = functools.partial(step_seconds, path, threads, prompt, new)
                measures[f"{threads} threads"] = call
            results = interleaved(measures, asked.rounds)
            found = {k: Spread(tuple(v)) for k, (_, v) in results.items()}
            theirs = min((found["1 threads"], found["2 threads"]), key=lambda s: s.median)
            ratio = theirs.over(found["popjax"])
            print(
                f"  {dtype}: popjax {found['popjax'].median * 1e3:.1f} ms, llama.cpp "
                f"{theirs.median * 1e3:.1f} ms a step; {speedup_text(ratio)}"
            )
            path.unlink()  # before the next one is written beside it
            values[dtype] = {**{k: v.to_json() for k, v in found.items()}, "ratio": ratio.to_json()}
    return values


def _ours(model: BenchModel, params: Any, prompt: list[int], new: int) -> float:
    result = run(params, model.config, Request([prompt], new))
    return result.seconds["decode"] / (new - 1)
