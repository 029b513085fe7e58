"""Gemma 3 (text): five windowed layers to one that sees all, each kind with a rotation of its own.

The models that see images are left out: this reads their text part where it is published alone.
"""

from __future__ import annotations

from typing import Any

from popjax.config import ModelConfig, RopeConfig
from popjax.families.family import (
    GGUF_QK_NORM_ROWS,
    HF_QK_NORM_ROWS,
    Family,
    offset,
    optional,
    rope_config,
    rope_values,
    sliding_layers,
)
from popjax.families.gemma2 import GEMMA_GGUF_ROWS, GEMMA_HF_ROWS, gemma_config


def _config(raw: dict[str, Any]) -> ModelConfig:
    if raw.get("attn_logit_softcapping") is not None:
        raise ValueError("attn_logit_softcapping is not supported for gemma3_text: set it to null")
    pattern = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    if not isinstance(pattern, int) or pattern < 1:
        raise ValueError(f"sliding_window_pattern {pattern!r} is not a whole number above 0")
    slides = sliding_layers(raw, lambda i: (i + 1) % pattern > 0)
    window = raw.get("sliding_window", 4096)
    everywhere, local = _ropes(raw)
    return gemma_config(
        raw,
        "gemma3_text",
        windows=lambda i: window if slides[i] else None,
        ropes=lambda i: local if slides[i] else everywhere,
        final_softcap=optional(raw, "final_logit_softcapping"),
        qk_norm=True,
    )


def _ropes(raw: dict[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Rotation of the layers that see all, and of those with a window."""
    values = rope_values(raw)
    nested = [values.get(kind) for kind in ("full_attention", "sliding_attention")]
    if not any(nested):
        # Older files: a base each, and a scaling that only the layers that see all have.
        nested = [values, None]
    pairs = (("rope_theta", 1e6), ("rope_local_base_freq", 1e4))
    made = [
        rope_config({"rope_theta": raw.get(key, base), "rope_parameters": scaling})
        for (key, base), scaling in zip(pairs, nested, strict=True)
    ]
    return made[0], made[1]


FAMILY = Family(
    model_type="gemma3_text",
    config=_config,
    hf_rows=(*GEMMA_HF_ROWS, *HF_QK_NORM_ROWS),
    gguf_rows=offset((*GEMMA_GGUF_ROWS, *GGUF_QK_NORM_ROWS)),
    gguf_architecture="gemma3",
)
