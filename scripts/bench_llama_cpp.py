"""llama.cpp as a yardstick: the default model decoded by it, at our bytes a weight.

The weights are those of the default model's GGUF file, written again in float32 or bfloat16. Needs
the extra `bench` (xllamacpp, llama.cpp with Python bindings).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp

from checkpoints import open_gguf
from popjax.bench import Spread, interleaved, speedup_text
from popjax.default_model import GGUF_MEMBER, default_model_wheel
from popjax.run import Request, run
from scripts.bench_models import BenchModel, random_prompt

KINDS = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}


def rewritten(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write the GGUF file `source` again with its matrices stored as `kind`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, _text(reader, "general.architecture"))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text(reader: gguf.GGUFReader, name: str) -> str:
    field = reader.get_field(name)
    assert field is not None, f"{name} is in every GGUF file"
    return str(field.contents())


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
        source = Path(open_gguf(default_model_wheel(), member=GGUF_MEMBER).location)
        for dtype, kind in KINDS.items():
            path = Path(folder) / f"{dtype}.gguf"
            rewritten(source, path, kind)
            params = jax.tree.map(lambda leaf, d=dtype: leaf.astype(jnp.dtype(d)), model.params)
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
            values[dtype] = {**{k: v.to_json() for k, v in found.items()}, "ratio": ratio.to_json()}
    return values


def _ours(model: BenchModel, params: Any, prompt: list[int], new: int) -> float:
    result = run(params, model.config, Request([prompt], new))
    return result.seconds["decode"] / (new - 1)
