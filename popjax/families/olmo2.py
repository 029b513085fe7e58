"""OLMo 2: norms on what each branch adds, and on all queries and all keys of a token at once."""

from __future__ import annotations

from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig
from popjax.families.family import (
    ATTENTION_NORM,
    GGUF_ROWS,
    HF_O_BIAS_ROW,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    MLP_NORM,
    Family,
    decoder_config,
    flag,
)

_NORMS = ("layer_{i}/attn_out_norm/scale", "layer_{i}/mlp_out_norm/scale")


def _rows(rows: tuple[Row, ...], *names: str) -> tuple[Row, ...]:
    """Rows with these names of the norms after attention, after the FFN, of q and of k."""
    after = (Row(*pair, "same") for pair in zip(names[:2], _NORMS, strict=True))
    heads = (
        Row(names[2 + i], f"layer_{{i}}/attn/{x}_all_norm", "split") for i, x in enumerate("qk")
    )
    return (*(y for y in rows if y.target not in (ATTENTION_NORM, MLP_NORM)), *after, *heads)


def _config(raw: dict[str, Any]) -> ModelConfig:
    bias = flag(raw, "attention_bias", False)
    fields = {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "qk_norm_over": "all"}
    raw = {"rms_norm_eps": 1e-5, **raw}
    return decoder_config(raw, "olmo2", norm_place="post", **fields)


FAMILY = Family(
    model_type="olmo2",
    config=_config,
    hf_rows=_rows(
        (*HF_ROWS, *HF_QKV_BIAS_ROWS, HF_O_BIAS_ROW),
        "model.layers.{i}.post_attention_layernorm.weight",
        "model.layers.{i}.post_feedforward_layernorm.weight",
        "model.layers.{i}.self_attn.q_norm.weight",
        "model.layers.{i}.self_attn.k_norm.weight",
    ),
    gguf_rows=_rows(
        GGUF_ROWS,
        "blk.{i}.post_attention_norm.weight",
        "blk.{i}.post_ffw_norm.weight",
        "blk.{i}.attn_q_norm.weight",
        "blk.{i}.attn_k_norm.weight",
    ),
    gguf_architecture="olmo2",
)
