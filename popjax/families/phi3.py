"""Phi 3 and Phi 4 (text): Llama with fused projections in the file and maybe a partial rotation.

Of models whose rotation changes beyond a first context ("longrope"), that first context is run: the
other rotation would hold for all tokens as soon as there are more, those already in a cache too.
"""

from __future__ import annotations

import math
from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig, RopeConfig
from popjax.families.family import (
    GGUF_ROWS,
    HF_ROWS,
    Family,
    decoder_config,
    positive,
    required,
    rope_config,
    rope_values,
)

_QKV = tuple(f"layer_{{i}}/attn/{name}" for name in "qkv")
_GATE_UP = ("layer_{i}/mlp/gate", "layer_{i}/mlp/up")


def _rows(rows: tuple[Row, ...], qkv: str, gate_up: str) -> tuple[Row, ...]:
    fused = Row(qkv, _QKV, "stacked"), Row(gate_up, _GATE_UP, "stacked")
    return (*(row for row in rows if row.target not in (*_QKV, *_GATE_UP)), *fused)


def _config(raw: dict[str, Any]) -> ModelConfig:
    raw = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **raw}
    window, fields = raw.get("sliding_window"), {}
    values = rope_values(raw)
    kind = values.get("rope_type", values.get("type", "default"))
    # "su" and "yarn" are what older files of these models call it.
    if kind not in ("longrope", "su", "yarn"):
        return decoder_config(raw, "phi3", windows=lambda i: window)
    rope, fields["max_positions"] = _long_rope(raw, values)
    return decoder_config(raw, "phi3", lambda i: window, lambda i: rope, **fields)


def _long_rope(raw: dict[str, Any], values: dict[str, Any]) -> tuple[RopeConfig, int]:
    """The rotation of the first context, and how many tokens that is."""
    plain = {**raw, "rope_scaling": None}
    plain["rope_parameters"] = {**values, "rope_type": "default", "type": "default"}
    rope, factors = rope_config(plain), values.get("short_factor")
    if not isinstance(factors, list) or not factors:
        raise ValueError("rope scaling 'longrope' lacks its list short_factor: repair config.json")
    factors = tuple(positive({"short_factor": factor}, "short_factor") for factor in factors)
    first = {**values, **raw}
    context = required(first, "original_max_position_embeddings", "max_positions")
    grown = required(raw, "max_position_embeddings", "max_positions") / context
    magnitude = values.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(grown) / math.log(context)) if grown > 1 else 1.0
    rope = RopeConfig(rope.theta, "factors", share=rope.share, factors=factors, magnitude=magnitude)
    return rope, context


FAMILY = Family(
    model_type="phi3",
    config=_config,
    hf_rows=_rows(
        HF_ROWS,
        "model.layers.{i}.self_attn.qkv_proj.weight",
        "model.layers.{i}.mlp.gate_up_proj.weight",
    ),
    gguf_rows=_rows(GGUF_ROWS, "blk.{i}.attn_qkv.weight", "blk.{i}.ffn_up.weight"),
    gguf_architecture="phi3",
)
