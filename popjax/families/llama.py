"""Llama 2, 3, 3.1 (scaled rope), 3.2 and their relatives such as SmolLM2."""

from __future__ import annotations

from typing import Any

from popjax.config import ModelConfig
from popjax.families.family import (
    GGUF_ROWS,
    HF_O_BIAS_ROW,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    Family,
    decoder_config,
    flag,
    permuted,
)


def _config(raw: dict[str, Any]) -> ModelConfig:
    if raw.get("mlp_bias"):
        raise ValueError("mlp_bias true is not supported for llama: no published checkpoint has it")
    bias = flag(raw, "attention_bias", False)
    return decoder_config(raw, "llama", qkv_bias=bias, o_bias=bias)


FAMILY = Family(
    model_type="llama",
    config=_config,
    hf_rows=(*HF_ROWS, *HF_QKV_BIAS_ROWS, HF_O_BIAS_ROW),
    gguf_rows=permuted(GGUF_ROWS),
    gguf_architecture="llama",
)
