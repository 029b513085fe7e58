"""Qwen3-MoE: Qwen3's attention with a mixture of experts, but in layers named as dense."""

from __future__ import annotations

from typing import Any

from popjax.config import ModelConfig
from popjax.families.family import (
    GGUF_QK_NORM_ROWS,
    GGUF_ROWS,
    HF_O_BIAS_ROW,
    HF_QK_NORM_ROWS,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    Family,
    decoder_config,
    flag,
)
from popjax.families.mixture import (
    EXPERT_ROWS,
    GGUF_EXPERT_ROWS,
    dense_layers,
    moe_config,
    with_experts,
)


def _config(raw: dict[str, Any]) -> ModelConfig:
    bias = flag(raw, "attention_bias", False)
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    fields: dict[str, Any] = {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}
    config = decoder_config(raw, "qwen3_moe", windows=lambda i: window, **fields)
    renormalise = flag(raw, "norm_topk_prob", False)
    moe = moe_config(raw, "moe_intermediate_size", renormalise)
    return with_experts(config, moe, dense=dense_layers(raw))


FAMILY = Family(
    model_type="qwen3_moe",
    config=_config,
    hf_rows=(*HF_ROWS, *HF_QK_NORM_ROWS, *HF_QKV_BIAS_ROWS, HF_O_BIAS_ROW, *EXPERT_ROWS),
    gguf_rows=(*GGUF_ROWS, *GGUF_QK_NORM_ROWS, *GGUF_EXPERT_ROWS),
    gguf_architecture="qwen3moe",
)
