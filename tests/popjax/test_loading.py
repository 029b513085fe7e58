"""From a name to parameters: dtypes, files that old checkpoints carry, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
import popjax
from popjax.families import FAMILIES
from popjax.loading import open_source, parse_dtype, read_params
from tests.popjax.tiny_models import CONFIGS, random_params
from tests.popjax.toy_vocabularies import byte_level

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def reweighted(copied: Path) -> Callable[[Callable[[dict[str, np.ndarray]], Any]], Path]:
    """The copy with its tensors changed in place by a function."""

    def change(edit: Callable[[dict[str, np.ndarray]], Any]) -> Path:
        tensors = load_file(copied / WEIGHTS)
        edit(tensors)
        save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
        return copied

    return change


def reconfigured(folder: Path, **changes: Any) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


def test_parameters_are_those_of_the_files(tiny_checkpoint: Path) -> None:
    model = popjax.load(str(tiny_checkpoint))
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    mlp, attn = model.params["layer_1"]["mlp"], model.params["layer_1"]["attn"]
    prefix = "model.layers.1."
    down, gate = tensors[f"{prefix}mlp.down_proj.weight"], tensors[f"{prefix}mlp.gate_proj.weight"]
    assert (np.asarray(mlp["down"]) == down.T).all()
    assert (np.asarray(mlp["gate"]) == gate).all()
    q, o = (tensors[f"{prefix}self_attn.{x}_proj.weight"] for x in "qo")
    assert (np.asarray(attn["q"]) == q.reshape(4, 8, 32)).all()
    assert (np.asarray(attn["o"]) == o.T.reshape(4, 8, 32)).all()
    assert model.load_seconds > 0
    assert model.name == str(tiny_checkpoint)


@pytest.mark.parametrize("dtype", ["bfloat16", np.float16, jax.numpy.float32, None, "auto"])
def test_parameters_have_the_dtype_asked_for(tiny_checkpoint: Path, dtype: Any) -> None:
    model = popjax.load(str(tiny_checkpoint), dtype=dtype)
    wanted = parse_dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {wanted}
    if dtype in (None, "auto"):
        assert wanted == np.float32  # the tests run on the CPU backend


@pytest.mark.parametrize("dtype", ["int8", "float64", np.int32])
def test_other_dtypes_are_refused(tiny_checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="is not supported: use one of float32, bfloat16"):
        popjax.load(str(tiny_checkpoint), dtype=dtype)


def test_tensors_that_are_computed_or_shared_are_ignored(reweighted: Any) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    folder = reconfigured(reweighted(add), tie_word_embeddings=True)
    model = popjax.load(str(folder))  # lm_head.weight is still in the file
    assert "head" not in model.params


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks .*model.norm.weight"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "no place for .*extra"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"model.norm.weight \(found \(31,\), expected \(32,\)\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int64)}),
            "model.norm.weight .*I64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(reweighted: Any, edit: Any, complaint: str) -> None:
    with pytest.raises(checkpoints.CheckpointError, match=complaint):
        popjax.load(str(reweighted(edit)))


def test_check_tensors_finds_what_a_run_would_trip_over(reweighted: Any) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan

    folder = str(reweighted(damage))
    with pytest.raises(checkpoints.CheckpointError, match="layers.0.mlp.up_proj.weight"):
        popjax.load(folder, check_tensors=True)
    model = popjax.load(folder)
    for options in ({"method": "online-pruning", "ratio": 0.5}, {}):
        with pytest.raises(ValueError, match="not finite"):
            model.generate("The", **options)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "lama"}, "'lama' is not supported: .*nearest is 'llama'"),
        ({"hidden_size": 10**12}, "embed_dim 1000000000000 .* outside"),
        ({"num_hidden_layers": 10**12}, "num_layers 1000000000000"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_configs_that_popjax_does_not_run_are_refused(
    copied: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        popjax.load(str(reconfigured(copied, **changes)))


def test_more_layers_than_the_files_hold_are_refused(copied: Path) -> None:
    with pytest.raises(checkpoints.CheckpointError, match="lacks .*layers.2."):
        popjax.load(str(reconfigured(copied, num_hidden_layers=3)))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(checkpoints.CheckpointError, match=name.split(".")[-1]):
        popjax.load(str(copied))


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(checkpoints.CheckpointError, match="absent.gguf"):
        popjax.load(str(tmp_path / "absent.gguf"))


def write_gguf(path: Path, family: str, params: dict[str, Any]) -> None:
    """The tiny model of a family as a GGUF file, rotary pairs interleaved where GGUF does so."""
    config, layer = CONFIGS[family], CONFIGS[family].layers[0]
    arch = FAMILIES[config.family].gguf_architecture
    assert arch is not None
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(layer.mlp_dim)
    writer.add_head_count(layer.num_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(1e4 if layer.rope is None else layer.rope.theta)
    writer.add_rope_dimension_count(0 if layer.rope is None else layer.rope.rotated(8))
    if layer.softcap is not None and config.final_softcap is not None:
        writer.add_attn_logit_softcapping(layer.softcap)
        writer.add_final_logit_softcapping(config.final_softcap)
    if layer.window is not None:
        writer.add_sliding_window(layer.window)
    vocabulary = byte_level("smollm")
    writer.add_token_list(vocabulary["tokenizer.ggml.tokens"][: config.vocab_size])
    writer.add_eos_token_id(1)
    for name, tensor in checkpoints.export(params, FAMILIES[config.family].gguf_rows):
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"],
)
def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path: Path, family: str) -> None:
    params = random_params(CONFIGS[family])
    del params["layer_1"]  # GGUF states one width for all layers
    path = tmp_path / f"{family}.gguf"
    write_gguf(path, family, params)
    source = open_source(str(path))
    assert source.name == family
    assert source.config.layers == CONFIGS[family].layers[:1]
    assert source.config.tie_embeddings == CONFIGS[family].tie_embeddings
    # What such a file leaves unsaid is the width of a head.
    unsaid = {"query_scale": 8**-0.5} if family.startswith("gemma") else {}
    written = dataclasses.replace(CONFIGS[family], layers=CONFIGS[family].layers[:1], **unsaid)
    assert dataclasses.replace(source.config, norm_eps=written.norm_eps) == written
    read, _ = read_params(source)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    # One rounding of 1 + w where a file stores that.
    atol = 2 * float(np.finfo(np.float32).eps) * 4 if family.startswith("gemma") else 0
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=atol)


def test_parameters_can_be_placed_as_they_are_read(tiny_checkpoint: Path) -> None:
    device = jax.devices()[3]
    paths: list[str] = []

    def place(path: str, array: np.ndarray) -> jax.Array:
        paths.append(path)
        return jax.device_put(array, device)

    params, _ = read_params(open_source(str(tiny_checkpoint)), place=place)
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {device}
    assert len(paths) == len(set(paths)) == len(jax.tree.leaves(params))
