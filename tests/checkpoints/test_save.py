"""Export: rows backwards, and folders of the Hugging Face layout that appear whole or not."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from checkpoints import CheckpointError, Row, convert, export, open_folder, save_safetensors

ROWS = (
    Row("embed.weight", "embed/table", "same"),
    Row("head.weight", "head/table", "same"),
    Row("layers.{i}.q.weight", "layer_{i}/attn/q", "unpermute_split"),
    Row("layers.{i}.q.bias", "layer_{i}/attn/q_bias", "unpermute_split"),
    Row("layers.{i}.o.weight", "layer_{i}/attn/o", "transpose_split"),
    Row("layers.{i}.down.weight", "layer_{i}/mlp/down", "transpose"),
)
N, H, D, F, V = 2, 4, 3, 5, 7


def tree(dtype=jnp.float32):
    rng = np.random.default_rng(4)

    def made(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

    attn = {"q": made(N, H, D), "q_bias": made(N, H), "o": made(N, H, D)}
    return {
        "embed": {"table": made(V, D)},
        "layer_0": {"attn": attn, "mlp": {"down": made(F, D)}},
    }


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shard_bytes", [1, 100, 2**30])
def test_round_trip(tmp_path, dtype, shard_bytes):
    params = tree(dtype)
    save_safetensors(
        tmp_path / "out", export(params, ROWS), config={"a": 1}, shard_bytes=shard_bytes
    )
    back = convert(open_folder(tmp_path / "out"), ROWS, dict(leaves(params)), dtype=dtype)
    assert dict(leaves(back)).keys() == dict(leaves(params)).keys()
    for (_, ours), (_, theirs) in zip(leaves(params), leaves(back), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_export_skips_absent_targets_and_keeps_order():
    exported = dict(export(tree(), ROWS))
    assert list(exported) == [
        "embed.weight",
        "layers.0.q.weight",
        "layers.0.q.bias",
        "layers.0.o.weight",
        "layers.0.down.weight",
    ]
    assert exported["layers.0.o.weight"].shape == (D, N * H)
    assert all(array.flags.c_contiguous for array in exported.values())


def test_export_refuses_a_path_without_a_row():
    params = {**tree(), "norm": {"scale": jnp.ones(D)}, "other": jnp.ones(1)}
    with pytest.raises(CheckpointError, match="no row exports 2 parameters: norm/scale, other"):
        export(params, ROWS)


def test_export_refuses_two_names_for_a_path():
    rows = (*ROWS, Row("wte.weight", "embed/table", "same"))
    with pytest.raises(CheckpointError, match="1 parameter: embed/table -> embed.weight or wte"):
        export(tree(), rows)


def test_export_refuses_one_name_for_two_paths():
    params, rows = (
        {"a": jnp.ones(1), "b": jnp.ones(1)},
        (Row("x", "a", "same"), Row("x", "b", "same")),
    )
    with pytest.raises(CheckpointError, match="no single name to 1 parameter: b -> x"):
        export(params, rows)


def test_single_file_layout(tmp_path):
    folder = save_safetensors(
        tmp_path / "out",
        export(tree(), ROWS),
        config={"model_type": "llama", "name": "é"},
        extra_files={"tokenizer.json": "{}", "tokenizer.model": b"\x00\xff"},
    )
    assert files(folder) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == {"model_type": "llama", "name": "é"}
    assert (folder / "tokenizer.model").read_bytes() == b"\x00\xff"
    with safe_open(folder / "model.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_sharded_layout(tmp_path):
    arrays = {f"w{i}": np.full(4, i, np.float32) for i in range(5)}  # 16 bytes each
    folder = save_safetensors(tmp_path / "out", arrays.items(), config={}, shard_bytes=40)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80}
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {f"w{i}": shards[i // 2] for i in range(5)}
    assert files(folder) == ["config.json", *shards, "model.safetensors.index.json"]
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(folder / shard)[name], arrays[name])


def test_one_shard_in_memory(tmp_path):
    """When a shard's first tensor is asked for, all but the last shard are already on disk."""

    def stream():
        for i in range(6):
            yield f"w{i}", np.zeros(4, np.float32)
            (partial,) = tmp_path.glob(".out.*")
            written = len(list(partial.glob("shard-*")))
            assert written == max(0, i // 2), f"after tensor {i}"

    save_safetensors(tmp_path / "out", stream(), config={}, shard_bytes=32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    folder = save_safetensors(tmp_path / "out", [("w", array.T)], config={})
    read = open_folder(folder).read("w")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array.T)


def test_existing_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    save_safetensors(target, [("w", np.ones(1))], config={})  # an empty folder is fine
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save_safetensors(target, [("w", np.zeros(1))], config={})
    assert (target / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("seen", [1, 3])
def test_failure_leaves_nothing(tmp_path, seen):
    def failing():
        for i in range(seen):
            yield f"w{i}", np.ones(4, np.float32)
        raise RuntimeError("the device went away")

    with pytest.raises(RuntimeError, match="the device went away"):
        save_safetensors(tmp_path / "out", failing(), config={}, shard_bytes=16)
    assert files(tmp_path) == []


@pytest.mark.parametrize("shard_bytes", [1, 100])
def test_name_twice(tmp_path, shard_bytes):
    twice = [("w", np.ones(1)), ("v", np.ones(1)), ("w", np.ones(1))]
    with pytest.raises(CheckpointError, match="tensor 'w' comes twice"):
        save_safetensors(tmp_path / "out", twice, config={}, shard_bytes=shard_bytes)
    assert files(tmp_path) == []


def test_nothing_to_save(tmp_path):
    with pytest.raises(CheckpointError, match="there is no tensor to save"):
        save_safetensors(tmp_path / "out", [], config={})


@pytest.mark.parametrize("name", ["../x", "a/b", "config.json", "model.safetensors", ""])
def test_bad_extra_file(tmp_path, name):
    with pytest.raises(CheckpointError, match="must be a plain, unused file name"):
        save_safetensors(tmp_path / "out", [("w", np.ones(1))], config={}, extra_files={name: ""})
