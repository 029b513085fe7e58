"""GPT-NeoX and Pythia: attention and FFN side by side, a rotation of part of each head."""

from __future__ import annotations

from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig
from popjax.families.family import Family, decoder_config, flag, positive, rope_config, rope_values
from popjax.families.opt import mlp_rows, norm_rows, o_rows

_LAYER = "gpt_neox.layers.{i}."


def _config(raw: dict[str, Any]) -> ModelConfig:
    bias = flag(raw, "attention_bias", True)
    # This family's own names of what others call by these.
    rotary = {
        "rope_theta": raw.get("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": raw.get("rotary_pct", 0.25),
        **rope_values(raw),
    }
    rope = rope_config({"rope_parameters": rotary})
    return decoder_config(
        {"hidden_act": "gelu", **raw, "num_key_value_heads": None},
        "gpt_neox",
        ropes=lambda i: rope,
        norm="layer",
        norm_eps=positive({"layer_norm_eps": 1e-5, **raw}, "layer_norm_eps"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        parallel=flag(raw, "use_parallel_residual", True),
    )


FAMILY = Family(
    model_type="gpt_neox",
    config=_config,
    hf_rows=(
        Row("gpt_neox.embed_in.weight", "embed/table", "same"),
        Row("embed_out.weight", "head/table", "same"),
        *norm_rows("gpt_neox.final_layer_norm", "final_norm"),
        *norm_rows(_LAYER + "input_layernorm", "layer_{i}/attn_norm"),
        *norm_rows(_LAYER + "post_attention_layernorm", "layer_{i}/mlp_norm"),
        Row(
            _LAYER + "attention.query_key_value.weight",
            tuple(f"layer_{{i}}/attn/{x}" for x in "qkv"),
            "by_head",
        ),
        Row(
            _LAYER + "attention.query_key_value.bias",
            tuple(f"layer_{{i}}/attn/{x}_bias" for x in "qkv"),
            "by_head",
        ),
        *o_rows(_LAYER + "attention.dense"),
        *mlp_rows(_LAYER + "mlp.dense_h_to_4h", _LAYER + "mlp.dense_4h_to_h"),
    ),
)
