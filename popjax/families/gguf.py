"""GGUF metadata -> the config.json that the same model has on the hub.

Going through the Hugging Face form keeps one reading of each family's config, and lets a model that
was loaded from GGUF be exported to a folder that other tools load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# A tensor of the file that is part of the config, not of the parameters.
ROPE_FACTORS = "rope_freqs.weight"
_LONG_ROPE = "rope_factors_long.weight"


def hf_config(
    metadata: dict[str, Any], names: Sequence[str], rope_factors: np.ndarray | None = None
) -> dict[str, Any]:
    """config.json values of a GGUF file from its metadata and tensor names.

    `rope_factors` [H/2] is the tensor "rope_freqs.weight" where the file has one.
    Raises ValueError for an architecture or rope scaling that is not supported.
    """
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"GGUF architecture {arch!r} is not supported: {known} are")
    if _LONG_ROPE in names:
        raise ValueError(
            f"the GGUF tensor {_LONG_ROPE!r} is not supported: load the safetensors checkpoint of "
            "this model instead"
        )

    def value(key: str, *default: Any) -> Any:
        name = f"{arch}.{key}"
        if name not in metadata and not default:
            raise ValueError(f"the GGUF file lacks {name!r} in its metadata: it is incomplete")
        return metadata.get(name, *default)

    heads, width = value("attention.head_count"), value("embedding_length")
    theta = float(value("rope.freq_base", 10_000.0))
    model_type, name, more = _ARCHITECTURES[arch]
    config = {
        "model_type": model_type,
        "architectures": [f"{name}ForCausalLM"],
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
    return config | more(value)


# value(key) or value(key, default) of a file's own metadata.
Value = Callable[..., Any]


def _llama(value: Value) -> dict[str, Any]:
    """Experts tell Mixtral from Llama in such files, a window Mistral."""
    window = value("attention.sliding_window", None)
    if value("expert_count", 0):
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            **_experts(value, "num_local_experts"),
            "sliding_window": window or None,
        }
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {**names, "sliding_window": window} if window else {}


def _experts(value: Value, count: str = "num_experts") -> dict[str, Any]:
    """How many experts there are and are used. Raises ValueError where they weigh otherwise.

    Readers of such files take a softmax over all experts, scaled by nothing.
    """
    function, scale = value("expert_gating_func", 0), float(value("expert_weights_scale", 0.0))
    if function not in (0, 1) or scale not in (0.0, 1.0):
        raise ValueError(
            f"the GGUF file weights experts by function {function} and scale {scale:g}, which is "
            "not supported: a softmax (1) without a scale is"
        )
    return {count: value("expert_count"), "num_experts_per_tok": value("expert_used_count")}


def _normed(value: Value, usual: bool) -> dict[str, Any]:
    """Experts of a family that says whether their weights sum to one; else as llama.cpp has it."""
    return _experts(value) | {"norm_topk_prob": bool(value("expert_weights_norm", usual))}


def _qwen_moe(value: Value, usual: bool) -> dict[str, Any]:
    width = value("feed_forward_length") // max(1, value("expert_used_count"))
    return _normed(value, usual) | {
        "moe_intermediate_size": value("expert_feed_forward_length", width)
    }


def _qwen2_moe(value: Value) -> dict[str, Any]:
    width = value("feed_forward_length")
    shared = value("expert_shared_feed_forward_length", width)
    return _qwen_moe(value, usual=False) | {"shared_expert_intermediate_size": shared}


def _phi3(value: Value) -> dict[str, Any]:
    size = value("embedding_length") // value("attention.head_count")
    share = value("rope.dimension_count", size) / size
    window = value("attention.sliding_window", None) or None
    return {"sliding_window": window, "partial_rotary_factor": share}


def _gemma(value: Value) -> dict[str, Any]:
    """What files of Gemma 2 and 3 leave to the reader, as llama.cpp has it.

    The largest of each scale queries by the width of a head that the model's would be if even.
    """
    heads, width = value("attention.head_count"), value("embedding_length")
    largest = value("block_count") in (46, 62)
    scalar = width // heads if largest else value("attention.key_length")
    act = "gelu_pytorch_tanh"
    return {
        "hidden_act": act,
        "hidden_activation": act,
        "query_pre_attn_scalar": scalar,
        "sliding_window": value("attention.sliding_window"),
    }


def _gemma2(value: Value) -> dict[str, Any]:
    return _gemma(value) | {
        "attn_logit_softcapping": float(value("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(value("final_logit_softcapping", 30.0)),
    }


def _gemma3(value: Value) -> dict[str, Any]:
    local = {"rope_local_base_freq": float(value("rope.freq_base_swa", 10_000.0))}
    return _gemma(value) | local | {"sliding_window_pattern": 6}


# Architecture -> model_type and class of the hub, and what config.json says beyond the sizes.
_ARCHITECTURES: dict[str, tuple[str, str, Callable[[Value], dict[str, Any]]]] = {
    "llama": ("llama", "Llama", _llama),
    "qwen2": ("qwen2", "Qwen2", lambda value: {}),
    "qwen3": ("qwen3", "Qwen3", lambda value: {}),
    "gemma2": ("gemma2", "Gemma2", _gemma2),
    "gemma3": ("gemma3_text", "Gemma3", _gemma3),
    "phi3": ("phi3", "Phi3", _phi3),
    "olmo2": ("olmo2", "Olmo2", lambda value: {}),
    "qwen2moe": ("qwen2_moe", "Qwen2Moe", _qwen2_moe),
    "qwen3moe": ("qwen3_moe", "Qwen3Moe", lambda value: _qwen_moe(value, usual=True)),
    "olmoe": ("olmoe", "Olmoe", lambda value: _normed(value, usual=False)),
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
