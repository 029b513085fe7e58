"""Mistral: Llama with an optional sliding window in every layer."""

from __future__ import annotations

from typing import Any

from popjax.config import ModelConfig
from popjax.families.family import GGUF_ROWS, HF_ROWS, Family, decoder_config, permuted


def _config(raw: dict[str, Any]) -> ModelConfig:
    # An absent key means 4096 to the published 0.1 checkpoints' own library; null means none.
    window = raw.get("sliding_window", 4096)
    return decoder_config(raw, "mistral", windows=lambda i: window)


FAMILY = Family(
    model_type="mistral",
    config=_config,
    hf_rows=HF_ROWS,
    gguf_rows=permuted(GGUF_ROWS),
    gguf_architecture="llama",
)
