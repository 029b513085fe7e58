"""GGUF metadata -> the config.json that the same model has on the hub.

Going through the Hugging Face form keeps one reading of each family's config, and lets a model that
was loaded from GGUF be exported to a folder that other tools load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SUPPORTED = ("llama", "qwen2", "qwen3")
# A tensor of the file that is part of the config, not of the parameters.
ROPE_FACTORS = "rope_freqs.weight"


def hf_config(
    metadata: dict[str, Any], names: Sequence[str], rope_factors: np.ndarray | None = None
) -> dict[str, Any]:
    """config.json values of a GGUF file from its metadata and tensor names.

    `rope_factors` [H/2] is the tensor "rope_freqs.weight" where the file has one.
    Raises ValueError for an architecture or rope scaling that is not supported.
    """
    arch = metadata.get("general.architecture")
    if arch not in SUPPORTED:
        raise ValueError(f"GGUF architecture {arch!r} is not supported: {', '.join(SUPPORTED)} are")

    def value(key: str, *default: Any) -> Any:
        name = f"{arch}.{key}"
        if name not in metadata and not default:
            raise ValueError(f"the GGUF file lacks {name!r} in its metadata: it is incomplete")
        return metadata.get(name, *default)

    heads, width = value("attention.head_count"), value("embedding_length")
    theta = float(value("rope.freq_base", 10_000.0))
    window = value("attention.sliding_window", None) if arch == "llama" else None
    config = {
        "model_type": "mistral" if window else arch,
        "architectures": [_ARCHITECTURES["mistral" if window else arch]],
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", width // heads),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(value, rope_factors, theta),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if window:
        config["sliding_window"] = window
    return config


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _rope_scaling(value: Any, factors: np.ndarray | None, theta: float) -> dict[str, Any] | None:
    if factors is not None:
        return _llama3_scaling(np.asarray(factors, np.float64), theta)
    kind = value("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(value("rope.scaling.factor"))}
    raise ValueError(f"GGUF rope scaling {kind!r} is not supported: none, linear and llama3 are")


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The llama3 scaling whose per-frequency divisors a file stores as a tensor.

    GGUF keeps the divisors, config.json keeps the four numbers they come from. All published models
    use low 1, high 4, original context 8192, and the largest divisor is the factor; a file whose
    divisors these numbers do not reproduce is refused rather than guessed.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    exponents = np.arange(factors.size) / factors.size
    wavelength = 2 * math.pi * theta**exponents
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(expected, factors, rtol=1e-3):
        raise ValueError(
            f"the GGUF tensor {ROPE_FACTORS!r} is not a llama3 rope scaling of context {original}: "
            "load the safetensors checkpoint of this model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
