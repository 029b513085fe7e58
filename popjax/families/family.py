"""What a Hugging Face family is to popjax: a config mapping and converter rows, nothing else.

Helpers here read one value each from a raw config.json (both the `rope_theta`/`rope_scaling` form
of older files and the `rope_parameters` form of newer ones). Left out: any code that runs a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from checkpoints import Row
from popjax.config import LayerConfig, ModelConfig, RopeConfig, check_size

ATTENTION_NORM = "layer_{i}/attn_norm/scale"
MLP_NORM = "layer_{i}/mlp_norm/scale"

# Names that every Llama-shaped family shares; transforms are those of `checkpoints`.
HF_ROWS = (
    Row("model.embed_tokens.weight", "embed/table", "same"),
    Row("model.layers.{i}.input_layernorm.weight", ATTENTION_NORM, "same"),
    Row("model.layers.{i}.self_attn.q_proj.weight", "layer_{i}/attn/q", "split"),
    Row("model.layers.{i}.self_attn.k_proj.weight", "layer_{i}/attn/k", "split"),
    Row("model.layers.{i}.self_attn.v_proj.weight", "layer_{i}/attn/v", "split"),
    Row("model.layers.{i}.self_attn.o_proj.weight", "layer_{i}/attn/o", "transpose_split"),
    Row("model.layers.{i}.post_attention_layernorm.weight", MLP_NORM, "same"),
    Row("model.layers.{i}.mlp.gate_proj.weight", "layer_{i}/mlp/gate", "same"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layer_{i}/mlp/up", "same"),
    Row("model.layers.{i}.mlp.down_proj.weight", "layer_{i}/mlp/down", "transpose"),
    Row("model.norm.weight", "final_norm/scale", "same"),
    Row("lm_head.weight", "head/table", "same"),
)
HF_QKV_BIAS_ROWS = tuple(
    Row(f"model.layers.{{i}}.self_attn.{x}_proj.bias", f"layer_{{i}}/attn/{x}_bias", "split")
    for x in "qkv"
)
HF_O_BIAS_ROW = Row("model.layers.{i}.self_attn.o_proj.bias", "layer_{i}/attn/o_bias", "same")
HF_QK_NORM_ROWS = tuple(
    Row(f"model.layers.{{i}}.self_attn.{x}_norm.weight", f"layer_{{i}}/attn/{x}_norm", "same")
    for x in "qk"
)

# GGUF names, with rotary pairs in Hugging Face order (qwen2, qwen3).
GGUF_ROWS = (
    Row("token_embd.weight", "embed/table", "same"),
    Row("blk.{i}.attn_norm.weight", ATTENTION_NORM, "same"),
    Row("blk.{i}.attn_q.weight", "layer_{i}/attn/q", "split"),
    Row("blk.{i}.attn_k.weight", "layer_{i}/attn/k", "split"),
    Row("blk.{i}.attn_v.weight", "layer_{i}/attn/v", "split"),
    Row("blk.{i}.attn_output.weight", "layer_{i}/attn/o", "transpose_split"),
    Row("blk.{i}.ffn_norm.weight", MLP_NORM, "same"),
    Row("blk.{i}.ffn_gate.weight", "layer_{i}/mlp/gate", "same"),
    Row("blk.{i}.ffn_up.weight", "layer_{i}/mlp/up", "same"),
    Row("blk.{i}.ffn_down.weight", "layer_{i}/mlp/down", "transpose"),
    Row("output_norm.weight", "final_norm/scale", "same"),
    Row("output.weight", "head/table", "same"),
)
GGUF_QKV_BIAS_ROWS = tuple(
    Row(f"blk.{{i}}.attn_{x}.bias", f"layer_{{i}}/attn/{x}_bias", "split") for x in "qkv"
)
GGUF_QK_NORM_ROWS = tuple(
    Row(f"blk.{{i}}.attn_{x}_norm.weight", f"layer_{{i}}/attn/{x}_norm", "same") for x in "qk"
)


def offset(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows with 1 taken from every norm's scale: GGUF stores 1 + w."""
    return tuple(
        dataclasses.replace(row, transform="minus_one")
        if isinstance(row.target, str) and row.target.endswith(("/scale", "_norm"))
        else row
        for row in rows
    )


