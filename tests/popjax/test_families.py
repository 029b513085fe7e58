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
from tests.popjax.published_models import LLAMA_31_8B, LLAMA_32_1B, MISTRAL_7B, QWEN3_8B, QWEN25_7B
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
        ({"model_type": "lama"}, "'lama' is not supported: .*qwen3, .*; the nearest is 'llama'"),
        ({"model_type": "mistrel"}, "the nearest is 'mistral'"),
        ({"model_type": "zzz"}, "popjax runs llama, mistral, .*, olmoe$"),
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


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "hf_rows") for family in {**CONFIGS, **dict.fromkeys(MIXTURES)}]
    + [(family, "gguf_rows") for family in CONFIGS if family not in MIXTURES],
)
def test_every_parameter_has_one_name_in_a_file(family: str, form: str) -> None:
    config = tiny(family)
    shapes = axes.parameter_shapes(dataclasses.replace(config, tie_embeddings=False))
    rows = getattr(FAMILIES[config.family], form)
    for path in (part for whole in shapes for part in parts_of(whole, shapes[whole], rows)):
        names = [name for row in rows if (name := row.to_source(path)) is not None]
        assert len(names) == 1, path
        targets = [target for row in rows if (target := row.to_target(names[0])) is not None]
        assert targets == [path]


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
    assert dataclasses.replace(read, factor=factor) == rope
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
