"""Qwen2-MoE: experts beside one that every token uses, whose output a sigmoid of the input scales.

Some layers may be dense.
"""

from __future__ import annotations

from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig
from popjax.families.family import (
    GGUF_QKV_BIAS_ROWS,
    GGUF_ROWS,
    HF_QKV_BIAS_ROWS,
    HF_ROWS,
    Family,
    decoder_config,
    flag,
    listed_windows,
    required,
)
from popjax.families.mixture import (
    EXPERT_ROWS,
    GGUF_EXPERT_ROWS,
    dense_layers,
    moe_config,
    with_experts,
)

_SHARED = "model.layers.{i}.mlp.shared_expert"
_SHARED_ROWS = (
    Row(f"{_SHARED}.gate_proj.weight", "layer_{i}/shared/gate", "same"),
    Row(f"{_SHARED}.up_proj.weight", "layer_{i}/shared/up", "same"),
    Row(f"{_SHARED}.down_proj.weight", "layer_{i}/shared/down", "transpose"),
    Row(f"{_SHARED}_gate.weight", "layer_{i}/moe/shared_gate", "row"),
)
_GGUF_SHARED_ROWS = (
    Row("blk.{i}.ffn_gate_shexp.weight", "layer_{i}/shared/gate", "same"),
    Row("blk.{i}.ffn_up_shexp.weight", "layer_{i}/shared/up", "same"),
    Row("blk.{i}.ffn_down_shexp.weight", "layer_{i}/shared/down", "transpose"),
    Row("blk.{i}.ffn_gate_inp_shexp.weight", "layer_{i}/moe/shared_gate", "same"),
)


def _config(raw: dict[str, Any]) -> ModelConfig:
    if raw.get("layer_types") is None:
        # Every other one of the lower layers, as the family's own code has it.
        lower, slides = raw.get("max_window_layers", 28), flag(raw, "use_sliding_window", False)
        kinds = [
            "sliding_attention" if slides and i % 2 == 0 and i < lower else "full_attention"
            for i in range(required(raw, "num_hidden_layers", "num_layers"))
        ]
        raw = {**raw, "layer_types": kinds}
    bias = flag(raw, "qkv_bias", True)
    windows = listed_windows(raw, from_layer=0)
    config = decoder_config(raw, "qwen2_moe", windows=windows, qkv_bias=bias)
    renormalise = flag(raw, "norm_topk_prob", False)
    moe = moe_config(raw, "moe_intermediate_size", renormalise, shared_gate=True)
    shared = required(raw, "shared_expert_intermediate_size", "mlp_dim")
    return with_experts(config, moe, shared, dense_layers(raw))


FAMILY = Family(
    model_type="qwen2_moe",
    config=_config,
    hf_rows=(*HF_ROWS, *HF_QKV_BIAS_ROWS, *EXPERT_ROWS, *_SHARED_ROWS),
    gguf_rows=(*GGUF_ROWS, *GGUF_QKV_BIAS_ROWS, *GGUF_EXPERT_ROWS, *_GGUF_SHARED_ROWS),
    gguf_architecture="qwen2moe",
)
