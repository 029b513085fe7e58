"""GGUF files of mixtures: the model that its safetensors are, written by the gguf package's names.

Tensors are stacked, permuted and typed as llama.cpp's converter does it, by rules written out here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

import checkpoints
from popjax.families import FAMILIES
from popjax.families.gguf import hf_config
from popjax.loading import Source, open_source, read_params
from popjax.run import Request, run
from tests.popjax.test_families import gguf_metadata
from tests.popjax.tiny_models import MIXTURES, PROMPTS, random_params
from tests.popjax.toy_vocabularies import byte_level

HEADS, KV_HEADS, VOCAB = 4, 2, 96
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2**-20,  # which float32 holds as it is
    "rope_theta": 10_000.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
RAW: dict[str, dict[str, Any]] = {
    "mixtral": {**BASE, "num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {
        **BASE,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {**BASE, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": {**BASE, "norm_topk_prob": False},
}
ARCHES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
KINDS = gguf.GGMLQuantizationType
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")


def written(family: str) -> dict[str, np.ndarray]:
    """The tensors of the family's model by the names of its safetensors."""
    config = FAMILIES[family].config(RAW[family])
    return dict(checkpoints.export(random_params(config), FAMILIES[family].hf_rows))


def rounded(tensors: dict[str, np.ndarray], kind: Any) -> dict[str, np.ndarray]:
    """The values that a file of this type holds: matrices but routers are rounded."""
    return {
        name: np.asarray(w) if plain(name, w) else gguf.dequantize(gguf.quantize(w, kind), kind)
        for name, w in tensors.items()
    }


