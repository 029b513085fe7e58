"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from popjax.config import ModelConfig
from popjax.families.family import GGUF_ROWS, HF_ROWS, Family, decoder_config, permuted
from popjax.families.mixture import GGUF_EXPERT_ROWS, expert_rows, moe_config, with_experts


def _config(raw: dict[str, Any]) -> ModelConfig:
    raw = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **raw}
    window = raw.get("sliding_window")
    config = decoder_config(raw, "mixtral", windows=lambda i: window)
    return with_experts(config, moe_config(raw, "intermediate_size", renormalise=True))


FAMILY = Family(
    model_type="mixtral",
    config=_config,
    hf_rows=(*HF_ROWS, *expert_rows("block_sparse_moe", "w1", "w3", "w2")),
    gguf_rows=permuted((*GGUF_ROWS, *GGUF_EXPERT_ROWS)),
    gguf_architecture="llama",
)
