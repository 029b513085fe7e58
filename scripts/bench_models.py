"""The models and methods that the benchmarks run: the default model, and a random one of 1B class.

Everything is float32. Random weights serve timing, which does not depend on their values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import popjax
from checkpoints import nested
from checkpoints.buffers import Arena, settle
from popjax import axes
from popjax.bench import DENSE
from popjax.config import ModelConfig
from popjax.families import model_config
from popjax.loading import open_source
from popjax.methods import Frozen, Method, OnlinePruning, RescoreAll
from popjax.sparsity import Params

DEFAULT = "default"
RANDOM_1B = "random-1b"
# The shape of Llama-3.2-1B with its whole vocabulary: 4.9 GB, which no cache holds.
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """Weights with the Hugging Face config that describes them to torch."""

    raw: dict[str, Any]
    config: ModelConfig
    params: Params


def named_model(name: str) -> BenchModel:
    """`DEFAULT`, `RANDOM_1B`, or whatever `popjax.load` takes."""
    if name == RANDOM_1B:
        return random_model(LLAMA_1B)
    model = popjax.load(_loadable(name), dtype="float32")
    return BenchModel(model.source.raw, model.config, model.params)


def tiny_twin(name: str) -> BenchModel:
    """A random model with the layers and heads of the named one, but tiny widths and vocabulary."""
    raw = LLAMA_1B if name == RANDOM_1B else open_source(_loadable(name)).raw
    narrow = {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 256, "head_dim": 16}
    return random_model({**raw, **narrow})


def _loadable(name: str) -> str | None:
    return None if name == DEFAULT else name


def random_model(raw: dict[str, Any], seed: int = 0) -> BenchModel:
    """Normal(0.02) weights of a config, scales one, made tensor by tensor."""
    config, generator = model_config(raw), np.random.default_rng(seed)
    shapes, dtype = axes.parameter_shapes(config), np.dtype(np.float32)
    arena = Arena(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values())
    flat = {}
    for path, shape in shapes.items():
        values = arena.empty(shape, dtype)
        if path.endswith("/scale"):
            values[...] = 1
        else:
            generator.standard_normal(out=values, dtype=dtype)
            values *= 0.02
        flat[path] = jax.device_put(values)
    return BenchModel(raw, config, nested(flat))


def as_dtype(params: Params, dtype: Any) -> Params:
    """The parameters in a dtype, where loading would put them: large pages, side by side."""
    leaves, structure = jax.tree.flatten(params)
    if all(leaf.dtype == dtype for leaf in leaves):
        return params
    leaves = [leaf.astype(dtype) for leaf in leaves]
    settle(leaves)
    return jax.tree.unflatten(structure, leaves)


def random_prompt(config: ModelConfig, tokens: int) -> list[int]:
    return np.random.default_rng(1).integers(0, config.vocab_size, tokens).tolist()


def methods_at(ratio: float) -> dict[str, Method]:
    """Dense first, then the methods that are timed, by their command-line names."""
    return {
        DENSE: Method(),
        "online-pruning": OnlinePruning(ratio=ratio),
        "frozen": Frozen(ratio),
        "rescore-all": RescoreAll(ratio),
    }