def permuted(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows with q and k un-permuted: GGUF's llama stores rotary pairs interleaved."""
    rotary = tuple(f"layer_{{i}}/attn/{x}{part}" for x in "qk" for part in ("", "_bias"))
    return tuple(
        dataclasses.replace(row, transform="unpermute_split") if row.target in rotary else row
        for row in rows
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`: how its config.json reads and how its tensors are named.

    width_key: the key of config.json that states the number of FFN channels.
    """

    model_type: str
    config: Callable[[dict[str, Any]], ModelConfig]
    hf_rows: tuple[Row, ...]
    gguf_rows: tuple[Row, ...] = ()
    gguf_architecture: str | None = None
    width_key: str = "intermediate_size"


def flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """Whether a config says yes; null is no. Raises ValueError for anything but true and false."""
    value = raw.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(
            f"{key} {value!r} in the model config is neither true nor false: repair it"
        )
    return bool(value)


def required(raw: dict[str, Any], key: str, limit: str) -> int:
    """A size that config.json must state. Raises ValueError when absent or absurd."""
    if key not in raw:
        raise ValueError(f"config.json lacks {key!r}: the file is incomplete")
    check_size(limit, raw[key])
    return raw[key]


def positive(raw: dict[str, Any], key: str) -> float:
    """A positive number that config.json must state. Raises ValueError when it does not."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} {value!r} in config.json is not a positive number: repair it")
    return float(value)


def optional(raw: dict[str, Any], key: str, default: float | None = None) -> float | None:
    """A positive number, or None where config.json says null. Raises ValueError for another."""
    return None if raw.get(key, default) is None else positive({key: default, **raw}, key)


def rope_values(raw: dict[str, Any]) -> dict[str, Any]:
    """The object of a raw config that holds rotary settings; empty where there is none."""
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise ValueError(f"rope scaling {values!r} in config.json is not an object: repair it")
    return values


def rope_config(raw: dict[str, Any], default_theta: float = 10_000.0) -> RopeConfig:
    """Rotary settings of a raw config. Raises ValueError for scalings that are not supported."""
    values = rope_values(raw)
    theta = positive({"rope_theta": default_theta, **raw, **values}, "rope_theta")
    kind = values.get("rope_type", values.get("type", "default"))
    share = positive({"partial_rotary_factor": 1.0, **raw, **values}, "partial_rotary_factor")
    if kind == "default":
        return RopeConfig(theta, share=share)
    if kind == "linear":
        return RopeConfig(theta, kind, positive(values, "factor"), share=share)
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            positive(values, "factor"),
            positive(values, "low_freq_factor"),
            positive(values, "high_freq_factor"),
            int(positive(values, "original_max_position_embeddings")),
            share,
        )
    raise ValueError(
        f"rope scaling {kind!r} is not supported: popjax reads default, linear and llama3"
    )


def decoder_config(
    raw: dict[str, Any],
    family: str,
    windows: Callable[[int], int | None] = lambda i: None,
    ropes: Callable[[int], RopeConfig | None] | None = None,
    softcap: float | None = None,
    **fields: Any,
) -> ModelConfig:
    """ModelConfig of a Llama-shaped raw config; `windows` gives each layer's sliding window.

    `ropes` gives each layer's rotation where they differ, softcap is that of attention. `fields`
    override or add fields of ModelConfig. Raises ValueError naming the bad value.
    """
    num_layers = required(raw, "num_hidden_layers", "num_layers")
    embed_dim = required(raw, "hidden_size", "embed_dim")
    num_heads = required(raw, "num_attention_heads", "num_heads")
    num_kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    rope = rope_config(raw) if ropes is None else None
    layers = tuple(
        LayerConfig(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=_head_dim(embed_dim, num_heads) if head_dim is None else head_dim,
            mlp_dim=required(raw, "intermediate_size", "mlp_dim"),
            window=windows(i),
            rope=rope if ropes is None else ropes(i),
            softcap=softcap,
        )
        for i in range(num_layers)
    )
    known: dict[str, Any] = {
        "family": family,
        "vocab_size": required(raw, "vocab_size", "vocab_size"),
        "embed_dim": embed_dim,
        "layers": layers,
        "max_positions": raw.get("max_position_embeddings", 2048),
        "norm_eps": positive({"rms_norm_eps": 1e-6, **raw}, "rms_norm_eps"),
        "activation": activation(raw.get("hidden_act", "silu")),
        "tie_embeddings": flag(raw, "tie_word_embeddings", False),
    }
    return ModelConfig(**{**known, **fields})


def _head_dim(embed_dim: int, num_heads: int) -> int:
    if embed_dim % num_heads:
        raise ValueError(
            f"hidden_size {embed_dim} is not a multiple of num_attention_heads {num_heads} "
            "and config.json states no head_dim: add head_dim"
        )
    return embed_dim // num_heads


def activation(name: str) -> str:
    """popjax's name of a Hugging Face activation. Raises ValueError for an unknown one."""
    names = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "relu": "relu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"hidden_act {name!r} is not supported: one of {sorted(names)} is")
    return names[name]


def listed_windows(raw: dict[str, Any], from_layer: int) -> Callable[[int], int | None]:
    """Window of each layer where `layer_types`, or failing that `from_layer`, says which slide."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    slides = sliding_layers(raw, lambda i: i >= from_layer)
    return lambda i: window if slides[i] else None


def sliding_layers(raw: dict[str, Any], implied: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers have a sliding window, by `layer_types`, or where it is absent as implied.

    Raises ValueError for kinds of attention that are not supported, or not one a layer.
    """
    count, kinds = required(raw, "num_hidden_layers", "num_layers"), raw.get("layer_types")
    if kinds is None:
        return tuple(implied(i) for i in range(count))
    if not isinstance(kinds, list) or len(kinds) != count:
        found = len(kinds) if isinstance(kinds, list) else repr(kinds)
        raise ValueError(f"layer_types has {found} entries for {count} layers: repair it")
    known = ("sliding_attention", "full_attention")
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"layer_types names {kind!r}, which is not supported: {known} are")
    return tuple(kind == "sliding_attention" for kind in kinds)


def refuse(raw: dict[str, Any], family: str, unsupported: Mapping[str, Any]) -> None:
    """Raise ValueError where config.json has one of these keys at the value that is not read."""
    for key, value in unsupported.items():
        if key in raw and raw[key] == value:
            raise ValueError(f"{key} {value!r} is not supported for {family}: use another model")
