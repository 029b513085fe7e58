"""Qwen2 and Qwen2.5: biases on query, key and value; optional sliding window in upper layers."""

from __future__ import annotations

from typing import Any

from popjax.config import ModelConfig
from popjax.families.family import (
    GGUF_QKV_BIAS_ROWS,
    GGUF_ROWS,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    Family,
    decoder_config,
    listed_windows,
)


def _config(raw: dict[str, Any]) -> ModelConfig:
    windows = listed_windows(raw, from_layer=raw.get("max_window_layers", 28))
    return decoder_config(raw, "qwen2", windows=windows, qkv_bias=True)


FAMILY = Family(
    model_type="qwen2",
    config=_config,
    hf_rows=(*HF_ROWS, *HF_QKV_BIAS_ROWS),
    gguf_rows=(*GGUF_ROWS, *GGUF_QKV_BIAS_ROWS),
    gguf_architecture="qwen2",
)
