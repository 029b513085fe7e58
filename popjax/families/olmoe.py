"""OLMoE: a mixture of experts in every layer, and queries and keys normed over all their heads."""

from __future__ import annotations

from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig
from popjax.families.family import (
    GGUF_ROWS,
    HF_O_BIAS_ROW,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    Family,
    decoder_config,
    flag,
)
from popjax.families.mixture import EXPERT_ROWS, GGUF_EXPERT_ROWS, moe_config, with_experts


def _norm_rows(name: str) -> tuple[Row, ...]:
    """Rows of both norms of heads, `name` holding the letter's place."""
    return tuple(Row(name.format(x=x), f"layer_{{i}}/attn/{x}_all_norm", "split") for x in "qk")


def _config(raw: dict[str, Any]) -> ModelConfig:
    if raw.get("clip_qkv") is not None:
        raise ValueError(
            f"clip_qkv {raw['clip_qkv']!r} is not supported for olmoe: no published checkpoint "
            "has it"
        )
    bias, window = flag(raw, "attention_bias", False), raw.get("sliding_window")
    fields = {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "qk_norm_over": "all"}
    raw = {"rms_norm_eps": 1e-5, **raw}
    config = decoder_config(raw, "olmoe", windows=lambda i: window, **fields)
    renormalise = flag(raw, "norm_topk_prob", False)
    return with_experts(config, moe_config(raw, "intermediate_size", renormalise))


FAMILY = Family(
    model_type="olmoe",
    config=_config,
    hf_rows=(
        *HF_ROWS,
        *_norm_rows("model.layers.{{i}}.self_attn.{x}_norm.weight"),
        *HF_QKV_BIAS_ROWS,
        HF_O_BIAS_ROW,
        *EXPERT_ROWS,
    ),
    gguf_rows=(*GGUF_ROWS, *_norm_rows("blk.{{i}}.attn_{x}_norm.weight"), *GGUF_EXPERT_ROWS),
    gguf_architecture="olmoe",
)
