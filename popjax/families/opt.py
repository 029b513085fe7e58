"""OPT: learned positions, layer norms, an FFN without a gate, biases everywhere.

Left out is what only opt-350m has: norms after the branches, and embeddings of another width.
"""

from __future__ import annotations

from typing import Any

from checkpoints import Row
from popjax.config import ModelConfig
from popjax.families.family import Family, activation, decoder_config, flag, refuse

_LAYER = "model.decoder.layers.{i}."


def _both(source: str, target: str, kinds: tuple[str, str], bias: str) -> tuple[Row, Row]:
    """The rows of a weight and its bias."""
    weight = Row(f"{source}.weight", target, kinds[0])
    return weight, Row(f"{source}.bias", bias, kinds[1])


def norm_rows(source: str, target: str) -> tuple[Row, Row]:
    """The rows of a layer norm."""
    return _both(source, f"{target}/scale", ("same", "same"), f"{target}/bias")


def mlp_rows(up: str, down: str) -> tuple[Row, ...]:
    """The rows of an FFN without a gate, whose two projections have these names."""
    biases = "layer_{i}/mlp/up_bias", "layer_{i}/mlp_bias"
    return (
        *_both(up, "layer_{i}/mlp/up", ("same", "same"), biases[0]),
        *_both(down, "layer_{i}/mlp/down", ("transpose", "same"), biases[1]),
    )


def o_rows(source: str) -> tuple[Row, Row]:
    """The rows of attention's output projection."""
    return _both(source, "layer_{i}/attn/o", ("transpose_split", "same"), "layer_{i}/attn/o_bias")


def _config(raw: dict[str, Any]) -> ModelConfig:
    unsupported = {"do_layer_norm_before": False, "_remove_final_layer_norm": True}
    refuse(raw, "opt", {**unsupported, "layer_norm_elementwise_affine": False})
    width = raw.get("word_embed_proj_dim")
    if width is not None and width != raw.get("hidden_size"):
        raise ValueError(
            f"word_embed_proj_dim {width!r} differs from hidden_size {raw.get('hidden_size')!r}, "
            "which is not supported for opt: use a model whose embeddings have its width"
        )
    bias = flag(raw, "enable_bias", True)
    known = {"tie_word_embeddings": True, **raw, "num_key_value_heads": None}
    if "ffn_dim" in raw:
        known["intermediate_size"] = raw["ffn_dim"]
    return decoder_config(
        known,
        "opt",
        ropes=lambda i: None,
        norm="layer",
        norm_eps=1e-5,
        activation=activation(raw.get("activation_function", "relu")),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        position_offset=2,
    )


FAMILY = Family(
    model_type="opt",
    config=_config,
    hf_rows=(
        Row("model.decoder.embed_tokens.weight", "embed/table", "same"),
        Row("model.decoder.embed_positions.weight", "positions/table", "same"),
        Row("lm_head.weight", "head/table", "same"),
        *norm_rows("model.decoder.final_layer_norm", "final_norm"),
        *norm_rows(_LAYER + "self_attn_layer_norm", "layer_{i}/attn_norm"),
        *norm_rows(_LAYER + "final_layer_norm", "layer_{i}/mlp_norm"),
        *(
            row
            for x in "qkv"
            for row in _both(
                f"{_LAYER}self_attn.{x}_proj",
                f"layer_{{i}}/attn/{x}",
                ("split", "split"),
                f"layer_{{i}}/attn/{x}_bias",
            )
        ),
        *o_rows(_LAYER + "self_attn.out_proj"),
        *mlp_rows(_LAYER + "fc1", _LAYER + "fc2"),
    ),
    width_key="ffn_dim",
)
