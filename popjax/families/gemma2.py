"""Gemma 2: norms of scale 1 + w around every branch, soft caps, every other layer a window."""

from __future__ import annotations

import math
from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig
from popjax.families.family import (
    GGUF_ROWS,
    HF_O_BIAS_ROW,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    MLP_NORM,
    Family,
    activation,
    decoder_config,
    flag,
    offset,
    optional,
    positive,
    refuse,
    sliding_layers,
)

# Of gemma 3 too: four norms a layer, of which one has a name that means another one elsewhere.
HF_NORM_ROWS = tuple(
    Row(f"model.layers.{{i}}.{name}.weight", f"layer_{{i}}/{norm}/scale", "same")
    for name, norm in (
        ("post_attention_layernorm", "attn_out_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_out_norm"),
    )
)
HF_BIAS_ROWS = (*HF_QKV_BIAS_ROWS, HF_O_BIAS_ROW)
GEMMA_HF_ROWS = (
    *(row for row in HF_ROWS if row.target != MLP_NORM),
    *HF_NORM_ROWS,
    *HF_BIAS_ROWS,
)
GEMMA_GGUF_ROWS = (
    *GGUF_ROWS,
    Row("blk.{i}.post_attention_norm.weight", "layer_{i}/attn_out_norm/scale", "same"),
    Row("blk.{i}.post_ffw_norm.weight", "layer_{i}/mlp_out_norm/scale", "same"),
)


def gemma_config(raw: dict[str, Any], family: str, **fields: Any) -> ModelConfig:
    """ModelConfig of what Gemma 2 and 3 share. Raises ValueError naming the bad value."""
    refuse(raw, family, {"use_bidirectional_attention": True})
    raw = {"head_dim": 256, "tie_word_embeddings": True, **raw}
    known: dict[str, Any] = {
        "activation": activation(raw.get("hidden_activation") or "gelu_pytorch_tanh"),
        "qkv_bias": flag(raw, "attention_bias", False),
        "o_bias": flag(raw, "attention_bias", False),
        "norm_offset": True,
        "norm_place": "both",
        "query_scale": positive({"query_pre_attn_scalar": 256, **raw}, "query_pre_attn_scalar")
        ** -0.5,
        "embed_scale": math.sqrt(positive(raw, "hidden_size")),
    }
    return decoder_config(raw, family, **{**known, **fields})


def _config(raw: dict[str, Any]) -> ModelConfig:
    slides = sliding_layers(raw, lambda i: i % 2 == 0)
    window = raw.get("sliding_window", 4096)
    return gemma_config(
        raw,
        "gemma2",
        windows=lambda i: window if slides[i] else None,
        softcap=optional(raw, "attn_logit_softcapping", 50.0),
        final_softcap=optional(raw, "final_logit_softcapping", 30.0),
    )


FAMILY = Family(
    model_type="gemma2",
    config=_config,
    hf_rows=GEMMA_HF_ROWS,
    gguf_rows=offset(GEMMA_GGUF_ROWS),
    gguf_architecture="gemma2",
)
