"""Models small enough to compile in a second, one a family, with parameters that spread.

The initial parameters of `init_params` give logits and channel scores that are nearly equal, where
a wrong answer hides; these are scaled so that every product keeps its size and channels differ.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from popjax import axes
from popjax.config import LayerConfig, ModelConfig, MoeConfig, RopeConfig

# Longer than mistral's window, so that keys fall out of it; row 2 is short enough for two buckets.
PROMPTS: list[list[int]] = [
    [5, 17, 3, 88, 42, 9, 61, 23, 70, 11, 2],
    [31, 8, 54, 12, 77, 6, 19, 90, 33, 47, 21, 66, 14, 80, 29, 51, 4, 38, 95, 10],
    [7, 64, 25],
]
VOCAB = 97
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
WINDOW = 5

LLAMA3_ROPE = RopeConfig(
    theta=10_000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=16,
)
LAYER = LayerConfig(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
# Tiny but for its width, whose rows are whole tiles of a TPU's memory.
_TILED_LAYER = dataclasses.replace(LAYER, mlp_dim=300)
TILED = ModelConfig("llama", 96, 1024, (_TILED_LAYER, _TILED_LAYER), max_positions=64)


def mixture(layer: LayerConfig, expert_dim: int, **options: Any) -> LayerConfig:
    """The layer with eight experts, of which a token uses three, beside the FFN that it has."""
    return dataclasses.replace(layer, moe=MoeConfig(8, 3, expert_dim, **options))


def tiny(family: str, vocab_size: int = VOCAB) -> ModelConfig:
    """A two-layer config of a family, or of "llama3" for llama with scaled rotation."""
    layer = LAYER
    fields: dict[str, Any] = {}
    if family == "llama3":
        layer, fields = dataclasses.replace(LAYER, rope=LLAMA3_ROPE), {"tie_embeddings": True}
    elif family == "mistral":
        layer = dataclasses.replace(LAYER, window=WINDOW)
    elif family == "qwen2":
        fields = {"qkv_bias": True, "tie_embeddings": True}
    elif family in ("qwen3", "qwen3_moe"):
        fields = {"qk_norm": True}
    elif family == "qwen2_moe":
        fields = {"qkv_bias": True}
    elif family == "olmoe":
        fields = {"qk_norm": True, "qk_norm_over": "all"}
    # Layers of different widths: nothing may assume that one size serves all.
    layers = (layer, dataclasses.replace(layer, mlp_dim=40))
    if family == "qwen2_moe":
        layers = (mixture(layer, 24, shared_gate=True), layers[1])
    elif family in MIXTURES:
        layers = tuple(mixture(dataclasses.replace(y, mlp_dim=0), y.mlp_dim // 2) for y in layers)
    name = "llama" if family == "llama3" else family
    return ModelConfig(name, vocab_size, 32, layers, max_positions=64, **fields)


FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "qwen2_moe")
CONFIGS = {family: tiny(family) for family in FAMILIES}


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Float32 parameters whose logits have a spread of about 3 and whose channels differ."""
    rng = np.random.default_rng(seed)
    tree: dict[str, Any] = {}
    for path, shape in axes.parameter_shapes(config).items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(_values(rng, path, shape), jnp.float32)
    return tree


def _values(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    leaf = path.split("/")[-1]
    values = rng.standard_normal(shape)
    if leaf == "scale" or leaf.endswith("_norm"):
        return np.exp(0.2 * values)
    if leaf.endswith("_bias"):
        return 0.3 * values
    if leaf == "table":
        # Also the output head where tied: logits of unit-size inputs get a spread of about 3.
        return values * 3 / math.sqrt(shape[-1])
    if leaf == "down":
        loudness = np.exp(0.5 * rng.standard_normal((*shape[:-1], 1)))
        return values * loudness / math.sqrt(shape[-2])
    if leaf == "router":
        # Far apart, so that experts are not chosen by the last bit of a sum.
        return values * 3 / math.sqrt(shape[-1])
    fan_in = shape[0] * shape[1] if leaf == "o" else shape[-1]
    return values / math.sqrt(fan_in)


def logit_tolerance(config: ModelConfig, logits: np.ndarray) -> float:
    """What reordering float32 sums may change in logits.

    A sum of n terms moves by about sqrt(n) roundings of its size; a layer chains seven products
    (q or k, scores, attention, o, gate or up, down and a norm), and the head is one more.
    """
    widths = (layer.mlp_dim + layer.routed * layer.channels for layer in config.layers)
    longest = max(config.embed_dim, *widths)
    chained = 7 * config.num_layers + 1
    rounding = float(np.finfo(np.float32).eps)
    return rounding * math.sqrt(longest) * chained * float(np.max(np.abs(logits)))
