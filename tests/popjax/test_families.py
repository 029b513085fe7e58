"""config.json of each family becomes the right ModelConfig or one clear error; names round-trip."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from checkpoints.slices import parts_of
from popjax import axes
from popjax.config import ModelConfig, RopeConfig
from popjax.families import FAMILIES, model_config
from popjax.families.gguf import hf_config
from popjax.nn.ops import rope_frequencies
from tests.popjax.published_models import (
    GEMMA2_9B,
    GEMMA3_1B,
    LLAMA_31_8B,
    LLAMA_32_1B,
    MISTRAL_7B,
    OPT_125M,
    PHI3_MINI,
    PYTHIA_160M,
    QWEN3_8B,
    QWEN3_30B_MOE,
    QWEN25_7B,
)
from tests.popjax.tiny_models import CONFIGS, MIXTURES, tiny


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_llama_31_reads_its_scaled_rotation() -> None:
    rope = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    config = model_config(LLAMA_31_8B)
    assert {layer.rope for layer in config.layers} == {rope}
    assert config.num_layers == 32
    assert config.layers[0].head_dim == 128
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (LLAMA_31_8B, "tie_word_embeddings"),
        (LLAMA_31_8B, "attention_bias"),
        (PYTHIA_160M, "use_parallel_residual"),
        (QWEN3_30B_MOE, "norm_topk_prob"),
    ],
)
@pytest.mark.parametrize("value", ["yes", "false", 1])
def test_what_is_no_true_or_false_is_refused(raw: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} {value!r} in the model config is neither true"):
        model_config({**raw, key: value})


def test_both_forms_of_rotary_settings_read_alike() -> None:
    new = copy.deepcopy(LLAMA_31_8B)
    new["rope_parameters"] = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}
    assert model_config(new) == model_config(LLAMA_31_8B)


def test_older_type_key_and_linear_scaling() -> None:
    raw = {**LLAMA_32_1B, "rope_scaling": {"type": "linear", "factor": 4}}
    assert model_config(raw).layers[0].rope == RopeConfig(500_000.0, "linear", 4.0)


def test_heads_default_to_full_attention_and_split_width() -> None:
    raw = {key: LLAMA_31_8B[key] for key in LLAMA_31_8B if key != "num_key_value_heads"}
    assert model_config(raw).layers[0].num_kv_heads == 32


def test_llama_biases_follow_attention_bias() -> None:
    config = model_config({**LLAMA_32_1B, "attention_bias": True})
    assert config.qkv_bias and config.o_bias


@pytest.mark.parametrize(
    ("change", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_mistral_window(change: dict[str, Any], window: int | None) -> None:
    assert set(windows(model_config({**MISTRAL_7B, **change}))) == {window}


def test_mistral_without_the_key_slides_as_version_0_1_did() -> None:
    raw = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    assert set(windows(model_config(raw))) == {4096}


def test_qwen2_slides_only_where_told() -> None:
    raw = {**QWEN25_7B, "sliding_window": 8, "max_window_layers": 26}
    assert set(windows(model_config(raw))) == {None}
    assert windows(model_config({**raw, "use_sliding_window": True})) == [None] * 26 + [8, 8]
    kinds = ["sliding_attention", "full_attention"] * 14
    raw = {**raw, "use_sliding_window": True, "layer_types": kinds}
    assert windows(model_config(raw)) == [8, None] * 14


def test_qwen_switches() -> None:
    qwen2, qwen3 = model_config(QWEN25_7B), model_config(QWEN3_8B)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    without = {key: value for key, value in QWEN3_8B.items() if key != "head_dim"}
    assert model_config({**without, "hidden_size": 2560}).layers[0].head_dim == 128


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "lama"}, "'lama' is not supported: .*gpt_neox, .*; the nearest is 'llama'"),
        ({"model_type": "mistrel"}, "the nearest is 'mistral'"),
        ({"model_type": "zzz"}, "popjax runs llama, mistral, .*, opt, gpt_neox, .*, olmoe$"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": 10**9}, "embed_dim 1000000000 .* outside 1..131072"),
        ({"num_hidden_layers": 10**9}, "num_layers 1000000000 .* outside 1..1024"),
        ({"intermediate_size": -4}, "mlp_dim -4 "),
        ({"vocab_size": "many"}, "vocab_size 'many' .* not a whole number"),
        ({"num_attention_heads": 0}, "num_heads 0 "),
        ({"num_key_value_heads": 5}, "not a multiple of num_kv_heads 5"),
        ({"num_key_value_heads": 0}, "num_kv_heads 0 "),
        ({"head_dim": "128"}, "head_dim '128' "),
        ({"hidden_size": 4097}, "hidden_size 4097 is not a multiple of num_attention_heads 32"),
        ({"max_position_embeddings": 0}, "max_positions 0 "),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps None .* not a positive number"),
        ({"rope_theta": 0}, "rope_theta 0 .* not a positive number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor None"),
        ({"rope_scaling": {"type": "linear"}}, "factor None .* not a positive number"),
        ({"rope_scaling": "linear"}, "rope scaling 'linear' .* not an object"),
    ],
)
def test_bad_config_files_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        model_config({**LLAMA_31_8B, **change})


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ],
)
def test_a_missing_size_is_named(key: str) -> None:
    raw = {name: value for name, value in LLAMA_31_8B.items() if name != key}
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        model_config(raw)


def test_layer_types_must_cover_the_layers() -> None:
    with pytest.raises(ValueError, match="layer_types has 1 entries for 28 layers"):
        model_config({**QWEN25_7B, "layer_types": ["full_attention"]})


def test_gemma_2_slides_in_every_other_layer_and_caps() -> None:
    config = model_config(GEMMA2_9B)
    assert windows(config) == [4096, None] * 21
    assert {layer.softcap for layer in config.layers} == {50.0}
    assert config.final_softcap == 30.0
    assert (config.query_scale, config.embed_scale) == (1 / 16, 3584**0.5)
    plain = {**GEMMA2_9B, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert model_config(plain).layers[0].softcap is model_config(plain).final_softcap is None


def test_gemma_3_turns_its_two_kinds_of_layers_apart() -> None:
    scaled = {**GEMMA3_1B, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    everywhere, local = RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4)
    kinds = ([(512, local)] * 5 + [(None, everywhere)]) * 5
    config = model_config(scaled)
    assert [(layer.window, layer.rope) for layer in config.layers] == kinds[:26]
    nested = {"full_attention": {**scaled["rope_scaling"], "rope_theta": 1e6}}
    nested["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
    newer = {key: value for key, value in GEMMA3_1B.items() if not key.startswith("rope_")}
    assert model_config({**newer, "rope_parameters": nested}) == config


def test_phi_3_beyond_its_first_context_is_not_claimed() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "type": "longrope"}
    sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    config = model_config({**PHI3_MINI, **sizes, "rope_scaling": factors})
    assert config.max_positions == 4096
    rope = config.layers[0].rope
    assert rope is not None and rope.factors == (1.0,) * 48
    assert rope.magnitude == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)


@pytest.mark.parametrize(
    ("raw", "change", "complaint"),
    [
        (GEMMA2_9B, {"final_logit_softcapping": 0}, "final_logit_softcapping 0 .* not a positive"),
        (GEMMA2_9B, {"attn_logit_softcapping": -5.0}, "attn_logit_softcapping -5.0 .* not a pos"),
        (GEMMA2_9B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0 .* not a positive"),
        (GEMMA2_9B, {"hidden_activation": "tanh"}, "hidden_act 'tanh' is not supported"),
        (GEMMA2_9B, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (GEMMA2_9B, {"layer_types": ["chunked_attention"] * 42}, "names 'chunked_attention'"),
        (GEMMA2_9B, {"layer_types": "full"}, "layer_types has 'full' entries for 42 layers"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern 0 is not a whole"),
        (GEMMA3_1B, {"rope_local_base_freq": -1}, "rope_theta -1 .* not a positive number"),
        (GEMMA3_1B, {"model_type": "gemma3"}, "'gemma3' is not supported: it has a part that sees"),
        (GEMMA3_1B, {"model_type": "gemma"}, "'gemma' is not supported: .*Gemma 2 and 3"),
        (PHI3_MINI, {"rope_scaling": {"type": "longrope"}}, "lacks its list short_factor"),
        (PHI3_MINI, {"partial_rotary_factor": 1.5}, "rotary share 1.5 is outside 0..1"),
        (OPT_125M, {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported"),
        (OPT_125M, {"word_embed_proj_dim": 512}, "word_embed_proj_dim 512 differs from hidden_siz"),
        (OPT_125M, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        (OPT_125M, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
        (PYTHIA_160M, {"rotary_pct": 0}, "partial_rotary_factor 0 .* not a positive number"),
        (PYTHIA_160M, {"rotary_pct": 1.5}, "rotary share 1.5 is outside 0..1"),
        (PYTHIA_160M, {"rotary_pct": 0.02}, "head_dim 64 turns 1 is odd or below 2"),
        (PYTHIA_160M, {"layer_norm_eps": 0}, "layer_norm_eps 0 .* not a positive number"),
    ],
)
def test_impossible_values_of_later_families_are_refused(
    raw: dict[str, Any], change: dict[str, Any], complaint: str
) -> None:
    model_config(raw)
    with pytest.raises(ValueError, match=complaint):
        model_config({**raw, **change})


@pytest.mark.parametrize("family", {**CONFIGS, **dict.fromkeys(MIXTURES)})
@pytest.mark.parametrize("form", ["hf_rows", "gguf_rows"])
def test_every_parameter_has_one_name_in_a_file(family: str, form: str) -> None:
    config = tiny(family)
    rows = getattr(FAMILIES[config.family], form)
    if not rows:
        assert FAMILIES[config.family].gguf_architecture is None
        return
    shapes = axes.parameter_shapes(dataclasses.replace(config, tie_embeddings=False))
    for path in (part for whole in shapes for part in parts_of(whole, shapes[whole], rows)):
        names = [name for row in rows if (name := row.to_source(path)) is not None]
        assert len(names) == 1, path
        targets = [paths for row in rows if (paths := row.to_targets(names[0])) is not None]
        assert len(targets) == 1 and path in targets[0]


def gguf_metadata(arch: str, **entries: Any) -> dict[str, Any]:
    values = {
        "block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "context_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **entries,
    }
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    tokens = {"tokenizer.ggml.tokens": ["a"] * 97, "tokenizer.ggml.eos_token_id": 3}
    return {"general.architecture": arch, **metadata, **tokens}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_metadata_becomes_the_config_of_the_hub(arch: str) -> None:
    raw = hf_config(gguf_metadata(arch, **{"rope.freq_base": 5e5}), ["output.weight"])
    config = model_config(raw)
    assert (config.family, config.num_layers, config.embed_dim) == (arch, 2, 32)
    assert config.layers[0].rope == RopeConfig(5e5)
    assert (config.layers[1].mlp_dim, config.layers[1].head_dim) == (48, 8)
    assert (config.max_positions, config.norm_eps) == (64, 1e-5)
    assert not config.tie_embeddings
    assert raw["eos_token_id"] == 3


def test_gguf_window_means_mistral_and_no_output_means_tied() -> None:
    config = model_config(hf_config(gguf_metadata("llama", **{"attention.sliding_window": 6}), []))
    assert config.family == "mistral"
    assert windows(config) == [6, 6]
    assert config.tie_embeddings


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rotary_divisors_give_back_the_llama3_scaling(factor: float) -> None:
    rope = RopeConfig(500_000.0, "llama3", factor, 1.0, 4.0, 8192)
    divisors = rope_frequencies(RopeConfig(500_000.0), 128) / rope_frequencies(rope, 128)
    metadata = gguf_metadata("llama", **{"rope.freq_base": 500_000.0, "attention.key_length": 128})
    read = model_config(hf_config(metadata, [], divisors)).layers[0].rope
    assert read is not None and dataclasses.replace(read, factor=factor) == rope
    assert read.factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    ("metadata", "factors", "complaint"),
    [
        (gguf_metadata("gpt2"), None, "architecture 'gpt2' is not supported"),
        (gguf_metadata("llama"), np.full(4, 2.0), "not a llama3 rope scaling"),
        (gguf_metadata("llama", **{"rope.scaling.type": "yarn"}), None, "rope scaling 'yarn'"),
        (gguf_metadata("llama", **{"rope.scaling.type": "linear"}), None, "rope.scaling.factor"),
        ({"general.architecture": "llama"}, None, "lacks 'llama"),
    ],
)
def test_gguf_that_cannot_be_read_right_is_refused(
    metadata: dict[str, Any], factors: np.ndarray | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        hf_config(metadata, [], factors)
