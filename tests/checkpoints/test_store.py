"""Our own checkpoints: what goes in comes out, on one device or spread over a mesh."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import CheckpointError, store

CONFIG = {"model_type": "llama", "num_layers": 2, "rope": {"theta": 1e4}, "eos": [1, 2]}


def params():
    return {
        "embed": {"table": jnp.arange(64.0).reshape(16, 4)},
        "layer_0": {"attn": {"q": jnp.ones((8, 2, 4), jnp.bfloat16) * 1.5}},
        "final_norm": {"scale": jnp.full((4,), 2.0, jnp.float16)},
    }


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def mesh():
    assert jax.device_count() == 8
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("model", "data"))


def by_path(mesh):
    specs = {
        "embed/table": PartitionSpec("model"),
        "layer_0/attn/q": PartitionSpec("model", "data"),
        "final_norm/scale": PartitionSpec(),
    }
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def test_round_trip(tmp_path):
    folder = store.save(tmp_path / "ckpt", CONFIG, params())
    config, restored = store.restore(folder)
    assert config == CONFIG
    assert_same(restored, params())
    assert restored["embed"]["table"].devices() == {jax.devices()[0]}


def test_numpy_params(tmp_path):
    store.save(tmp_path / "ckpt", {}, {"w": np.arange(3, dtype=np.float32)})
    assert store.restore(tmp_path / "ckpt")[1]["w"].tolist() == [0, 1, 2]


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.save("ckpt", CONFIG, params())
    assert store.restore("ckpt")[0] == CONFIG


def test_restore_onto_a_mesh_by_path(tmp_path, mesh):
    store.save(tmp_path / "ckpt", CONFIG, params())
    shardings = by_path(mesh)
    _, restored = store.restore(tmp_path / "ckpt", shardings=shardings.__getitem__)
    assert_same(restored, params())
    q = restored["layer_0"]["attn"]["q"]
    assert q.sharding == shardings["layer_0/attn/q"]
    assert q.addressable_shards[0].data.shape == (2, 1, 4)
    assert restored["final_norm"]["scale"].sharding.is_fully_replicated


def test_restore_onto_a_mesh_by_tree(tmp_path, mesh):
    store.save(tmp_path / "ckpt", CONFIG, params())
    tree = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params())
    _, restored = store.restore(tmp_path / "ckpt", shardings=tree)
    assert_same(restored, params())
    assert restored["embed"]["table"].sharding == tree["embed"]["table"]


def test_saved_sharded_restored_on_one_device_and_on_another_mesh(tmp_path, mesh):
    shardings = by_path(mesh)
    spread = {
        "embed": {"table": jax.device_put(params()["embed"]["table"], shardings["embed/table"])}
    }
    store.save(tmp_path / "ckpt", CONFIG, spread)
    _, restored = store.restore(tmp_path / "ckpt")
    assert_same(restored, {"embed": params()["embed"]})
    assert restored["embed"]["table"].devices() == {jax.devices()[0]}
    line = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    _, restored = store.restore(tmp_path / "ckpt", shardings=lambda path: line)
    assert_same(restored, {"embed": params()["embed"]})
    assert restored["embed"]["table"].sharding == line


def test_existing_folder(tmp_path):
    (tmp_path / "ckpt").mkdir()
    store.save(tmp_path / "ckpt", CONFIG, params())  # an empty folder is fine
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        store.save(tmp_path / "ckpt", {}, {"w": jnp.zeros(1)})
    assert store.restore(tmp_path / "ckpt")[0] == CONFIG


def test_failed_save_leaves_no_checkpoint(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        store.save(tmp_path / "ckpt", {"not json": object()}, params())
    with pytest.raises(CheckpointError, match="ckpt does not exist"):
        store.restore(tmp_path / "ckpt")


def test_absent_folder(tmp_path):
    with pytest.raises(CheckpointError, match="gone does not exist: pass a folder"):
        store.restore(tmp_path / "gone")


def test_foreign_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a checkpoint of ours: it has no 'config/"):
        store.restore(tmp_path)


def test_damaged_arrays(tmp_path):
    store.save(tmp_path / "ckpt", CONFIG, {"w": jnp.ones(4)})
    for data in (tmp_path / "ckpt" / "params").glob("**/d"):
        shutil.rmtree(data)
    with pytest.raises(CheckpointError, match="ckpt is damaged: NOT_FOUND"):
        store.restore(tmp_path / "ckpt")


def test_damaged_config(tmp_path):
    store.save(tmp_path / "ckpt", CONFIG, params())
    (tmp_path / "ckpt" / "config" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="config/metadata is not valid JSON"):
        store.restore(tmp_path / "ckpt")


def test_sharding_that_does_not_divide(tmp_path, mesh):
    store.save(tmp_path / "ckpt", CONFIG, {"w": jnp.ones(6)})
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    with pytest.raises(ValueError, match=r"cannot shard w of shape \(6,\): ") as caught:
        store.restore(tmp_path / "ckpt", shardings=lambda path: sharding)
    assert not isinstance(caught.value, CheckpointError), "the folder is not at fault"


def test_shardings_tree_that_lacks_a_parameter(tmp_path, mesh):
    store.save(tmp_path / "ckpt", CONFIG, {"a": {"b": jnp.ones(8)}})
    with pytest.raises(ValueError, match="shardings has no entry for a/b"):
        store.restore(tmp_path / "ckpt", shardings={"a": {}})
