"""Qwen3 (dense): an RMS norm on every query and key head, no attention bias by default."""

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
    listed_windows,
)


def _config(raw: dict[str, Any]) -> ModelConfig:
    bias = flag(raw, "attention_bias", False)
    windows = listed_windows(raw, from_layer=raw.get("max_window_layers", 28))
    raw = {"head_dim": 128, **raw}
    return decoder_config(raw, "qwen3", windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True)


FAMILY = Family(
    model_type="qwen3",
    config=_config,
    hf_rows=(*HF_ROWS, *HF_QK_NORM_ROWS, *HF_QKV_BIAS_ROWS, HF_O_BIAS_ROW),
    gguf_rows=(*GGUF_ROWS, *GGUF_QK_NORM_ROWS),
    gguf_architecture="qwen3",
)