def plain(name: str, w: np.ndarray) -> bool:
    """Whether the converter leaves a tensor in float32."""
    return w.ndim == 1 or name.endswith(
        ("mlp.gate.weight", "moe.gate.weight", "expert_gate.weight")
    )


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with the experts of a layer in one tensor [E, ...]."""
    found: dict[str, Any] = {}
    for name, w in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            found[name] = w
        else:
            start, expert, which = match.groups()
            one = found.setdefault(f"{start}.experts.{which}.weight", [])
            assert int(expert) == len(one)
            one.append(w)
    return {name: np.stack(w) if isinstance(w, list) else w for name, w in found.items()}


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def write_gguf(path: Path, family: str, tensors: dict[str, np.ndarray], kind: Any) -> Path:
    raw, arch = RAW[family], ARCHES[family]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(raw["head_dim"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_expert_count(raw["num_experts"])
    writer.add_expert_used_count(raw["num_experts_per_tok"])
    if "moe_intermediate_size" in raw:
        writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in raw:
        writer.add_expert_shared_feed_forward_length(raw["shared_expert_intermediate_size"])
    writer.add_token_list(byte_level("smollm")["tokenizer.ggml.tokens"][:VOCAB])
    writer.add_eos_token_id(1)
    named = {gguf.MODEL_ARCH_NAMES[a]: a for a in gguf.MODEL_ARCH}[arch]
    names = gguf.get_tensor_name_map(named, raw["num_hidden_layers"])
    for name, w in stacked(tensors).items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = permuted(w, HEADS if "q_proj" in name else KV_HEADS)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        if plain(name, w):
            writer.add_tensor(target, np.ascontiguousarray(w))
        else:
            writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(w), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def both(folder: Path, family: str, kind: Any) -> tuple[Source, Source]:
    """The model from its GGUF file and from the safetensors of the same values."""
    tensors = written(family)
    path = write_gguf(folder / f"{family}.gguf", family, tensors, kind)
    raw = {**RAW[family], "model_type": family}
    values = rounded(tensors, kind).items()
    checkpoints.save_safetensors(folder / "hub", values, config=raw)
    return open_source(str(path)), open_source(str(folder / "hub"))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, KINDS.F32) for family in MIXTURES),
        ("mixtral", KINDS.F16),
        ("qwen2_moe", KINDS.BF16),
        ("qwen3_moe", KINDS.Q8_0),
        ("olmoe", KINDS.Q4_0),
        ("mixtral", KINDS.Q8_0),
    ],
)
def test_a_file_is_the_model_of_the_same_safetensors(
    family: str, kind: Any, tmp_path: Path
) -> None:
    file, hub = both(tmp_path, family, kind)
    assert file.config == hub.config and file.family is hub.family
    (mine, _), (other, _) = read_params(file), read_params(hub)
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mine):
        wanted: Any = other
        for key in path:
            wanted = wanted[key.key]
        assert leaf.dtype == wanted.dtype and (leaf == wanted).all(), path


def test_it_says_what_the_hub_says_and_runs(tmp_path: Path) -> None:
    """config.json written from metadata is what the family's own reads to the same model."""
    file, hub = both(tmp_path, "qwen2_moe", KINDS.F32)
    assert FAMILIES["qwen2_moe"].config(file.raw) == hub.config
    found = [
        run(read_params(each)[0], each.config, Request(PROMPTS[:1], 4)).tokens.tolist()
        for each in (file, hub)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", [(1, 64), (64,)])
def test_a_vector_may_be_written_with_a_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = written("qwen2_moe")
    for name in tensors:
        if name.endswith("shared_expert_gate.weight"):
            tensors[name] = tensors[name].reshape(shape)
    path = write_gguf(tmp_path / "model.gguf", "qwen2_moe", tensors, KINDS.F32)
    params, _ = read_params(open_source(str(path)))
    assert params["layer_0"]["moe"]["shared_gate"].shape == (64,)


@pytest.mark.parametrize(
    ("arch", "entries", "wanted"),
    [
        ("llama", {}, None),
        ("llama", {"expert_count": 8}, (True, 48, 0)),
        ("qwen2moe", {"expert_count": 8}, (False, 24, 48)),
        ("qwen2moe", {"expert_count": 8, "expert_weights_norm": True}, (True, 24, 48)),
        ("qwen3moe", {"expert_count": 8, "expert_feed_forward_length": 12}, (True, 12, 0)),
        ("qwen3moe", {"expert_count": 8, "expert_weights_norm": False}, (False, 24, 0)),
        ("olmoe", {"expert_count": 8, "expert_gating_func": 1}, (False, 48, 0)),
    ],
)
def test_what_metadata_leave_unsaid(
    arch: str, entries: dict[str, Any], wanted: tuple[bool, int, int] | None
) -> None:
    """Weights of a token's experts sum to one where llama.cpp has it so, widths are its own."""
    raw = hf_config(gguf_metadata(arch, **{"expert_used_count": 2, **entries}), ["output.weight"])
    layer = FAMILIES[raw["model_type"]].config(raw).layers[0]
    if wanted is None:
        assert raw["model_type"] == "llama" and layer.moe is None
        return
    assert layer.moe is not None and (layer.moe.num_experts, layer.moe.top_k) == (8, 2)
    assert (layer.moe.renormalise, layer.moe.expert_dim, layer.mlp_dim) == wanted


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"expert_count": 8}, "lacks 'llama.expert_used_count'"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_gating_func": 2}, "by function 2"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_weights_scale": 2.5}, "scale 2.5"),
    ],
)
def test_experts_that_are_weighted_otherwise(entries: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        hf_config(gguf_metadata("llama", **entries), [])


@pytest.mark.parametrize("stated", [3, 8])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "expert_count"])
def test_another_number_of_experts_is_one_short_sentence(
    key: str, stated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "mixtral" if key == "num_local_experts" else "qwen3_moe"
    tensors = written(family)
    changed = {k: v for k, v in RAW[family].items() if k != "num_experts"} | {key: stated}
    if key == "expert_count":
        monkeypatch.setitem(RAW, family, {**RAW[family], "num_experts": stated})
        path = write_gguf(tmp_path / "model.gguf", family, tensors, KINDS.F32)
    else:
        path = tmp_path / "hub"
        checkpoints.save_safetensors(
            path, tensors.items(), config={**changed, "model_type": family}
        )
    with pytest.raises(checkpoints.CheckpointError) as caught:
        read_params(open_source(str(path)))
    said = str(caught.value).replace(str(path), "FOLDER")
    assert f"{key} is {stated}, and the weights have 4 experts in layer 0" in said
    assert len(said) < 200 and "down_proj" not in said


def test_experts_that_are_lost_are_named_few_and_counted(tmp_path: Path) -> None:
    """The router says that the config is right, so the tensors are what is wrong."""
    tensors = {k: v for k, v in written("qwen3_moe").items() if ".experts.3." not in k}
    raw = {**RAW["qwen3_moe"], "model_type": "qwen3_moe"}
    checkpoints.save_safetensors(tmp_path / "hub", tensors.items(), config=raw)
    with pytest.raises(checkpoints.CheckpointError, match="lacks 6 tensors: .* and 1 more"):
        read_params(open_source(str(tmp_path / "hub")))
